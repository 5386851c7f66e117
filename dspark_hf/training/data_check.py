"""Whether training data look like the target's own text: their perplexity under it, beside that of its own answers.

Heads that were trained on other text have fewer drafts accepted (0.28 against 0.41 of them in speculators#677), and
nothing else tells. The check reads at most 128 supervised tokens of 16 rows, and lets the target answer the same 16
prompts with as many: 128 steps, some seconds on a GPU, and 32 passes beside.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from .data import Row
from .regenerate import Prompt, Settings, regenerate, run_file, sampling_config

logger = logging.get_logger(__name__)

ROWS, TOKENS = 16, 128
# Longer prompts are left out, so that a check does not take longer than a few steps of training.
LONGEST_PROMPT = 1024
# Data are other text when they are less likely by so many standard errors of the rows' differences ..
SURE = 3.0
# .. and so much that it matters: by a twentieth in perplexity.
NOTABLE = 1.05


@dataclass(frozen=True)
class Comparison:
    """Perplexities under the target, each the exponential of the mean over rows of a row's mean over tokens.

    rows: compared. tokens: of an answer, at most. data: of the data's supervised tokens. own: of the target's answers
    to the same prompts. error: standard error of the difference of their logarithms.
    """

    rows: int
    tokens: int
    data: float
    own: float
    error: float

    @property
    def differs(self) -> bool:
        """Whether the data are less likely than the target's own text, beyond chance. More likely ones are not other
        text: they are what a target writes with a lower temperature."""
        gap = np.log(self.data / self.own)
        return bool(gap > SURE * self.error and gap > np.log(NOTABLE))


def check_data(target: PreTrainedModel, rows: Sequence[Row], source: str, device: torch.device) -> Comparison | None:
    """Warn, with both perplexities, where data do not look like the target's own text. `None` where all prompts are too
    long to tell.

    Args:
        rows: of [`~data.load_rows`]. source: where they are from. device: where the target is put first.
    """
    found = compare(target.eval().to(device), rows, sampled_with(source))
    if found is not None and found.differs:
        logger.warning(
            f"The data do not look like the target's own text: in {found.rows} rows of {source!r} the perplexity of "
            f"the first {found.tokens} supervised tokens is {found.data:.2f} under the target, that of its own answers "
            f"to the same prompts {found.own:.2f}. Drafts of a head that is trained on them are accepted less often. "
            f"`dspark-hf regenerate --data {source}` writes the target's own answers."
        )
    return found


def compare(target: PreTrainedModel, rows: Sequence[Row], config: GenerationConfig | None = None) -> Comparison | None:
    """Perplexity of some rows' first answers beside that of the target's own answers to the same prompts.

    Args:
        config: how those are sampled; by default as the target's generation config says, and where that is greedy at
            temperature 1, as nothing says how the data were.
    """
    shuffled = (_first_answer(rows[i]) for i in random.Random(0).sample(range(len(rows)), len(rows)))
    chosen = list(islice((pair for pair in shuffled if 0 < len(pair[0]) <= LONGEST_PROMPT), ROWS))
    if not chosen:
        return None
    settings = Settings(
        max_new_tokens=TOKENS,
        temperature=None if target.generation_config.do_sample else 1.0,
        batch_size=ROWS,
    )
    config = config or sampling_config(target, settings)
    prompts = {number: Prompt(ids, None) for number, (ids, _) in enumerate(chosen)}
    own = {answer.prompt: answer.tokens for answer in regenerate(target, None, prompts, settings, config)}
    losses = np.array([[_loss(target, ids, text) for text in (data, own[n])] for n, (ids, data) in enumerate(chosen)])
    difference = losses[:, 0] - losses[:, 1]
    error = difference.std(ddof=1) / len(losses) ** 0.5 if len(losses) > 1 else np.inf
    return Comparison(len(chosen), TOKENS, *np.exp(losses.mean(axis=0)).tolist(), float(error))


@torch.no_grad()
def _loss(target: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    """Mean over the tokens of an answer of minus the logarithm of their probability, in nats."""
    ids = torch.tensor([prompt + answer], device=target.device)
    logits = target(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, -len(answer) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), ids[0, -len(answer) :]).item()


def sampled_with(source: str) -> GenerationConfig | None:
    """How the rows of a file were sampled, where `dspark-hf regenerate` wrote it."""
    path = run_file(source)
    return (
        GenerationConfig(**json.loads(path.read_text(encoding="utf-8"))["generation_config"])
        if path.is_file()
        else None
    )


def _first_answer(row: Row) -> tuple[list[int], list[int]]:
    """The tokens before a row's first supervised one, and so many from there on."""
    ids, mask = row["input_ids"], row["loss_mask"]
    start = mask.index(1)
    count = sum(1 for _ in takewhile(bool, mask[start : start + TOKENS]))
    return ids[:start], ids[start : start + count]
