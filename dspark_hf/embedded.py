"""The pair that ships with the package: a small Qwen3 target with its tokenizer, and a head trained for it."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .modeling_dspark import DSparkHead

FOLDER = Path(__file__).parent / "pair"


def embedded_pair(
    dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, DSparkHead, PreTrainedTokenizerBase]:
    """`model, head, tokenizer` of the embedded pair, ready to generate, without a download.

    The target writes worked solutions to grade-school word problems, and Python; it is small enough for a laptop's
    processor and good for trying things out, not for its answers.

    Args:
        dtype: of model and head; the weights are stored in bfloat16.
        device: where to put both; the processor by default.
    """
    # Not by `device_map`, which needs accelerate.
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "target", dtype=dtype).eval().to(device)
    head = DSparkHead.from_pretrained(FOLDER / "head", dtype=dtype).eval().to(device)
    return model, head, AutoTokenizer.from_pretrained(FOLDER / "target")
