"""What recurrent and convolutional layers keep: the last inputs of a convolution, and a state that sums up the text.

Neither can be cut back to a length. Of a convolution all inputs of a pass are at hand, so a row goes on from the last
ones that it keeps. The state of a recurrence is run once more over what the pass had fed to it, with tokens that a row
does not keep made to count for nothing; see `recurrences`. That costs a fraction of the layer, and nothing where all
rows keep all tokens.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from .cache import Kept, SlotLayer, Slots
from .compressed import FAMILIES, kinds_of_rows
from .packing import current_context
from .placement import Placement

Behind = Callable[[torch.Tensor], torch.Tensor]


class StateLayer(Slots, LinearAttentionCacheLayerMixin):
    """Inputs of a convolution [slots, channels, kernel size] and a recurrent state [slots, ...], one of each as all
    supported models have; layers of convolutions alone have no state.

    Attributes:
        behind: of a pass over a block, the recurrent state [R, ...] behind the tokens of a mask [R, n]; `None` where
            the layer has no recurrence, or a pass reads all there is.
    """

    behind: Behind | None = None

    def place(self, placement: Placement) -> None:
        super().place(placement)
        held = [x[self._rows(x)] for x in self.whole] if placement.continues else []
        # The names under which models look for what their layers keep.
        self.conv_states[0], self.recurrent_states[0] = (*held, None, None)[:2]
        self.has_previous_state[0] = placement.continues
        self.inputs: torch.Tensor | None = None
        self.behind = None

    def lazy_initialization(self, conv_states=None, recurrent_states=None, state_idx=0) -> None:
        """Nothing: memory is allocated when the first pass commits."""

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs
    ) -> torch.Tensor:
        """What a convolution over the new inputs [R, channels, n] has to see: them, behind those before."""
        size = conv_kernel_size or conv_states.shape[-1]
        before = self.conv_states[0]
        if before is None:
            before = conv_states.new_zeros(*conv_states.shape[:2], size)
        self.inputs = torch.cat([before, conv_states], dim=-1)
        if self.has_previous_state[0]:
            current_context().recurrence = self
            return self.inputs
        # Of a prompt at least as many as the kernel has.
        return self.inputs[..., -max(size, conv_states.shape[-1]) :]

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        """Take over the state behind the pass."""
        self.recurrent_states[0] = recurrent_states
        return recurrent_states

    def commit(self, kept: Kept) -> None:
        inputs, state = self.conv_states[0], self.recurrent_states[0]
        if self.inputs is not None:
            size = self.inputs.shape[-1] - kept.width
            index = kept.ends.to(self.inputs.device)[:, None] + torch.arange(size, device=self.inputs.device)
            inputs = self.inputs.gather(2, index[:, None].expand(-1, self.inputs.shape[1], -1))
        if self.behind is not None and not kept.is_whole:
            state = self.behind(kept.mask.to(inputs.device))
        self._store([inputs] if state is None else [inputs, state])
        self.inputs = self.behind = None

    def _store(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take over tensors [R, ...] of the rows that took part."""
        if not self.whole:
            self.whole = tuple(x.new_zeros(self.slots, *x.shape[1:]) for x in tensors)
        for whole, x in zip(self.whole, tensors, strict=True):
            # Passes over one token change in place what they were given.
            if x.data_ptr() != whole.data_ptr():
                whole[self._rows(whole)] = x.to(whole.dtype)

    def _rows(self, x: torch.Tensor) -> slice | torch.Tensor:
        """The rows of the pass among the slots of a tensor."""
        rows = self.placement.rows
        return slice(self.rows) if rows is None else rows.to(x.device)

    def take(self, row: int, length: int) -> tuple[torch.Tensor, ...]:
        """The inputs [channels, kernel size] and the state of a row."""
        return tuple(x[row] for x in self.whole)

    def put(self, row: int, *tensors: torch.Tensor) -> None:
        if not self.whole:
            self.whole = tuple(x.new_zeros(self.slots, *x.shape) for x in tensors)
        for whole, x in zip(self.whole, tensors, strict=True):
            whole[row] = x

    def fill(self, *tensors: torch.Tensor) -> None:
        self.whole = tuple(x.new_zeros(self.slots, *x.shape[1:]) for x in tensors)
        for whole, x in zip(self.whole, tensors, strict=True):
            whole[: len(x)] = x

    def resize(self, rows: int) -> None:
        """Rows that come begin with nothing."""
        for x in self.whole:
            x[self.rows : rows] = 0
        super().resize(rows)


class MixedLayer(StateLayer, CacheLayerMixin):
    """A layer with both, a recurrence and attention side by side: keys and values are a [`SlotLayer`]'s."""

    def __init__(self, rows: int, slots: int):
        super().__init__(rows, slots)
        self.attention = SlotLayer(rows, slots)

    def place(self, placement: Placement) -> None:
        super().place(placement)
        self.attention.expected = self.expected
        self.attention.place(placement)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """See `SlotLayer.update`."""
        return self.attention.update(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.attention.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.attention.get_seq_length()

    def take(self, row: int, length: int) -> tuple[torch.Tensor, ...]:
        """Keys and values, and what a [`StateLayer`] keeps."""
        return *self.attention.take(row, length), *super().take(row, length)

    def put(self, row: int, *tensors: torch.Tensor) -> None:
        self.attention.put(row, *tensors[:2])
        super().put(row, *tensors[2:])

    def fill(self, *tensors: torch.Tensor) -> None:
        self.attention.fill(*tensors[:2])
        super().fill(*tensors[2:])

    def keep(self, rows: list[int]) -> None:
        self.attention.keep(rows)
        super().keep(rows)

    def resize(self, rows: int) -> None:
        self.attention.resize(rows)
        super().resize(rows)

    def erase(self, row: int) -> None:
        self.attention.erase(row)
        super().erase(row)

    def clear(self) -> None:
        self.attention.clear()
        super().clear()


# By the layer types of configs; all others keep keys and values, or nothing.
KINDS = {"linear_attention": StateLayer, "conv": StateLayer, "hybrid": MixedLayer}


def kinds_of(config: PreTrainedConfig) -> list[Callable[[int, int], Slots]]:
    """What the layers of a model with this text config keep."""
    if config.model_type in FAMILIES:
        return kinds_of_rows(config)
    types = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    return [KINDS.get(own, SlotLayer) for own in types]


def is_stateful(kinds: Sequence[Callable[[int, int], Slots]]) -> bool:
    """Whether some layers keep a state of the whole row."""
    return any(kind is not SlotLayer for kind in kinds)
