"""The audit of losslessness: it passes the real decoding, and catches decodings that are wrong."""

import json
import math

import pytest
import torch
from conftest import tiny_head, tiny_target
from scipy.stats import chi2
from shares import rest_slow
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from dspark_hf.cli import app
from dspark_hf.evaluation.verify import (
    BROKEN,
    CONSISTENT,
    IDENTICAL,
    INCONCLUSIVE,
    ROUNDING,
    Draw,
    audit_greedy,
    audit_sampling,
    draw,
    verdict_of,
)
from dspark_hf.generation import round as steps
from dspark_hf.generation.acceptance import Verdict
from dspark_hf.generation.processors import BlockProcessors
from dspark_hf.generation.stopping import Stopping

VOCABULARY, NEW_TOKENS = 32, 24
PROMPTS = ["w1 w5 w9 w2", "w7 w7 w3", "w12 w4 w8 w11 w6 w2", "w20 w21", "w30 w1 w30"]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")


@pytest.fixture
def pair():
    """Sharp enough that the head's drafts matter, apart enough that many are rejected."""
    target = tiny_target(VOCABULARY, sharpness=2)
    return target, tiny_head(target)


@pytest.fixture
def options(pair, tokenizer, tmp_path) -> list[str]:
    """The pair in folders, as `dspark-hf verify` loads it."""
    target, head = pair
    for part, name in ((target, "target"), (tokenizer, "target"), (head, "head")):
        part.save_pretrained(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    names = {"--model": "target", "--head": "head", "--prompts": "prompts.txt", "--json": "findings.json"}
    return [word for option, name in names.items() for word in (option, str(tmp_path / name))]


def verify(options: list[str], *more: str) -> tuple[int, str, dict]:
    """Exit status, output, and what --json wrote."""
    arguments = ["verify", *options, "--max-new-tokens", str(NEW_TOKENS), *more]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert isinstance(result.exception, SystemExit | None), result.exception
    with open(options[-1]) as file:
        return result.exit_code, result.output, json.load(file)


def accept_all(target_logits, draft_tokens, *rest):
    """Acceptance that believes every draft; only the token behind them is the target's."""
    # Behind what drafts were sampled from, where they were, and before seeds.
    lengths = rest[min(1, len(rest) - 1)]
    return Verdict(lengths, target_logits[torch.arange(len(lengths)), lengths].argmax(-1))


def audit(pair, tokenizer, **kwargs):
    return list(audit_greedy(*pair, tokenizer, PROMPTS, **{"batch_size": 3, "max_new_tokens": NEW_TOKENS} | kwargs))


# -- Greedy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_a_lossless_pair_is_identical(options, batch_size):
    status, output, findings = verify(options, "--batch-size", batch_size)
    assert status == 0 and f"verdict: {IDENTICAL}" in output and "5 of 5 prompts identical" in output
    assert findings.pop("drafts_verified") > 5 * NEW_TOKENS
    assert findings == {
        "verdict": IDENTICAL,
        "prompts": 5,
        "tokens": 5 * NEW_TOKENS,
        "plain_repeats": True,
        "differences": [],
        "batch_size": int(batch_size),
        "dtype": "torch.float32",
    }


def test_limit(options):
    assert verify(options, "--limit", "2")[2]["prompts"] == 2


def test_accepting_every_draft_is_broken(options, monkeypatch):
    monkeypatch.setattr(steps, "accept_greedy", accept_all)
    status, output, findings = verify(options, "--batch-size", "2")
    assert status == 1 and f"verdict: {BROKEN}" in output and findings["verdict"] == BROKEN
    assert [difference["prompt"] for difference in findings["differences"]] == [0, 1, 2, 3, 4]
    assert max(d["worst_gap"] / d["worst_bound"] for d in findings["differences"]) > 1000


def test_gaps_are_those_of_separate_forward_passes(pair, tokenizer, monkeypatch):
    """What the table says about a difference, from the definition: one unpadded pass a prompt."""
    target, _ = pair
    plain = [row.difference for row in audit(pair, tokenizer)]
    monkeypatch.setattr(steps, "accept_greedy", accept_all)
    rows = audit(pair, tokenizer)
    assert plain == [None] * 5 and verdict_of(rows) == BROKEN
    for row in rows:
        d = row.difference
        prompt = tokenizer(PROMPTS[row.prompt], return_tensors="pt")["input_ids"]
        shared = target.generate(prompt, max_new_tokens=d.position + 1, do_sample=False)
        assert shared[0, -1] == d.plain != d.ours
        with torch.no_grad():
            logits = target(shared[:, :-1]).logits[0, -1]
        assert d.gap == pytest.approx((logits.max() - logits[d.ours]).item(), rel=1e-4)
        assert d.worst_gap >= d.gap and d.worst_position >= d.position


def prefer_odd_twin(target_logits, draft_tokens, lengths):
    """Correct acceptance, except that it takes the odd one of two twin tokens where plain's argmax takes the even."""
    choices = target_logits.argmax(dim=-1) | 1
    accepted = ((choices[:, :-1] == draft_tokens).cumprod(1).sum(1)).minimum(lengths)
    return Verdict(accepted, choices[torch.arange(len(choices)), accepted])


@pytest.mark.parametrize(
    ("distance", "verdict", "status"), [(0, ROUNDING, 0), (2**-22, ROUNDING, 0), (2**-18, BROKEN, 1)]
)
def test_near_ties(pair, options, monkeypatch, distance, verdict, status):
    """Tokens 2k and 2k + 1 have the same logits but for a relative distance: nothing, 2 roundings, 32."""
    target, _ = pair
    with torch.no_grad():
        target.lm_head.weight[1::2] = target.lm_head.weight[::2] * (1 - distance)
    target.save_pretrained(options[1])
    monkeypatch.setattr(steps, "accept_greedy", prefer_odd_twin)
    found, output, findings = verify(options)
    assert found == status and f"verdict: {verdict}" in output and findings["verdict"] == verdict
    for d in findings["differences"]:
        assert d["ours"] == d["plain"] + 1
        # At 2 roundings the two logits may be rounded to one number, or not.
        assert (d["gap"] == 0 or distance > 0) and (d["gap"] > 0 or status == 0)
        assert (d["worst_gap"] <= d["worst_bound"]) == (status == 0)


def test_a_later_error_is_broken_though_the_first_difference_is_a_tie(pair, tokenizer, monkeypatch):
    target, _ = pair
    with torch.no_grad():
        target.lm_head.weight[1::2] = target.lm_head.weight[::2]
    rounds = []

    def tie_then_error(logits, drafts, lengths):
        rounds.append(None)
        verdict = prefer_odd_twin(logits, drafts, lengths)
        return verdict if len(rounds) < 4 else Verdict(verdict.accepted, logits[:, 0].argmin(-1))

    monkeypatch.setattr(steps, "accept_greedy", tie_then_error)
    (row,) = list(audit_greedy(*pair, tokenizer, PROMPTS[:1], max_new_tokens=NEW_TOKENS))
    assert row.difference.gap == 0 < row.difference.worst_gap
    assert row.difference.worst_position > row.difference.position and verdict_of([row]) == BROKEN


@pytest.mark.slow
def test_bfloat16_is_never_broken(tokenizer):
    """Real rounding of real runs: deep enough that some rows leave plain's tokens."""
    verdicts = set()
    for seed in range(3):
        target = tiny_target(VOCABULARY, seed, num_hidden_layers=12).bfloat16()
        rows = audit((target, tiny_head(target).bfloat16()), tokenizer, batch_size=5, max_new_tokens=64)
        verdicts.add(verdict_of(rows))
    assert verdicts <= {IDENTICAL, ROUNDING} and ROUNDING in verdicts


def test_the_models_own_processors_count(pair, tokenizer, monkeypatch):
    """Gaps are those of the scores that plain decoding chooses from, not of the raw logits."""
    target, _ = pair
    target.generation_config.repetition_penalty = 1.5
    target.generation_config.suppress_tokens = [3, 4]
    assert verdict_of(audit(pair, tokenizer)) == IDENTICAL
    monkeypatch.setattr(BlockProcessors, "__call__", lambda self, logits, *_: logits)
    rows = audit(pair, tokenizer)
    assert verdict_of(rows) == BROKEN
    # A forbidden token is infinitely far behind.
    assert any(math.isinf(row.difference.worst_gap) for row in rows if row.difference)


@pytest.mark.parametrize("fault", rest_slow(["early", "late"], quick=["early"]))
def test_a_wrong_end_is_broken(pair, options, monkeypatch, fault):
    """Every token is the target's own, but the row stops before its end or goes on after it."""
    target, _ = pair
    eos = target.generate(torch.tensor([[1, 5, 9, 2]]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, -8].item()
    target.generation_config.eos_token_id = eos
    target.save_pretrained(options[1])
    assert verify(options, "--batch-size", "1")[0] == 0
    kept = Stopping.kept

    def wrongly(self, committed, length, sequence, device):
        if fault == "late":
            self.eos_ids = set()
            return kept(self, committed, length, sequence, device)
        tokens, ended = kept(self, committed, length, sequence, device)
        return tokens, ended or length > 10

    monkeypatch.setattr(Stopping, "kept", wrongly)
    status, output, findings = verify(options, "--batch-size", "1")
    assert status == 1 and findings["verdict"] == BROKEN
    d = findings["differences"][0]
    assert d["gap"] is None and (d["ours"] is None) == (fault == "early") and "inf" in output


def test_nothing_drafted_is_inconclusive(options):
    """A limit of one token is the prefill's."""
    status, output, findings = verify(options, "--max-new-tokens", "1")
    assert status == 1 and findings["verdict"] == INCONCLUSIVE and f"verdict: {INCONCLUSIVE}" in output
    assert findings["drafts_verified"] == 0 and findings["differences"] == []


def unsteady(target) -> None:
    """In its second and third pass over a prompt the target prefers another token, as one whose sums vary."""
    prompts = []

    def count(model, args, kwargs):
        prompts.extend([None] * (kwargs["input_ids"].shape[1] > 10))

    target.register_forward_pre_hook(count, with_kwargs=True)
    prefers = torch.eye(VOCABULARY)[7]
    target.lm_head.register_forward_hook(
        lambda module, args, logits: logits + 1000.0 * (len(prompts) in (2, 3)) * prefers
    )


def test_what_plain_does_not_repeat_is_inconclusive(pair, tokenizer):
    prompts = ["w1 w5 w9 w2 w1 w5 w9 w2 w1 w5 w9 w2"]
    unsteady(pair[0])
    [row] = audit_greedy(*pair, tokenizer, prompts, max_new_tokens=NEW_TOKENS)
    assert not row.repeats and row.verified and not row.difference.within_rounding
    assert verdict_of([row]) == INCONCLUSIVE


# -- Sampling -------------------------------------------------------------------------------------------------------


def test_sampling_is_consistent(options):
    status, output, findings = verify(options, "--sampling", "--batch-size", "100", "--draws", "1950")
    assert status == 0 and f"verdict: {CONSISTENT}" in output and "p = " in output
    assert findings["draws"] == 2000 and findings["p_value"] > 1e-4
    assert findings["p_value"] == pytest.approx(chi2.sf(findings["statistic"], findings["degrees_of_freedom"]))
    assert findings["degrees_of_freedom"] > 40 and findings["verified"] > 1000


def test_samples_without_drafts_are_inconclusive(pair, tokenizer):
    """Draws of plain decoding are the target's, and say nothing of the head."""
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"].expand(500, -1)
    new = pair[0].generate(ids, do_sample=True, top_k=0, max_new_tokens=3)[:, ids.shape[1] :].tolist()
    drawn = [Draw(0, tuple(tokens)) for tokens in new]
    assert audit_sampling(pair[0], tokenizer, PROMPTS, drawn, batch_size=100).verdict == INCONCLUSIVE


def test_accepting_every_sampled_draft_is_broken(options, monkeypatch):
    monkeypatch.setattr(steps, "accept_sampled", accept_all)
    status, output, findings = verify(options, "--sampling", "--batch-size", "100")
    assert status == 1 and f"verdict: {BROKEN}" in output and findings["p_value"] < 1e-6


def test_too_few_draws_are_refused(options):
    result = CliRunner().invoke(app, ["verify", *options, "--sampling", "--draws", "8"])
    assert isinstance(result.exception, ValueError) and "8 draws" in str(result.exception)
    assert "--draws" in str(result.exception)


def test_sampling_ends_at_eos_and_keeps_the_models_own_processors(pair, tokenizer):
    target, _ = pair
    target.generation_config.eos_token_id = [9, 11]
    target.generation_config.repetition_penalty = 1.3
    drawn = sum(draw(*pair, tokenizer, PROMPTS, batch_size=100), [])
    assert {len(one.tokens) for one in drawn} == {1, 2, 3}
    assert all(one.tokens[-1] in (9, 11) for one in drawn if len(one.tokens) < 3)
    assert audit_sampling(target, tokenizer, PROMPTS, drawn, batch_size=100).p_value > 1e-4
    target.generation_config.repetition_penalty = 1.0
    assert audit_sampling(target, tokenizer, PROMPTS, drawn, batch_size=100).verdict == BROKEN


def test_p_values_of_true_draws_are_uniform(pair, tokenizer):
    """Draws from plain sampling: the audit's p-values are neither too small nor too large."""
    target, _ = pair
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"].expand(500, -1)
    values = []
    for _ in range(20):
        new = target.generate(ids, do_sample=True, top_k=0, max_new_tokens=3)[:, ids.shape[1] :].tolist()
        drawn = [Draw(0, tuple(tokens)) for tokens in new]
        values.append(audit_sampling(target, tokenizer, PROMPTS, drawn, batch_size=100).p_value)
    assert min(values) > 1e-4 and 0.25 < sum(values) / len(values) < 0.75
