"""What differs between a target and a head, and may explain why they do not fit: sentences, no verdicts."""

import json
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.files import RESULTS
from ..checkpoints.headers import find_file
from ..modeling_dspark import DSparkHead
from ..pairing import doubts
from .results import fingerprint, read_results

# Where a tokenizer has its chat template: in a file of its own, or in its config.
TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
# Settings of `generate` that change what drafts have to agree with, and where they do nothing.
SAMPLING = {"do_sample": False}
PENALTIES = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "guidance_scale": 1.0}


def differences(
    model: PreTrainedModel,
    head: DSparkHead,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    promised: dict | None,
) -> list[str]:
    """A sentence for each thing that differs.

    Args:
        longest: tokens of the longest text that was drafted. promised: see [`promised_by`].
    """
    found = [
        *doubts(head.config, model.config),
        _quantised(model),
        _name(model, head),
        _template(head, tokenizer),
        _defaults(model),
        _context(head, longest),
        _results(head, promised),
    ]
    return [sentence for sentence in found if sentence is not None]


def _quantised(model: PreTrainedModel) -> str | None:
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return f"The target is quantised ({method or type(config).__name__}); heads are trained beside whole weights."


def _name(model: PreTrainedModel, head: DSparkHead) -> str | None:
    made_for, beside = head.config.target_name_or_path, model.config._name_or_path
    if not made_for or not beside or Path(made_for).name.lower() == Path(beside).name.lower():
        return None
    return f"The head's config says that it was made for {made_for}; the target is {beside}."


def _template(head: DSparkHead, tokenizer: PreTrainedTokenizerBase) -> str | None:
    theirs = _template_beside(head.name_or_path)
    if theirs is None or theirs == tokenizer.chat_template:
        return None
    return "The chat template beside the head differs from the target's: its training data may have looked otherwise."


def _template_beside(source: str) -> str | None:
    """The chat template in a head's folder or repository, `None` where it has none."""
    path = source and find_file(source, TEMPLATE)
    if path:
        return Path(path).read_text(encoding="utf-8")
    path = source and find_file(source, TOKENIZER_CONFIG)
    return json.loads(Path(path).read_text(encoding="utf-8")).get("chat_template") if path else None


def _defaults(model: PreTrainedModel) -> str | None:
    config = model.generation_config
    changed = {k: getattr(config, k, None) for k, off in (SAMPLING | PENALTIES).items()}
    changed = {k: v for k, v in changed.items() if v not in (None, (SAMPLING | PENALTIES)[k])}
    if not changed:
        return None
    if changed.get("do_sample"):
        changed["temperature"] = config.temperature
    told = ", ".join(f"{key}={value}" for key, value in changed.items())
    return f"By default the target's `generate` has {told}, with which fewer drafts are accepted than measured here."


def _context(head: DSparkHead, longest: int) -> str | None:
    limit = head.config.max_position_embeddings
    if longest <= limit:
        return None
    return f"Texts of up to {longest} tokens are longer than the {limit} positions that the head was made for."


def _results(head: DSparkHead, promised: dict | None) -> str | None:
    if promised is None or promised["fingerprint"] == fingerprint(head):
        return None
    return f"{RESULTS} beside the head was taken with other weights or another config."


def promised_by(head: DSparkHead) -> dict | None:
    """What `dspark-hf eval` found of a head, where it was published with that.

    Raises:
        ValueError: for a file of another kind.
    """
    path = head.name_or_path and find_file(head.name_or_path, RESULTS)
    return read_results(path) if path else None
