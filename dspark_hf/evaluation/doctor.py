"""Why a head accepts little: a pair is measured, its config is read otherwise, and what is wrong is named with the fix.

Text is right whatever a head drafts, so nothing fails where a key of its config is missing, where it was made for
another target, or where its own settings keep it from drafting. It only helps less, or not at all.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation.stats import LOW_TAU
from ..modeling_dspark import DSparkHead
from ..pairing import misfits
from ..scheduling.algorithm import survival
from ..scheduling.settings import HEAD_SETTINGS, Settings
from .acceptance import EvalRecord, Result, record_of, summarise
from .bench import MethodRun, run_method
from .doctor_comparison import differences, promised_by
from .doctor_trials import Alternative, Keys, KnownText, Trials, altered, alternatives
from .prompts import encode

FEWEST_PROMPTS = 5
NEW_TOKENS = 64
# Of the calls that warm up.
FIRST_TOKENS = 4
# An alternative explains a tau when it raises it by this factor. Among a hundred rounds a head that is a little worse,
# or another that is as good, can look better by a few per cent.
RAISES = 1.1
# A factor between what was promised and what was measured, from which on they contradict each other.
CONTRADICTS = 1.5


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a pair.

    name: of a config key, a setting or a fact. weight: the factor by which tau is lower than it could be, as measured
    with the fix or as promised; infinite where the head cannot draft at all. keys, tau: of the config with which the
    head drafts better, all earlier findings mended, and the tokens a round then; `None` where no key mends it.
    """

    name: str
    weight: float
    evidence: str
    fix: str
    keys: Keys | None = None
    tau: float | None = None


@dataclass(frozen=True)
class Measured:
    """A pair on prompts, with whole blocks drafted and verified.

    result: acceptance and calibration over all rounds. taus: of every prompt, tokens a round. seconds, plain_seconds:
    of one greedy call with all prompts, with the head and without. bytes, target_bytes: of the weights, tables that are
    shared counted with the target. promised: by position, the share of drafts kept that the head was published with, a
    mean over data sets; empty where it was not.
    """

    result: Result
    taus: list[float]
    seconds: float
    plain_seconds: float
    bytes: int
    target_bytes: int
    promised: list[float]


@dataclass(frozen=True)
class Diagnosis:
    """What was found: the findings, the heaviest first; what differs between target and head, a sentence each; and the
    measurement, `None` where the head cannot draft."""

    findings: list[Finding]
    notes: list[str] = field(default_factory=list)
    measured: Measured | None = None


def examine(
    model: PreTrainedModel,
    head: DSparkHead,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int = NEW_TOKENS,
    report: Callable[[str], None] = lambda text: None,
) -> Diagnosis:
    """Examine a pair.

    Args:
        report: told of every step.

    Raises:
        ValueError: for fewer than `FEWEST_PROMPTS` prompts, as acceptance differs by half between prompts; and where
            nothing is drafted.
    """
    if len(prompts) < FEWEST_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts say little about a head: give at least {FEWEST_PROMPTS}.")
    problems = misfits(head.config, model.config)
    if problems:
        fix = f"Load the head that was trained for this target ({type(model).__name__})."
        return Diagnosis([Finding("another target", math.inf, problem, fix) for problem in problems])
    promised = promised_by(head)
    report("decoding")
    texts, records, runs = _decode(model, head, tokenizer, prompts, max_new_tokens)
    result = summarise("prompts", records)
    longest = max(len(text.tokens) for text in texts)
    trials = Trials(model, [text for text in texts if len(text.tokens) > text.start + 1])
    found = list(_mended(head, trials, list(alternatives(head, model, tokenizer, longest)), report))
    found += _settings(head, records)
    if not found:
        found += _unexplained(head, result, promised)
    found.sort(key=lambda finding: -finding.weight)
    notes = differences(model, head, tokenizer, longest, promised)
    return Diagnosis(found, notes, _measured(model, head, result, records, runs, promised))


def _decode(
    model, head, tokenizer, prompts: list[str], max_new_tokens: int
) -> tuple[list[KnownText], list[EvalRecord], dict[str, MethodRun]]:
    """The prompts with their answers, the rounds of each, and the runs without and with the head."""
    inputs, runs = encode(prompts, tokenizer, model.device), {}
    # Room for the last round to be a whole one.
    limit = max_new_tokens + head.config.block_size + 1
    for method in ("plain", "whole"):
        run_method(method, model, head, inputs, FIRST_TOKENS, time.perf_counter)
        runs[method] = run_method(method, model, head, inputs, limit, time.perf_counter)
    texts, records, run = [], [], runs["whole"]
    if run.stats is None or not any(run.stats.verified):
        raise ValueError(
            "Nothing was drafted, so nothing can be said of the head: the answers are too short, or the target's "
            "generation_config has settings with which batches go without drafts (docs/features.md)."
        )
    for row, (ids, mask, new) in enumerate(
        zip(inputs["input_ids"], inputs["attention_mask"], run.outputs, strict=True)
    ):
        prompt = ids[mask.bool()]
        texts.append(KnownText(torch.cat([prompt, prompt.new_tensor(new)]), len(prompt)))
        has_confidence = head.confidence_head is not None
        records.append(record_of("prompts", row, len(new), run.stats, row, max_new_tokens, has_confidence))
    return texts, records, runs


def _measured(model, head, result: Result, records: list[EvalRecord], runs: dict[str, MethodRun], promised) -> Measured:
    kept = [[p["acceptance"] for p in one["positions"]] for one in promised["results"]] if promised else []
    return Measured(
        result,
        [float(np.mean(record.accepted or [1])) for record in records],
        runs["whole"].seconds,
        runs["plain"].seconds,
        head.get_memory_footprint(),
        model.get_memory_footprint(),
        [float(np.mean(column)) for column in zip(*kept, strict=False)],
    )


# -- Faults ---------------------------------------------------------------------------------------------------------


def _mended(
    head: DSparkHead, trials: Trials, others: list[Alternative], report: Callable[[str], None]
) -> Iterator[Finding]:
    """The alternatives that raise tau: the best one, then the best beside it, as long as there is any."""
    keys, tau = {}, trials.tau(head)
    while others:
        taus = []
        for index, other in enumerate(others):
            report(f"trying {index + 1} of {len(others)} alternatives")
            taus.append(trials.tau(altered(head, keys | other.keys)))
        best = int(np.argmax(taus))
        if taus[best] < RAISES * tau:
            return
        name, *also = others[best].keys
        value = others[best].keys[name]
        set_on = head.generation_config if name in HEAD_SETTINGS else head.config
        told = f"tau {tau:.2f} with {name}={getattr(set_on, name)!r}, {taus[best]:.2f} with {value!r}"
        if name in HEAD_SETTINGS:
            fix = f"Set `head.generation_config.{name} = {value!r}`, or correct its generation_config.json."
        else:
            fix = f"Load the head with `DSparkHead.from_pretrained(..., {_arguments(others[best].keys)})`"
            fix += ", or correct its config.json."
        keys = keys | others[best].keys
        yield Finding(name, taus[best] / tau, f"{told}: {others[best].why}.", fix, dict(keys), taus[best])
        # Other values of what is mended are answered with it.
        tau, others = taus[best], [other for other in others if not other.keys.keys() & others[best].keys.keys()]


def _arguments(keys: Keys) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in keys.items())


def _settings(head: DSparkHead, records: list[EvalRecord]) -> list[Finding]:
    """Where the head's own settings leave out drafts that would be kept."""
    settings = Settings.read(head.generation_config, head.config.gamma)
    rounds = [pair for record in records for pair in zip(record.accepted, record.kept, strict=True)]
    allowed = np.full(len(rounds), settings.most)
    given = [one for record in records for one in record.confidence]
    if settings.threshold is not None and given:
        confident = np.array([(survival(np.array(one)) >= settings.threshold).sum() for one in given])
        allowed = np.minimum(allowed, confident)
    whole, kept = np.array(rounds).T
    tau, limited = whole.mean(), (np.minimum(kept, allowed) + 1).mean()
    if tau < RAISES * limited:
        return []
    said = {"num_assistant_tokens": settings.most, "assistant_confidence_threshold": settings.threshold}
    told = ", ".join(f"{key}={value}" for key, value in said.items() if value is not None)
    evidence = (
        f"tau at most {limited:.2f} with {told} in the head's generation_config, {tau:.2f} with whole blocks of "
        f"{head.config.gamma} drafts."
    )
    fix = "Take them out of the head's generation_config.json; the load schedule chooses lengths by itself."
    return [Finding("draft settings", tau / limited, evidence, fix, tau=float(tau))]


def _unexplained(head: DSparkHead, result: Result, promised: dict | None) -> list[Finding]:
    """What no key mends."""
    tau, expected = result.accepted_length, _expected(result)
    trained_elsewhere = (
        "The head was trained for another model, or this one was fine-tuned or quantised since: load the target that "
        "it was trained for, or train it on (`dspark-hf train`)."
    )
    says = "" if expected is None else f", though its confidence head expects {expected:.2f}"
    if tau < LOW_TAU:
        evidence = f"tau {tau:.2f} of {head.config.gamma + 1}{says}; no other reading of its config raises it."
        return [Finding("hardly any draft is accepted", (head.config.gamma + 1) / tau, evidence, trained_elsewhere)]
    best = min((one["accepted_length"] for one in promised["results"]), default=0) if promised else 0
    if best > CONTRADICTS * tau:
        evidence = f"tau {tau:.2f}, but its eval_results.json says {best:.2f} and more, beside {promised['target']}."
        return [Finding("less than its card promises", best / tau, evidence, trained_elsewhere)]
    if expected is None or max(expected / tau, tau / expected) < CONTRADICTS:
        return []
    evidence = f"tau {tau:.2f}, but {expected:.2f} by its confidence head, which the load schedule goes by."
    fix = "Calibrate it on your prompts (`dspark-hf calibrate`)."
    if expected < tau:
        return [Finding("confidence too low", tau / expected, evidence, fix)]
    return [Finding("confidence too high", expected / tau, evidence, f"{fix} Or else: {trained_elsewhere}")]


def _expected(result: Result) -> float | None:
    """Tau as the confidence head expects it, `None` without one."""
    if any(position.survival is None for position in result.positions):
        return None
    return 1 + sum(position.survival * position.proposals for position in result.positions) / result.proposals
