"""The audit of losslessness: what a head's `generate` commits, held against what the target itself computes."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from rich.table import Table
from rich.text import Text
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..modeling_dspark import DSparkHead
from .prompts import encode

IDENTICAL, ROUNDING, BROKEN = "identical", "differs only within rounding", "BROKEN"
# Where nothing was drafted, or plain decoding does not repeat itself.
INCONCLUSIVE = "inconclusive"
CONSISTENT = "consistent with the target's distribution"

# Roundings of the largest logit that two correct computations of the same logits may lie apart; see `Difference`.
ROUNDINGS = 8
# New tokens of a draw that are compared: the prefill's, and two that a round commits.
DRAWN_TOKENS = 3
SMALLEST_CELL = 5
SMALLEST_P_VALUE = 1e-6

# Sampling from the target as it is; a model's own top-k and top-p stay out of it.
SAMPLING = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_new_tokens": 0}


@dataclass(frozen=True)
class Difference:
    """Where a row left plain's tokens, and whether rounding explains all that it committed from there on.

    position: of the first difference, among the new tokens. plain, ours: the tokens there, `None` where that side had
    ended. gap: the target's best score minus that of the committed token, replayed token by token; infinite where the
    row ended too early or went on after its end. bound: the largest gap that rounding explains. worst_*: the same of
    the token, from `position` on, that is furthest above its bound.

    The bound is `ROUNDINGS` * eps(dtype of the target) * the largest absolute score. The LM head's sums are rounded in
    units of eps times their size; the states they start from carry a few such units from the layers below, and the
    verified and the replayed pass each err on both tokens.
    """

    prompt: int
    position: int
    plain: int | None
    ours: int | None
    gap: float
    bound: float
    worst_position: int
    worst_gap: float
    worst_bound: float

    @property
    def within_rounding(self) -> bool:
        return self.worst_gap <= self.worst_bound


@dataclass(frozen=True)
class CheckedRow:
    """One prompt's greedy audit.

    tokens: count of new ones. difference: from plain's, if there is one. verified: drafts that were. repeats: whether
    plain decoding wrote the same tokens twice.
    """

    prompt: int
    tokens: int
    difference: Difference | None
    verified: int
    repeats: bool


@dataclass(frozen=True)
class SamplingAudit:
    """Chi-square test of drawn tokens, among which so many drafts were verified, against the target's own
    distribution."""

    draws: int
    verified: int
    statistic: float
    degrees_of_freedom: int
    p_value: float

    @property
    def verdict(self) -> str:
        if self.p_value < SMALLEST_P_VALUE:
            return BROKEN
        return CONSISTENT if self.verified else INCONCLUSIVE


@dataclass(frozen=True)
class Draw:
    """The first new tokens of one sampled continuation of a prompt, up to its end; drafts that were verified for it."""

    prompt: int
    tokens: tuple[int, ...]
    verified: int = 0


# -- Greedy ---------------------------------------------------------------------------------------------------------


def audit_greedy(
    model: PreTrainedModel,
    head: DSparkHead,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    batch_size: int = 8,
    max_new_tokens: int = 128,
) -> Iterator[CheckedRow]:
    """Compare greedy decoding with and without the head, prompt by prompt, as soon as a batch is done.

    The model's own logits processors stay in force on both sides and in the replay.
    """
    for start in range(0, len(prompts), batch_size):
        inputs = encode(prompts[start : start + batch_size], tokenizer, model.device)
        yield from _audit_batch(model, head, inputs, start, max_new_tokens)


def verdict_of(rows: list[CheckedRow]) -> str:
    """The verdict over all prompts. What plain decoding itself does not repeat proves nothing."""
    differing = [row for row in rows if row.difference is not None]
    unexplained = [row for row in differing if not row.difference.within_rounding]
    if any(row.repeats for row in unexplained):
        return BROKEN
    if unexplained or not any(row.verified for row in rows):
        return INCONCLUSIVE
    return ROUNDING if differing else IDENTICAL


def _audit_batch(model, head, inputs, start: int, max_new_tokens: int) -> list[CheckedRow]:
    """The rows of one batch, whose first is prompt `start`."""
    kwargs = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    width = inputs["input_ids"].shape[1]
    plain, again = (model.generate(**inputs, **kwargs)[:, width:].tolist() for _ in range(2))
    output = model.generate(**inputs, **kwargs, assistant_model=head, return_dict_in_generate=True)
    ours, verified = output.sequences[:, width:], _verified(output)
    ends = _Ends(model, max_new_tokens)
    pairs = [(ends.trimmed(a), ends.trimmed(b)) for a, b in zip(plain, ours.tolist(), strict=True)]
    differing = [r for r, (a, b) in enumerate(pairs) if a != b]
    differences = {}
    if differing:
        replay = _Replay(ours[differing])
        kept = {name: tensor[differing] for name, tensor in inputs.items()}
        model.generate(**kept, **kwargs | {"max_new_tokens": ours.shape[1]}, logits_processor=[replay])
        for r, gaps, bounds in zip(differing, *replay.read(model.dtype), strict=True):
            differences[r] = _difference(start + r, *pairs[r], gaps, bounds, ends)
    return [
        CheckedRow(start + r, len(row), differences.get(r), verified[r], plain[r] == again[r])
        for r, (_, row) in enumerate(pairs)
    ]


def _verified(output) -> list[int]:
    """Drafts verified in every row of a generation; none where it went without the head."""
    stats = getattr(output, "dspark", None)
    return [0] * len(output.sequences) if stats is None else stats.verified


class _Replay(LogitsProcessor):
    """Makes plain `generate` write the given tokens [R, N], and records how far behind the best score each one was.

    As the last of the processors it sees what plain decoding chooses from.
    """

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens
        self.gaps: list[torch.Tensor] = []
        self.sizes: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.tokens[:, len(self.gaps), None].to(scores.device)
        self.gaps.append((scores.amax(-1, keepdim=True) - scores.gather(1, token)).squeeze(1))
        # Processors forbid tokens with an infinite score; that says nothing about rounding.
        self.sizes.append(scores.where(scores.isfinite(), 0).abs().amax(-1))
        return torch.full_like(scores, -math.inf).scatter(1, token, 0)

    def read(self, dtype: torch.dtype) -> tuple[list[list[float]], list[list[float]]]:
        """Gaps and bounds of every row, up to the token after which all rows had ended."""
        bounds = ROUNDINGS * torch.finfo(dtype).eps * torch.stack(self.sizes, dim=1)
        return torch.stack(self.gaps, dim=1).tolist(), bounds.tolist()


class _Ends:
    """Where rows end: at an end-of-sequence token or at the length limit."""

    def __init__(self, model: PreTrainedModel, max_new_tokens: int):
        config = model.generation_config
        eos = config.eos_token_id
        self.eos = [eos] if isinstance(eos, int) else list(eos or ())
        self.pad = config.pad_token_id if config.pad_token_id is not None else next(iter(self.eos), None)
        self.limit = max_new_tokens

    def trimmed(self, tokens: list[int]) -> list[int]:
        """Without the padding behind the end; anything else behind it stays."""
        end = self.length(tokens)
        return tokens[:end] if set(tokens[end:]) <= {self.pad} else tokens

    def length(self, tokens: list[int]) -> int:
        """Tokens up to the end, which need not have been reached."""
        return next((i + 1 for i, token in enumerate(tokens[: self.limit]) if token in self.eos), self.limit)

    def right(self, tokens: list[int]) -> bool:
        """Whether the row stops where it should."""
        return len(tokens) == self.length(tokens)


def _difference(prompt: int, plain: list[int], ours: list[int], gaps, bounds, ends: _Ends) -> Difference:
    length = min(ends.length(ours), len(ours))
    gaps, bounds = gaps[:length], bounds[:length]
    if not ends.right(ours):
        gaps, bounds = [*gaps, math.inf], [*bounds, 0.0]
    shared = (i for i, (a, b) in enumerate(zip(plain, ours, strict=False)) if a != b)
    first = next(shared, min(len(plain), len(ours)))
    worst = max(range(first, len(gaps)), key=lambda j: gaps[j] - bounds[j])
    return Difference(
        prompt=prompt,
        position=first,
        plain=plain[first] if first < len(plain) else None,
        ours=ours[first] if first < len(ours) else None,
        gap=gaps[first],
        bound=bounds[first],
        worst_position=worst,
        worst_gap=gaps[worst],
        worst_bound=bounds[worst],
    )


# -- Sampling -------------------------------------------------------------------------------------------------------


def draw(
    model: PreTrainedModel,
    head: DSparkHead,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    batch_size: int = 8,
    draws: int = 2000,
) -> Iterator[list[Draw]]:
    """Sample beginnings with the head at temperature 1, a batch at a time, at least `draws` in all.

    The first `batch_size` prompts take turns in the rows of the batch.
    """
    chosen = [r % min(len(prompts), batch_size) for r in range(batch_size)]
    inputs = encode([prompts[index] for index in chosen], tokenizer, model.device)
    width = inputs["input_ids"].shape[1]
    ends = _Ends(model, DRAWN_TOKENS)
    for _ in range(0, draws, batch_size):
        # A round keeps a place for the target's own token: with one more, the last token compared can be a draft.
        options = {"max_new_tokens": DRAWN_TOKENS + 1, "return_dict_in_generate": True}
        output = model.generate(**inputs, **SAMPLING, **options, assistant_model=head)
        rows = output.sequences[:, width : width + DRAWN_TOKENS].tolist()
        drawn = zip(chosen, rows, _verified(output), strict=True)
        yield [Draw(index, tuple(row[: ends.length(row)]), verified) for index, row, verified in drawn]


def audit_sampling(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    drawn: list[Draw],
    batch_size: int = 8,
) -> SamplingAudit:
    """Test what [`draw`] gave against the target's exact distribution.

    Each token is tested given the tokens before it: among draws that begin alike, the next token is multinomial with
    the probabilities that plain `generate` samples from. The statistics of all beginnings add up, and so do their
    degrees of freedom.

    Raises:
        ValueError: when no token that a round commits is drawn often enough to be tested.
    """
    statistic, degrees, degrees_in_rounds = 0.0, 0, 0
    for index in sorted({one.prompt for one in drawn}):
        prompt = encode([prompts[index]], tokenizer, model.device)["input_ids"]
        for length in range(DRAWN_TOKENS):
            counts = _next_tokens([one.tokens for one in drawn if one.prompt == index], length)
            distributions = _distributions(model, prompt, list(counts), batch_size)
            for observed, p in zip(counts.values(), distributions, strict=True):
                more, cells = _chi_square(observed, p)
                statistic, degrees = statistic + more, degrees + cells - 1
                # The first token is the prefill's; the others are committed by rounds.
                degrees_in_rounds += cells - 1 if length else 0
    if not degrees_in_rounds:
        raise ValueError(
            f"{len(drawn)} draws test no token that a round commits: after no beginning are two next tokens expected "
            f"{SMALLEST_CELL} times. Raise --draws, or give other prompts."
        )
    halves = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    verified = sum(one.verified for one in drawn)
    return SamplingAudit(len(drawn), verified, statistic, degrees, torch.special.gammaincc(*halves).item())


def _next_tokens(drawn: list[tuple[int, ...]], length: int) -> dict[tuple[int, ...], Counter]:
    """How often each token follows each beginning of `length` tokens, for beginnings that can fill two cells."""
    counts = defaultdict(Counter)
    for tokens in drawn:
        if len(tokens) > length:
            counts[tokens[:length]][tokens[length]] += 1
    return {beginning: tokens for beginning, tokens in counts.items() if tokens.total() >= 2 * SMALLEST_CELL}


def _distributions(model, prompt: torch.Tensor, beginnings: list[tuple[int, ...]], size: int) -> Iterator[torch.Tensor]:
    """Probabilities [V] of the token after the prompt [1, P] and each beginning, as plain `generate` samples it."""
    for start in range(0, len(beginnings), size):
        chunk = torch.tensor(beginnings[start : start + size], dtype=torch.long, device=prompt.device)
        ids = torch.cat([prompt.expand(len(chunk), -1), chunk], dim=1)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **SAMPLING,
            max_new_tokens=1,
            output_scores=True,
            return_dict_in_generate=True,
        )
        yield from output.scores[0].double().softmax(dim=-1)


def _chi_square(observed: Counter, p: torch.Tensor) -> tuple[float, int]:
    """The statistic of the counts under probabilities p [V], and its number of cells; rare tokens share one."""
    count = torch.zeros_like(p)
    count[list(observed)] = torch.tensor(list(observed.values()), dtype=p.dtype, device=p.device)
    expected = observed.total() * p
    large = expected >= SMALLEST_CELL
    if not large.any():
        return 0.0, 1
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    count = torch.cat([count[large], count[~large].sum()[None]])
    if expected[-1] < SMALLEST_CELL:
        # Too few even together: they join the smallest of the others.
        order = expected[:-1].argsort(descending=True)
        expected = torch.cat([expected[order][:-1], (expected[order][-1] + expected[-1])[None]])
        count = torch.cat([count[order][:-1], (count[order][-1] + count[-1])[None]])
    return ((count - expected) ** 2 / expected).sum().item(), len(expected)


# -- Reports --------------------------------------------------------------------------------------------------------


def as_table(rows: list[CheckedRow], tokenizer: PreTrainedTokenizerBase) -> Table:
    """The prompts that differ, as people read them."""
    table = Table(title="rows that differ from plain decoding, from the first difference on")
    columns = ("prompt", "position", "plain", "dspark", "gap", "bound", "worst at", "worst gap", "its bound")
    for column in columns:
        table.add_column(column, justify="left" if column in ("plain", "dspark") else "right")
    for d in (row.difference for row in rows if row.difference is not None):
        tokens = [_token_cell(token, tokenizer) for token in (d.plain, d.ours)]
        worst = [str(d.worst_position), f"{d.worst_gap:.3g}", f"{d.worst_bound:.3g}"]
        table.add_row(str(d.prompt), str(d.position), *tokens, f"{d.gap:.3g}", f"{d.bound:.3g}", *worst)
    return table


def _token_cell(token: int | None, tokenizer: PreTrainedTokenizerBase) -> Text:
    return Text("ended" if token is None else f"{token} {tokenizer.decode([token])!r}")


def greedy_as_json(rows: list[CheckedRow]) -> dict:
    """The greedy audit as machines read it; an infinite gap is `None`."""
    differences = [asdict(row.difference) for row in rows if row.difference is not None]
    for fields in differences:
        for key in ("gap", "worst_gap"):
            fields[key] = fields[key] if math.isfinite(fields[key]) else None
    return {
        "verdict": verdict_of(rows),
        "prompts": len(rows),
        "tokens": sum(row.tokens for row in rows),
        "drafts_verified": sum(row.verified for row in rows),
        "plain_repeats": all(row.repeats for row in rows),
        "differences": differences,
    }


def sampling_as_json(audit: SamplingAudit) -> dict:
    """The sampling audit as machines read it."""
    return {"verdict": audit.verdict, **asdict(audit)}
