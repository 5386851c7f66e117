"""Every kind of head trains: what training computes is what decoding drafts, and what is learnt is accepted."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import biases, losses_of_logits, tiny_head, tiny_target
from test_heads import gemma
from test_hybrids import build as hybrid

from dspark_hf import DSparkConfig, DSparkHead
from dspark_hf.generation.drafting import Drafter
from dspark_hf.generation.target import Target
from dspark_hf.training import blocks, step
from dspark_hf.training.blocks import NO_LABEL, Blocks, attention_masks, labels_and_weights
from dspark_hf.training.check import check
from dspark_hf.training.data import collate
from dspark_hf.training.draft_vocabulary import most_frequent
from dspark_hf.training.heads import fresh_head, head_from, read_keys
from dspark_hf.training.losses import dspark_losses
from dspark_hf.training.packing import check_packing, pack
from dspark_hf.training.step import target_states, training_step

SLIDING = {"layer_types": ["sliding_attention"], "sliding_window": 4}
UNMIXED = {"markov_rank": 0}
KINDS = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "no anchor": {"sample_from_anchor": False},
    "no anchor, rnn": {"sample_from_anchor": False, "markov_head_type": "rnn"},
    "dflash": {"sample_from_anchor": False, "enable_confidence_head": False} | UNMIXED,
    "parallel": UNMIXED,
    "unsure": {"confidence_head_with_markov": False},
    "sliding": SLIDING,
    "sliding, from the block": SLIDING | {"window_counted_from": "block"},
    "sliding, both ways": SLIDING | {"sliding_is_causal": False},
    "mixed": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3},
    "reduced": {"draft_vocab_size": 12},
    "reduced, no anchor": {"draft_vocab_size": 12, "sample_from_anchor": False},
}
TEXT = [[3, 7, 5, 1, 9, 9, 4, 11, 1, 8, 6, 2, 10, 5, 3, 7]]


def plain_task():
    """A target and sequences that it wrote itself."""
    target = tiny_target(vocab_size=24, sharpness=4)
    sequences = target.generate(input_ids=torch.randint(1, 23, (48, 6)), max_new_tokens=26, do_sample=False)
    return target, [{"input_ids": ids, "loss_mask": [0] * 6 + [1] * 26} for ids in sequences.tolist()]


@functools.cache
def task():
    torch.manual_seed(0)
    return plain_task()


def head_of(target, kind: dict, **kwargs) -> DSparkHead:
    head = tiny_head(target, **kind | kwargs)
    if head.config.draft_vocab_size:
        with torch.no_grad():
            head.d2t.copy_(torch.arange(len(head.d2t)))  # every other token
    return head


@torch.no_grad()
def check_alignment(target, head):
    """Blocks of a known text, as training computes them at all anchors at once, against a drafter that reads the text
    up to one of them; and the labels, against the text."""
    ids = torch.tensor(TEXT)
    anchors = torch.tensor([[4, 7, 11]])
    features, last = target_states(target, ids, head.config.target_layer_ids)
    masks = attention_masks(Blocks(anchors, anchors > 0), ids.shape[1], head.mask_rules, head.config.block_size)
    hidden, logits, confidence = head(ids, features, anchors, masks, head.share_embeddings(target))
    labels, _ = labels_and_weights(ids, torch.ones_like(ids), Blocks(anchors, anchors > 0), head.config.gamma)
    for i, anchor in enumerate(anchors[0].tolist()):
        drafter = Drafter(head, target, 1)
        drafter.append(features[:, :anchor], [anchor])
        drafted = drafter._hidden(ids[:, anchor], None, *drafter.take(None))
        predicting = drafted[:, -head.config.gamma :]
        torch.testing.assert_close(hidden[:, i], predicting, atol=1e-5, rtol=1e-4)
        # The next tokens of the text stand for drafts: the chain of the decoder is led along them.
        follows = ids[0, anchor + 1 : anchor + 1 + head.config.gamma].tolist()
        seen = []

        def sampler(given, follows=follows, seen=seen):
            seen.append(given)
            return torch.tensor([follows[len(seen) - 1]]), given

        block = head.sample_block(drafted, ids[:, anchor], drafter.embeddings, len(follows), sampler)
        ours = head.in_target_vocabulary(logits[:, i], drafter.embeddings)[0, : len(follows)]
        torch.testing.assert_close(torch.cat(seen), ours, atol=1e-4, rtol=1e-4)
        if confidence is not None:
            torch.testing.assert_close(block.confidence_logits, confidence[:, i, : len(follows)], atol=1e-4, rtol=1e-4)
        assert labels[0, i, : len(follows)].tolist() == follows


@pytest.mark.parametrize("name", KINDS)
def test_training_computes_what_is_drafted(name):
    target, _ = task()
    check_alignment(target, head_of(target, KINDS[name]))


def gemma_head(target, **kwargs):
    return tiny_head(target, backbone="gemma4", num_hidden_layers=2, **kwargs)


def test_training_computes_what_a_gemma_head_drafts():
    """Scaled embedding, capped logits, keys as values."""
    target = gemma(False, vocab_size=24)
    head = gemma_head(target)
    assert head.config.final_logit_softcapping == 30 and head.config.embedding_scale == 32**0.5
    assert head.config.attention_k_eq_v and head.config.head_dim == 16 and head.config.num_key_value_heads == 1
    check_alignment(target, head)


@pytest.mark.parametrize("name", ["gated", "rnn", "no anchor", "dflash", "sliding", "mixed", "reduced"])
@pytest.mark.slow
def test_every_kind_learns_by_heart(name):
    target, rows = task()
    found = check(head_of(target, KINDS[name]), target, rows)
    assert found.passed, str(found)


def test_a_kind_learns_by_heart():
    target, rows = task()
    found = check(head_of(target, KINDS["no anchor, rnn"]), target, rows)
    assert found.passed and found.steps <= 100, str(found)


@pytest.mark.parametrize("what", ["labels", "states", "context"])
def test_broken_alignment_is_seen(what, monkeypatch):
    """Labels one token late, target states one early, or an anchor whose own state is shown: the check fails."""
    target, rows = task()
    if what == "labels":

        def late(input_ids, *args):
            return labels_and_weights(input_ids.roll(-1, dims=1), *args)

        monkeypatch.setattr(step, "labels_and_weights", late)
    elif what == "states":
        original = step.dspark_losses

        def early(made_of, logits, aligned, *args):
            return original(made_of, logits, aligned.roll(1, dims=2), *args)

        monkeypatch.setattr(step, "dspark_losses", early)
        monkeypatch.setattr("dspark_hf.training.check.CE_WEIGHT", 0.0)
    else:

        def shows_too_much(found, *args):
            return attention_masks(Blocks((found.anchors + 4).clamp(max=30), found.keep), *args)

        monkeypatch.setattr(step, "attention_masks", shows_too_much)
    monkeypatch.setattr("dspark_hf.training.check.STEPS", 100)
    found = check(head_of(target, {}), target, rows)
    assert not found.passed and "check failed" in str(found), str(found)


# -- Losses --------------------------------------------------------------------------------------------------------


def loss_inputs(dtype=torch.float32):
    made = [torch.randn(2, 3, 4, 6, dtype=dtype, requires_grad=True) for _ in range(2)]
    weights = [torch.randn(20, 6, dtype=dtype, requires_grad=True) for _ in range(2)]
    supervised = torch.rand(2, 3, 4) < 0.7
    return made, weights, torch.randn(2, 3, 4, 20), torch.randint(0, 20, (2, 3, 4)), supervised


def test_losses_by_chunk_are_those_of_the_formula():
    """Values and all gradients, written out in one piece here."""
    (a, b), (wa, wb), goal, labels, supervised = loss_inputs()
    confidence = torch.randn(2, 3, 4, requires_grad=True)
    every = [a, b, wa, wb, confidence]
    weights = torch.exp(-torch.arange(4) / 4.0).expand(2, 3, 4) * supervised
    logits = a @ wa.T + b @ wb.T
    distance = (logits.softmax(-1) - goal.softmax(-1)).abs().sum(-1)
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view_as(distance)
    accepted = 1 - 0.5 * distance.detach()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(confidence, accepted, reduction="none")
    expected = sum(((0.1 * ce + 0.9 * distance + bce) * weights).flatten()) / (weights.sum() + 1e-6)
    gradients = torch.autograd.grad(expected, every)

    for rows in (1, 5, None):
        losses = dspark_losses(
            [a, b],
            lambda x, y: x @ wa.T + y @ wb.T,
            goal,
            lambda x: x,
            confidence,
            labels,
            supervised,
            parameters=[wa, wb],
            rows_at_once=rows,
        )
        torch.testing.assert_close(losses.total, expected)
        assert losses.weight.item() == pytest.approx(weights.sum().item())
        found = torch.autograd.grad(losses.total, every, retain_graph=True)
        for ours, theirs in zip(found, gradients, strict=True):
            torch.testing.assert_close(ours, theirs)
        # Some other multiple of the losses, as accumulation and loss scales ask for.
        (again,) = torch.autograd.grad(3 * losses.total, [wa])
        torch.testing.assert_close(again, 3 * gradients[2])


def test_logits_are_made_some_rows_at_a_time(monkeypatch):
    """Of the head and of the target; the gradients are the same."""
    target, rows = task()
    head, batch, made = head_of(target, {}).train(), collate(rows[:4]), []
    embeddings = head.share_embeddings(target)
    hook = target.lm_head.register_forward_hook(lambda *args: made.append(args[-1].shape[:-1].numel()))
    states = target_states(target, batch["input_ids"], head.config.target_layer_ids)
    gradients = []
    for rows_at_once in (1000, 10):
        monkeypatch.setattr(step, "CHUNK", rows_at_once * target.config.vocab_size)
        made.clear()
        head.zero_grad()
        generator = torch.Generator().manual_seed(0)
        training_step(head, target, embeddings, batch, 8, generator, states=states).total.backward()
        gradients.append({name: p.grad.clone() for name, p in head.named_parameters()})
        # Both ends of all rows: the head's logits and the target's.
        assert max(made) == min(rows_at_once, sum(made) // 2) and sum(made) > 200
    hook.remove()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6, rtol=1e-4, msg=name)


def test_losses_in_bfloat16_autocast():
    """The chunks share the weights that autocast has cast once."""
    target, rows = task()
    head, batch = head_of(target, {}).train(), collate(rows[:4])
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses = training_step(
                head, target, head.share_embeddings(target), batch, 8, torch.Generator().manual_seed(0)
            )
        losses.total.backward()
        found.append((losses.total.item(), head.markov_head.markov_w2.weight.grad.clone()))
        head.zero_grad()
    assert found[1][0] == pytest.approx(found[0][0], rel=0.02)
    assert torch.nn.functional.cosine_similarity(found[0][1].flatten(), found[1][1].flatten(), dim=0) > 0.99


@pytest.mark.slow
def test_memory_of_a_step():
    """512 blocks of 7 rows, 151,936 tokens, float32: forward, backward and AdamW, in a process of their own."""
    script = Path(__file__).parents[1] / "benchmarks" / "train_memory.py"
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    *_, peak = re.findall(r"peak ([\d.]+) GiB", found)
    assert 0 < float(peak) < 4, found


# -- Reduced draft vocabularies ------------------------------------------------------------------------------------


def test_the_draft_vocabulary_is_what_is_supervised_most():
    rows = [{"input_ids": [9, 9, 9, 9, 5, 5, 3, 7], "loss_mask": [0, 0, 0, 0, 1, 1, 1, 1]}]
    assert most_frequent(rows, 2, 10).tolist() == [3, 5]  # 3 and 7 as often: the lower one
    assert most_frequent(rows, 5, 10).tolist() == [0, 1, 3, 5, 7]
    for size in (0, 10):
        with pytest.raises(ValueError, match=f"1 to 9.*got {size}"):
            most_frequent(rows, size, 10)


def test_a_reduced_head_has_its_targets_rows(tmp_path):
    """Its distribution over the draft vocabulary is the target's logits of these tokens; also saved and read, and in
    speculators' layout."""
    target, rows = task()
    head, said = fresh_head(target, rows, block_size=4, num_hidden_layers=1, markov_rank=8, draft_vocab_size=9)
    drafted = most_frequent(rows, 9, 24)
    assert head.draft_tokens.tolist() == drafted.tolist() and "of 9" in said
    hidden = torch.randn(3, 32)
    head.save_pretrained(tmp_path / "own")
    from dspark_hf.checkpoints.export import export

    export(head, "speculators", tmp_path / "theirs", target)
    for each in (head, *(DSparkHead.from_pretrained(tmp_path / name) for name in ("own", "theirs"))):
        found = each.base_logits(hidden, each.share_embeddings(target))
        torch.testing.assert_close(found, target.lm_head(hidden)[:, drafted])


def test_what_lies_outside_is_distance():
    """The confidence is taught the acceptance of drafts, to which all of the target's distribution counts."""
    draft, goal = torch.randn(1, 1, 1, 3), torch.randn(1, 1, 1, 5)
    tokens, supervised = torch.tensor([0, 2, 3]), torch.ones(1, 1, 1, dtype=torch.bool)
    q, p = torch.zeros(5), goal[0, 0, 0].softmax(-1)
    q[tokens] = draft[0, 0, 0].softmax(-1)
    for label in (2, NO_LABEL):
        labels = torch.full((1, 1, 1), label)
        losses = losses_of_logits(draft, goal, None, labels, supervised, draft_tokens=tokens)
        assert losses.l1.item() == pytest.approx((q - p).abs().sum().item(), rel=1e-5)
        assert (losses.ce.item() == 0) == (label == NO_LABEL)


def test_rows_behind_a_label_that_cannot_be_drafted_do_not_count():
    ids = torch.tensor([[1, 2, 5, 3, 4]])
    drafted = torch.tensor([0, 1, 2, 3, 4, NO_LABEL])
    anchors = Blocks(torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool))
    labels, supervised = labels_and_weights(ids, torch.ones_like(ids), anchors, 3, drafted=drafted)
    assert labels[0].tolist() == [[2, NO_LABEL, 3], [NO_LABEL, 3, 4]]
    assert supervised[0].tolist() == [[True, True, False], [True, False, False]]


def test_a_scaled_target_lends_its_logits():
    """Its rows alone do not say what it samples from."""
    from test_targets import GROUPED, SIZES

    config = transformers.GraniteConfig(**SIZES | GROUPED | {"logits_scaling": 8.0})
    target = transformers.GraniteForCausalLM(config).eval()
    rows = [{"input_ids": [1, 2, 3, 4], "loss_mask": [1] * 4}]
    head, _ = fresh_head(target, rows, num_hidden_layers=1, markov_rank=8, draft_vocab_size=9)
    hidden = torch.randn(3, 32)
    found = head.base_logits(hidden, head.share_embeddings(target))
    torch.testing.assert_close(found, target.lm_head(hidden)[:, head.draft_tokens] / 8)


# -- Packing -------------------------------------------------------------------------------------------------------

SHORT = [[3, 7, 5, 1, 9, 9, 4, 11, 1], [8, 6, 2, 10, 5], [3, 7, 7, 2, 4, 12, 9], [5, 1, 13]]


def short_rows():
    return [{"input_ids": ids, "loss_mask": [0] + [1] * (len(ids) - 1)} for ids in SHORT]


def test_rows_are_packed_whole():
    packed = pack(short_rows(), 12)
    assert [len(row["input_ids"]) for row in packed] == [12, 12]
    assert packed[0]["input_ids"] == SHORT[0] + SHORT[3] and packed[0]["positions"] == [*range(9), *range(3)]
    assert packed[1]["loss_mask"] == [0, *[1] * 6, 0, *[1] * 4]
    assert pack(short_rows(), 9)[0].keys() == packed[0].keys()


@pytest.mark.parametrize("name", ["vanilla", "sliding", "no anchor, rnn"])
def test_packed_rows_do_not_see_each_other(name, monkeypatch):
    """Losses and gradients of a packed batch are those of its documents, each alone."""
    target, _ = task()
    head = head_of(target, KINDS[name]).train()
    embeddings = head.share_embeddings(target)

    def everywhere(loss_mask, count, generator=None, documents=None):
        return blocks.sample_blocks(loss_mask, loss_mask.shape[1], generator, documents)

    monkeypatch.setattr(step, "sample_blocks", everywhere)
    found = []
    for rows in (pack(short_rows(), 17), short_rows()):
        head.zero_grad()
        total, weight = 0.0, 0.0
        for row in [rows] if "positions" in rows[0] else [[row] for row in rows]:
            losses = training_step(head, target, embeddings, collate(row), 99, torch.Generator())
            total, weight = total + losses.total * losses.weight, weight + losses.weight
        total.backward()
        found.append((total / weight, {name: p.grad.clone() for name, p in head.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    for key, expected in found[1][1].items():
        torch.testing.assert_close(found[0][1][key], expected, atol=1e-4, rtol=1e-3, msg=key)


def test_what_target_takes_packed_rows():
    check_packing(task()[0])
    check_packing(gemma(False))
    for family in ("qwen3.5", "lfm2"):
        with pytest.raises(ValueError, match="cannot be packed for .*Train without --pack"):
            check_packing(hybrid(family))


# -- Targets -------------------------------------------------------------------------------------------------------


def check_target(target):
    """The states that a head is taught with are those that it is fed in decoding, and give the target's logits; a step
    gives gradients to all that learns."""
    torch.manual_seed(0)
    head = tiny_head(target).train()
    ids = torch.randint(1, 23, (1, 14))
    features, last = target_states(target, ids, head.config.target_layer_ids)
    runner = Target(target, head.config.target_layer_ids)
    with torch.no_grad():
        passed = runner.forward(ids, runner.new_cache(1))
    torch.testing.assert_close(features, passed.features, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(step.target_logits(target)(last), passed.logits, atol=1e-4, rtol=1e-4)
    batch = {"input_ids": ids, "loss_mask": torch.ones_like(ids)}
    losses = training_step(head, target, head.share_embeddings(target), batch, 8, torch.Generator())
    losses.total.backward()
    assert losses.total.isfinite() and all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3-next", "lfm2", "falcon-h1", "granite-hybrid", "nemotron-h"])
def test_hybrid_targets(family):
    check_target(hybrid(family))


def test_a_dense_head_for_deepseek_v4():
    test_compressed = pytest.importorskip("test_compressed")
    check_target(test_compressed.tiny_v4())


def test_stages_of_deepseek_v4_train():
    test_compressed = pytest.importorskip("test_compressed")
    target = test_compressed.tiny_v4()
    head = test_compressed.head_for(target).train()
    ids = torch.randint(1, 23, (1, 14))
    batch = {"input_ids": ids, "loss_mask": torch.ones_like(ids)}
    losses = training_step(head, target, head.share_embeddings(target), batch, 8, torch.Generator())
    losses.total.backward()
    assert losses.total.isfinite() and head.fc.weight.grad.abs().sum() > 0


# -- Beginnings ----------------------------------------------------------------------------------------------------


def test_a_head_for_the_target_goes_on():
    target, rows = task()
    head = tiny_head(target)
    assert head_from(head, target, rows) == (head, "")


@pytest.mark.parametrize("fields", [{"vocab_size": 32}, {"num_hidden_layers": 5}])
def test_a_head_of_another_target_lends_what_fits(fields):
    target, rows = task()
    other = tiny_head(tiny_target(**{"vocab_size": 24} | fields), **KINDS["no anchor, rnn"], intermediate_size=48)
    head, said = head_from(other, target, rows)
    assert (head.config.sample_from_anchor, head.config.markov_head_type, head.config.block_size) == (False, "rnn", 4)
    assert head.config.vocab_size == 24 and head.config.num_target_layers == 3
    assert torch.equal(head.layers[0].mlp.up_proj.weight, other.layers[0].mlp.up_proj.weight)
    if "vocab_size" not in fields:
        assert torch.equal(head.markov_head.markov_w1.weight, other.markov_head.markov_w1.weight)
    assert "one for another target" in said and "%" in said
    training_step(head, target, head.share_embeddings(target), collate(rows[:2]), 4, torch.Generator()).total.backward()


def test_keys_of_a_config(tmp_path):
    path = tmp_path / "keys.json"
    path.write_text('{"sample_from_anchor": false}')
    assert read_keys(str(path)) == read_keys('{"sample_from_anchor": false}') == {"sample_from_anchor": False}
    for given, named in (("{no}", "is no JSON"), ('{"window": 3}', "a head has no window")):
        with pytest.raises(ValueError, match=named):
            read_keys(given)


DOCUMENT = Path(__file__).parents[1] / "docs" / "training_kinds.md"


@pytest.mark.parametrize("given", re.findall("--config '([^']+)'", DOCUMENT.read_text()))
def test_configs_of_the_document(given):
    keys = read_keys(given)
    target = gemma(False, vocab_size=24) if keys.get("backbone") == "gemma4" else task()[0]
    if "draft_vocab_size" in keys:
        keys["draft_vocab_size"] = 9
    head, _ = fresh_head(target, task()[1], num_hidden_layers=2, markov_rank=8, **keys)
    assert all(getattr(head.config, key) == value for key, value in keys.items())


def test_sequential_heads_of_blocks():
    """The recurrence over whole blocks is that of single steps."""
    head = DSparkHead(DSparkConfig.from_target(task()[0].config, markov_rank=8, markov_head_type="rnn"))
    hidden, previous = torch.randn(2, 3, 4, 32), torch.randint(0, 24, (2, 3, 4))
    sequential, state, found = head.markov_head, torch.zeros(2, 3, 8), []
    for k in range(4):
        bias, state = sequential.step(hidden[..., k, :], sequential.embed(previous[..., k]), state)
        found.append(bias)
    torch.testing.assert_close(biases(head, hidden, previous), torch.stack(found, dim=-2))
