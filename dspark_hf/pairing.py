"""Whether a head and a target fit together, as far as their configs say."""

from transformers import PreTrainedConfig

# Vocabularies that differ by more are those of two tokenizers: padding and added tokens are a few hundreds or thousands
# beside some ten thousands.
SHARED_VOCABULARY = 0.75


def misfits(head: PreTrainedConfig, target: PreTrainedConfig) -> list[str]:
    """Why a head of this config cannot draft for a target of that, a sentence each."""
    text, found = target.get_text_config(decoder=True), []
    sizes = head.vocab_size, text.vocab_size
    if min(sizes) < SHARED_VOCABULARY * max(sizes):
        found.append(
            f"The head was made for a vocabulary of {sizes[0]}, but the target has a vocabulary of {sizes[1]}."
        )
    if head.hidden_size != text.hidden_size:
        found.append(
            f"The head was made for hidden size {head.hidden_size}, but the target has hidden size {text.hidden_size}."
        )
    if head.borrow_embeddings and head.mask_token_id >= text.vocab_size:
        found.append(
            f"The head borrows its embedding, and its mask token {head.mask_token_id} is beyond the target's "
            f"vocabulary of {text.vocab_size}."
        )
    ids, layers = head.target_layer_ids, text.num_hidden_layers
    if ids[-1] >= layers:
        found.append(f"The head reads the target's layers {ids}, but it has {layers} layers (0 to {layers - 1}).")
    if head.num_target_layers not in (None, layers):
        found.append(f"The head was made for a target of {head.num_target_layers} layers, but this one has {layers}.")
    return found


def doubts(head: PreTrainedConfig, target: PreTrainedConfig) -> list[str]:
    """What may be wrong with a head of this config beside a target of that, though it drafts."""
    found = vocabulary_difference(head, target), rope_contradiction(head, target)
    return [doubt for doubt in found if doubt is not None]


def vocabulary_difference(head: PreTrainedConfig, target: PreTrainedConfig) -> str | None:
    """What is drafted where one vocabulary is the other one with more tokens behind it."""
    own, theirs = head.vocab_size, target.get_text_config(decoder=True).vocab_size
    if own == theirs:
        return None
    return (
        f"The head was made for a vocabulary of {own}, its target has a vocabulary of {theirs}. They are taken for one "
        f"vocabulary that was padded or extended: only the first {min(own, theirs)} tokens are drafted. If hardly any "
        "draft is accepted, the head was made for another tokenizer; the text is right either way."
    )


def rope_contradiction(head: PreTrainedConfig, target: PreTrainedConfig) -> str | None:
    """What to try when the rotary bases of a head and its target differ, which Model-Optimizer can bring about: its
    export names a base that the head was not always trained with."""
    rope = getattr(target.get_text_config(decoder=True), "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope
    own, theirs = head.rope_parameters["rope_theta"], rope.get("rope_theta")
    if theirs is None or own == theirs:
        return None
    override = head.rope_parameters | {"rope_theta": theirs}
    return (
        f"The head's config has a rotary base of {own:g}, its target one of {theirs:g}. Heads are usually trained with "
        "their target's. If few drafts are accepted, try "
        f"`DSparkHead.from_pretrained(..., rope_parameters={override})`; the text is right with either."
    )
