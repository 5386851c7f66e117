"""One step: the losses of a batch, with a target that is frozen and computes the hidden states on the fly."""

import torch
from transformers import PreTrainedModel

from ..generation.hidden_states import chosen_of, indices_of, last_layer_of, noting, request_for
from ..modeling_dspark import DSparkHead
from ..tables import Tables, target_logits
from .blocks import attention_mask, labels_and_weights, sample_blocks
from .losses import CE_WEIGHT, Losses, dspark_losses

# Context features [b, T, m*d], and the last hidden states after the final norm [b, T, d].
States = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def target_states(
    target: PreTrainedModel, input_ids: torch.Tensor, layer_ids: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Context features [b, T, m*d] and the last hidden states after the final norm [b, T, d]."""
    last = target.config.get_text_config(decoder=True).num_hidden_layers
    indices = indices_of(layer_ids)
    request = request_for([*indices, last])
    with noting(last_layer_of(target, layer_ids)) as noted:
        outputs = target(input_ids=input_ids, use_cache=False, output_hidden_states=request, logits_to_keep=1)
    return torch.cat(chosen_of(outputs, indices, noted), dim=-1), outputs.hidden_states[last]


def training_step(
    head: DSparkHead,
    target: PreTrainedModel,
    tables: Tables,
    batch: dict[str, torch.Tensor],
    anchors_per_sequence: int,
    generator: torch.Generator | torch.Tensor,
    ce_weight: float = CE_WEIGHT,
    states: States | None = None,
) -> Losses:
    """Losses of one batch at freshly sampled anchors. `head` may be wrapped by accelerate.

    Args:
        generator: see [`~blocks.sample_blocks`]. states: of the batch, where they are known; see [`target_states`].
    """
    input_ids, loss_mask = batch["input_ids"], batch["loss_mask"]
    config = head.module.config if hasattr(head, "module") else head.config
    blocks = sample_blocks(loss_mask, anchors_per_sequence, generator)
    features, last_hidden = states or target_states(target, input_ids, config.target_layer_ids)
    mask = attention_mask(blocks, input_ids.shape[1], config.block_size)
    _, draft_logits, confidence_logits = head(input_ids, features, blocks.anchors, mask, tables)
    labels, supervised = labels_and_weights(input_ids, loss_mask, blocks, config.block_size)
    # The target state at anchor + k predicts the label of row k.
    positions = blocks.anchors[..., None] + torch.arange(config.block_size, device=input_ids.device)
    positions = positions.clamp(max=input_ids.shape[1] - 1).flatten(1)
    aligned = last_hidden.gather(1, positions[..., None].expand(-1, -1, last_hidden.shape[-1]))
    with torch.no_grad():
        aligned_logits = target_logits(target)(aligned).unflatten(1, (-1, config.block_size))
    return dspark_losses(draft_logits, aligned_logits, confidence_logits, labels, supervised, ce_weight)


def check_trainable(head: DSparkHead, target: PreTrainedModel) -> None:
    """Raise for heads whose blocks differ from those that `blocks` makes, or whose tokens from the target's."""
    config, size = head.config, target.config.get_text_config(decoder=True).vocab_size
    if config.vocab_size != size:
        raise ValueError(
            f"The head has a vocabulary of {config.vocab_size}, the target one of {size}. Such a head can be decoded "
            "with, but not trained here: begin with a fresh one."
        )
    reasons = {
        "predicts nothing at the anchor (`sample_from_anchor=False`)": not config.sample_from_anchor,
        "drafts from a part of the vocabulary (`draft_vocab_size`)": config.draft_vocab_size is not None,
        "has sliding layers (`layer_types`)": "sliding_attention" in config.layer_types,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"The head {reason}; such heads can be decoded with, but not trained here.")
