"""One step: the losses of a batch, with a target that is frozen and computes the hidden states on the fly."""

import torch
from transformers import PreTrainedModel

from ..generation.hidden_states import chosen_of, indices_of, last_layer_of, noting, request_for
from ..modeling_dspark import DSparkHead, KnownBlocks
from ..shared_embeddings import SharedEmbeddings, target_logits
from .blocks import NO_LABEL, attention_masks, documents_of, labels_and_weights, sample_blocks
from .losses import CE_WEIGHT, CHUNK, Losses, dspark_losses

# Context features [b, T, m*d], and the last hidden states after the final norm [b, T, d].
States = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def target_states(
    target: PreTrainedModel, input_ids: torch.Tensor, layer_ids: list[int], positions: torch.Tensor | None = None
) -> States:
    """What the head reads of the target, and what the target's logits are made of.

    Args:
        positions: [b, T], of sequences that hold several documents; see `packing`.
    """
    last = target.config.get_text_config(decoder=True).num_hidden_layers
    indices = indices_of(layer_ids)
    request = request_for([*indices, last])
    kwargs = {} if positions is None else {"position_ids": positions}
    with noting(last_layer_of(target, layer_ids)) as noted:
        outputs = target(input_ids=input_ids, use_cache=False, output_hidden_states=request, logits_to_keep=1, **kwargs)
    return torch.cat(chosen_of(outputs, indices, noted), dim=-1), outputs.hidden_states[last]


def training_step(
    head: DSparkHead,
    target: PreTrainedModel,
    embeddings: SharedEmbeddings,
    batch: dict[str, torch.Tensor],
    anchors_per_sequence: int,
    generator: torch.Generator | torch.Tensor,
    ce_weight: float = CE_WEIGHT,
    states: States | None = None,
) -> Losses:
    """Losses of one batch at freshly sampled anchors. `head` may be wrapped by accelerate.

    Args:
        batch: see `data.collate`. generator: see [`~blocks.sample_blocks`].
        states: of the batch, where they are known; see [`target_states`].
    """
    input_ids, loss_mask, positions = batch["input_ids"], batch["loss_mask"], batch.get("positions")
    own = getattr(head, "module", head)
    documents = None if positions is None else documents_of(positions)
    blocks = sample_blocks(loss_mask, anchors_per_sequence, generator, documents)
    features, last = states or target_states(target, input_ids, own.config.target_layer_ids, positions)
    length, gamma = input_ids.shape[1], own.config.gamma
    masks = attention_masks(blocks, length, own.mask_rules, own.config.block_size, documents)
    drafted = draft_ids(own) if own.config.draft_vocab_size is not None else None
    labels, supervised = labels_and_weights(input_ids, loss_mask, blocks, gamma, documents, drafted)
    # The target state at anchor + j predicts the label of row j.
    places = (blocks.anchors[..., None] + torch.arange(gamma, device=input_ids.device)).clamp(max=length - 1)
    aligned = last[torch.arange(len(last), device=last.device)[:, None, None], places]

    def finish(known: KnownBlocks) -> tuple[torch.Tensor | None, ...]:
        losses = dspark_losses(
            known.made_of,
            known.logits,
            aligned,
            target_logits(target),
            known.confidence_logits,
            labels,
            supervised,
            ce_weight,
            None if drafted is None else own.draft_tokens,
            known.parameters,
            max(1, CHUNK // embeddings.vocab_size),
        )
        return tuple(vars(losses).values())

    return Losses(*head(input_ids, features, blocks.anchors, masks, embeddings, positions, finish))


def share_frozen(head: DSparkHead, target: PreTrainedModel) -> SharedEmbeddings:
    """The embedding and LM head to train with, all frozen: also copies of the head that differ from the target's."""
    # Copies are the target's where they are on its device.
    embeddings = head.to(target.device).share_embeddings(target)
    for own in (head.embed_tokens, head.lm_head):
        if own is not None:
            own.requires_grad_(False)
    return embeddings


def draft_ids(head: DSparkHead) -> torch.Tensor:
    """[V] int64, ids of all tokens in a head's reduced draft vocabulary, `NO_LABEL` for those outside."""
    tokens = head.draft_tokens
    ids = torch.full((head.config.vocab_size,), NO_LABEL, device=tokens.device)
    return ids.index_copy_(0, tokens, torch.arange(len(tokens), device=tokens.device))


def check_trainable(head: DSparkHead, target: PreTrainedModel) -> None:
    """Raise for heads whose tokens are not the target's."""
    config, size = head.config, target.config.get_text_config(decoder=True).vocab_size
    if config.vocab_size != size:
        raise ValueError(
            f"The head has a vocabulary of {config.vocab_size}, the target one of {size}. Such a head can be decoded "
            "with, but not trained here: begin with a fresh one."
        )
