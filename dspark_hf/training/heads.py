"""The head that a run begins with: a fresh one, a published one for the same target, or what fits of another one."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration_dspark import DSparkConfig
from ..modeling_dspark import DSparkHead
from ..pairing import misfits
from .data import Row
from .draft_vocabulary import choose_draft_vocabulary, owns_lm_head
from .warm_start import take, warm_start

# What kind of head it is and how large, apart from its target.
KIND = (
    "backbone",
    "block_size",
    "sample_from_anchor",
    "num_hidden_layers",
    "layer_types",
    "sliding_window",
    "window_counted_from",
    "sliding_is_causal",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "attention_bias",
    "rms_norm_eps",
    "rope_parameters",
    "draft_vocab_size",
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "confidence_head_bias",
)


def read_keys(given: str) -> dict[str, Any]:
    """Keys of a `DSparkConfig` from JSON or a file of it.

    Raises:
        ValueError: for text that is no JSON object, and for keys that no head has.
    """
    text = given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8")
    try:
        keys = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"--config {given!r} is no JSON ({error}), such as '{{\"sample_from_anchor\": false}}'."
        ) from None
    if not isinstance(keys, dict):
        raise ValueError(f"--config {given!r} is no object of keys, such as '{{\"sample_from_anchor\": false}}'.")
    unknown = sorted(keys.keys() - DSparkConfig().to_dict().keys())
    if unknown:
        raise ValueError(f"--config {given!r}: a head has no {', '.join(unknown)}; see DSparkConfig.")
    return keys


def fresh_head(target: PreTrainedModel, rows: list[Row], **keys: Any) -> tuple[DSparkHead, str]:
    """A head for `target`, its draft layers from the target's where they fit, and what it begins with in words.

    Args:
        rows: the data, for a reduced draft vocabulary (`draft_vocab_size`). keys: of `DSparkConfig.from_target`.
    """
    head, said = _made(target, rows, keys)
    copied = warm_start(head, target)
    return head, "; ".join(
        filter(None, [said, f"draft layers start from the target's layers {copied}" if copied else ""])
    )


def head_from(published: DSparkHead, target: PreTrainedModel, rows: list[Row]) -> tuple[DSparkHead, str]:
    """The published head itself where it is one for such a target; else a fresh one of its kind with those of its
    tensors that fit. And which in words.

    Raises:
        ValueError: for stages of DeepSeek V4 beside another target.
    """
    theirs, text = published.config, target.config.get_text_config(decoder=True)
    if not misfits(theirs, target.config) and theirs.vocab_size == text.vocab_size:
        return published, ""
    if theirs.stage_config is not None:
        raise ValueError("The head's stages are layers of its own target; they cannot begin a head for another one.")
    keys = {key: getattr(theirs, key) for key in KIND if key != "markov_head_type" or theirs.markov_rank}
    head, said = _made(target, rows, keys | {"dtype": torch.float32})
    taken, of_all = take(head, published)
    if not any(name.startswith("layers.") for name in taken):
        warm_start(head, target)
    return head, "; ".join(
        filter(
            None,
            [
                f"the head is one for another target: {len(taken)} of its tensors fit, {of_all:.0%} of the new head",
                said,
            ],
        )
    )


def _made(target: PreTrainedModel, rows: list[Row], keys: dict[str, Any]) -> tuple[DSparkHead, str]:
    size = keys.get("draft_vocab_size")
    if size is None:
        return DSparkHead(DSparkConfig.from_target(target.config, **keys)), ""
    head = DSparkHead(DSparkConfig.from_target(target.config, **keys | {"borrow_lm_head": not owns_lm_head(target)}))
    share = choose_draft_vocabulary(head, target, rows)
    return head, f"{share:.1%} of the supervised tokens are in the draft vocabulary of {size}"
