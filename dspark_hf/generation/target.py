"""The target as a decoding round sees it: tokens in, logits and hidden states out, keys and values in a SlotCache."""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig, PreTrainedModel

from ..shared_embeddings import device_of
from . import attention, recurrences
from .acceptance import Verdict
from .cache import SlotCache
from .compressed import FAMILIES, cache_of_row
from .hidden_states import chosen_of, indices_of, last_layer_of, noting, request_for
from .packing import Packing, attention_of_rounds, forward_context, implementation_of
from .placement import Placement, causal_mask
from .releases import cache_argument
from .rope import growing_modules, rereads_at, turned_as_in_plain
from .states import is_stateful, kinds_of

Mask = torch.Tensor | BlockMask


@dataclass(frozen=True)
class TargetOutput:
    """What one pass of the target over n tokens of R rows gives.

    logits: [R, n, V], or of the positions asked for, float32 at most; `None` where the pass has decided already.
    features: [R, n, m*d], the layers that the head reads, side by side.
    hidden_states: of all layers [R, n, d]; `None` unless asked for.
    attentions: of all layers [R, heads, n, view]; `None` unless asked for.
    verdict: what a compiled pass has made of the drafts. starts: [R], where the next pass starts in each row then.
    read: the same of prompts that were read in it.
    """

    logits: torch.Tensor | None
    features: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    verdict: Verdict | None = None
    starts: torch.Tensor | None = None
    read: "TargetOutput | None" = None


@dataclass(frozen=True)
class Part:
    """Rows of a packed pass that are laid out alike.

    tokens: [R, n]. packing: which of them are in the pass. is_prompt: whether only the logits behind each row's last
    token are wanted. lengths: [R, n], see `packing.ForwardContext`; only for targets that are `growing`.
    """

    tokens: torch.Tensor
    packing: Packing
    is_prompt: bool = False
    lengths: torch.Tensor | None = None


class Target:
    """Runs a stock transformers model over rows of different lengths.

    Args:
        model: a decoder-only model that `compatibility` lets through.
        layer_ids: layers whose outputs are captured; -1 is the embedding output.
        all_hidden_states, attentions: whether every pass returns them.
        options: scalars of the caller that every pass is given, as plain `generate` gives them.

    Attributes:
        captured: whether its passes are.
        row_by_row: whether rows go through it one after the other; see `compressed`. last_layer: see `hidden_states`.
        kinds: what its layers keep. is_stateful: whether for some that is a state of the whole row, so that rows of a
            prompt's pass must be of one length, and padding or packing would be read.
        growing: its rotary embeddings that go by the length of the text. rereads_at: see `rope.rereads_at`.
        positions: those that its table of learned positions has, `None` where positions do not end.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layer_ids: list[int],
        all_hidden_states: bool = False,
        attentions: bool = False,
        options: dict[str, Any] | None = None,
    ):
        self.all_hidden_states = all_hidden_states
        self.options = options or {}
        self.attentions = attentions
        self.model = model
        self.device, self.dtype = device_of(model.get_input_embeddings()), model.dtype
        self.config = model.config.get_text_config(decoder=True)
        self.hidden_state_indices = indices_of(layer_ids)
        # What is added to the scores of keys that a query sees, and to others.
        self.seen, self.unseen = torch.tensor([0.0, torch.finfo(self.dtype).min], dtype=self.dtype, device=self.device)
        self.layer_types = set(getattr(self.config, "layer_types", None) or ())
        self.window = getattr(self.config, "sliding_window", None)
        self.implementation = implementation_of(self.config)
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.cache_argument = cache_argument(model)
        self.growing, self.rereads_at = growing_modules(model), rereads_at(model)
        self.positions = position_limit(self.config)
        self.captured = False
        self.kinds = kinds_of(self.config)
        self.is_stateful = is_stateful(self.kinds)
        self.row_by_row = self.config.model_type in FAMILIES
        self.last_layer = last_layer_of(model, layer_ids)
        if self.is_stateful:
            recurrences.install(model)

    def new_cache(self, rows: int, slots: int | None = None) -> SlotCache:
        return SlotCache(len(self.kinds), rows, self.device, slots, self.kinds)

    @property
    def packs(self) -> bool:
        """Whether rows of different lengths can share a pass without padding; see `packing`."""
        wants_all = self.all_hidden_states or self.attentions
        uses_interface = self.implementation in ("sdpa", attention.NAME) and self.model._supports_attention_backend
        is_plain = not self.captured and not self.is_stateful and self.model._compiled_call_impl is None
        return uses_interface and not wants_all and is_plain

    def forward(
        self,
        tokens: torch.Tensor,
        cache: SlotCache,
        keep: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        rows: list[int] | None = None,
    ) -> TargetOutput:
        """One pass that appends tokens [R, n] to every row, without committing them.

        Args:
            keep: of the tokens of a prompt, indices of those whose logits are wanted; of a block all are, `None`.
            lengths: [R, n], see `packing.ForwardContext`; only for targets that are `growing`.
            rows: the R rows of the cache that take part when these are not all.
        """
        if self.row_by_row and len(tokens) > 1:
            return self._row_by_row(tokens, cache, keep, rows)
        placement = cache.place(tokens.shape[1], rows=rows)
        kwargs = {"logits_to_keep": keep} if keep is not None and self.keeps_logits else {}
        own = cache_of_row(cache, 0 if rows is None else rows[0]) if self.row_by_row else cache
        with forward_context(placement.slot_mapping[:, 0], (), lengths, is_prompt=keep is not None):
            outputs, features = self._call(tokens, positions_of(placement), placement, own, **kwargs)
        logits = outputs.logits if keep is None or kwargs else outputs.logits[:, keep]
        return TargetOutput(
            at_most_float32(logits).to(tokens.device),
            features,
            outputs.hidden_states if self.all_hidden_states else None,
            outputs.attentions if self.attentions else None,
        )

    def forward_packed(self, parts: Sequence[Part], cache: SlotCache) -> list[TargetOutput]:
        """The same for what is filled of several parts, in one pass. Returns what it gives of each: logits and features
        of places that are not filled are zeros, logits of prompts [R, 1, V]."""
        packings = [part.packing for part in parts]
        placement, keep = cache.place_packed(packings), wanted(parts)
        tokens = torch.cat([part.packing.pack(part.tokens) for part in parts], dim=1)
        kwargs = {"logits_to_keep": keep} if keep is not None and self.keeps_logits else {}
        lengths = [part.packing.pack(part.lengths) for part in parts if part.lengths is not None]
        with forward_context(packings[0].starts, packings, torch.cat(lengths, dim=1) if lengths else None):
            outputs, features = self._call(tokens, positions_of(placement), placement, cache, **kwargs)
        logits = at_most_float32(outputs.logits).to(tokens.device)
        if keep is not None and not kwargs:
            logits = logits[:, keep]
        own_logits = logits.split([own.packing.rows if own.is_prompt else own.packing.size for own in parts], dim=1)
        own_features = features.split([packing.size for packing in packings], dim=1)
        return [
            TargetOutput(x.transpose(0, 1) if part.is_prompt else part.packing.unpack(x), part.packing.unpack(states))
            for part, x, states in zip(parts, own_logits, own_features, strict=True)
        ]

    def _row_by_row(
        self, tokens: torch.Tensor, cache: SlotCache, keep: torch.Tensor | None, rows: list[int] | None
    ) -> TargetOutput:
        """The pass in as many as there are rows, for models whose caches have all rows at one place."""
        places = range(len(tokens)) if rows is None else rows
        passes = [self.forward(own[None], cache, keep, rows=[row]) for own, row in zip(tokens, places, strict=True)]
        return side_by_side(passes, list(range(len(passes))))

    def reread(self, tokens: torch.Tensor, cache: SlotCache, rows: torch.Tensor, lengths: torch.Tensor) -> None:
        """Write the keys and values of rows [k] anew, with tokens [k, n] as their first ones.

        Args:
            lengths: [k, n], at which they are read now; see `packing.ForwardContext`.
        """
        count = tokens.shape[1]
        slots = torch.arange(count, device=tokens.device).expand(len(tokens), -1)
        placement = cache.place_at(slots, count, rows=rows)
        kwargs = {"logits_to_keep": 1} if self.keeps_logits else {}
        with forward_context(slots[:, 0], (), lengths):
            self._call(tokens, slots, placement, cache, **kwargs)

    def in_our_attention(self) -> AbstractContextManager[None]:
        """See `packing.attention_of_rounds`."""
        return attention_of_rounds(self.config)

    def _call(self, tokens: torch.Tensor, positions: torch.Tensor, placement: Placement, cache: SlotCache, **kwargs):
        """The model's outputs, and what the head reads of them."""
        with turned_as_in_plain(self.growing), self.in_our_attention(), noting(self.last_layer) as noted:
            outputs = self.run(tokens, positions, placement, cache, **kwargs)
        return outputs, self.features_of(outputs, noted)

    def run(self, tokens: torch.Tensor, positions: torch.Tensor, placement: Placement, cache: SlotCache, **kwargs):
        """The model's outputs. Nothing here depends on values, so that a compiler can follow."""
        if self.positions is not None:
            # Drafts behind a row's last position are never verified, but a table of positions must not be left.
            positions = positions.clamp(max=self.positions - 1)
        return self.model(
            input_ids=tokens,
            attention_mask=None if self.row_by_row else self._mask(placement),
            position_ids=positions,
            use_cache=True,
            output_hidden_states=self.all_hidden_states or request_for(self.hidden_state_indices),
            output_attentions=self.attentions,
            return_dict=True,
            **kwargs,
            **self.options,
            **{self.cache_argument: cache},
        )

    def features_of(self, outputs, noted: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """[R, n, m*d], the states that the head reads of a pass. noted: see `hidden_states.noting`."""
        chosen = [states.to(self.device) for states in chosen_of(outputs, self.hidden_state_indices, noted)]
        return torch.cat(chosen, dim=-1)

    def _mask(self, placement: Placement) -> Mask | dict[str, Mask]:
        """What the model takes as `attention_mask`: one mask, or one a layer type where it mixes types."""
        full = self._seen(placement)
        if self.window is None:
            return full
        sliding = self._seen(placement, self.window)
        if len(self.layer_types) > 1:
            return {"full_attention": full, "sliding_attention": sliding}
        return full if self.layer_types == {"full_attention"} else sliding

    def _seen(self, placement: Placement, window: int | None = None) -> Mask:
        """`causal_mask` as the attention implementation takes it: flex attention a `BlockMask`, the others a term that
        is added to the scores. sdpa would make that of booleans itself, in every layer again."""
        if self.implementation == "flex_attention":
            return block_mask(placement, window)
        rows, count = placement.slot_mapping.shape
        if placement.uniform_start is not None and count == 1 and window is None:
            # Rows of one length, and one token each: it sees all there is.
            return torch.zeros(rows, 1, 1, placement.kv_len, dtype=self.dtype, device=placement.slot_mapping.device)
        return torch.where(causal_mask(placement, window), self.seen, self.unseen)


def at_most_float32(logits: torch.Tensor) -> torch.Tensor:
    """Logits in no more bits than those that plain decoding chooses by."""
    return logits.float() if logits.dtype == torch.float64 else logits


def positions_of(placement: Placement) -> torch.Tensor:
    """[R, n], where the tokens of a pass are for the model."""
    return placement.slot_mapping if placement.positions is None else placement.positions


def wanted(parts: Sequence[Part]) -> torch.Tensor | None:
    """Which tokens of a packed pass logits are wanted of; `None` for all."""
    if not any(part.is_prompt for part in parts):
        return None
    places, first = [], 0
    for part in parts:
        packing = part.packing
        all_own = torch.arange(packing.size, device=packing.counts.device)
        places.append(first + (packing.counts.cumsum(0) - 1 if part.is_prompt else all_own))
        first += packing.size
    return torch.cat(places)


def side_by_side(passes: Sequence[TargetOutput], order: list[int]) -> TargetOutput:
    """One pass [R, ...] of several over different rows and numbers of tokens, zero-padded to the longest; row i is the
    one at order[i] of all in turn."""

    def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        shape = torch.tensor([x.shape[1:] for x in tensors]).amax(dim=0).tolist()
        whole = tensors[0].new_zeros(len(order), *shape)
        first = 0
        for x in tensors:
            whole[(slice(first, first + len(x)), *map(slice, x.shape[1:]))] = x
            first += len(x)
        return whole[order]

    def layers(name: str) -> tuple[torch.Tensor, ...] | None:
        parts = [getattr(own, name) for own in passes]
        return None if parts[0] is None else tuple(map(joined, zip(*parts, strict=True)))

    logits, features = joined([own.logits for own in passes]), joined([own.features for own in passes])
    return TargetOutput(logits, features, layers("hidden_states"), layers("attentions"))


def position_limit(config: PreTrainedConfig) -> int | None:
    """Positions that a target of this text config knows; `None` for rotary ones, which do not end, and for none."""
    if getattr(config, "rope_parameters", None) or is_stateful(kinds_of(config)):
        # Hybrid models without rotary positions have none at all.
        return None
    return getattr(config, "max_position_embeddings", None)


def block_mask(placement: Placement, window: int | None = None) -> BlockMask:
    """[R, 1, n, view]: what `causal_mask` says, for flex attention."""
    slots = placement.slot_mapping.contiguous()

    def sees(row, head, query, key):
        slot = slots[row, query]
        seen = key <= slot
        return seen if window is None else seen & (key > slot - window)

    rows, count = slots.shape
    return create_block_mask(sees, rows, None, count, placement.kv_len, device=str(slots.device))
