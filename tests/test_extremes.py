"""At the ends of things: heads that are always right or always wrong, numbers that are none, the last position, names
that must be copied letter by letter, and heads that are of no use."""

import pytest
import torch
from conftest import tiny_head, tiny_target, whole_blocks
from shares import rest_slow
from test_batching import config, results
from test_compiled import static
from test_sampling import draw, exact_distribution, p_value
from transformers import GenerationConfig, TorchAoConfig

import dspark_hf
from dspark_hf import DSparkHead
from dspark_hf.embedded import FOLDER
from dspark_hf.evaluation.bench import bench, cells_of, estimate
from dspark_hf.generation import observers
from dspark_hf.generation.drafting import Drafter
from dspark_hf.modeling_dspark import DraftBlock


def batch(rows: int, length: int = 6, vocabulary: int = 40) -> dict:
    ids = torch.randint(1, vocabulary, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}


# -- Right or wrong every time --------------------------------------------------------------------------------------


def drafts_that_follow(text: torch.Tensor, monkeypatch, wrong: bool) -> None:
    """The drafter drafts the text [R, n] itself behind each anchor, or never a token of it."""
    draft = Drafter.draft

    def known(self, anchors, length, sampler, rows=None):
        block = draft(self, anchors, length, sampler, rows)
        lines = range(len(self.cache.lengths)) if rows is None else rows
        starts = torch.tensor([self.cache.lengths[row] + 1 for row in lines])[:, None]
        places = (starts + torch.arange(length)).clamp(max=text.shape[1] - 1)
        tokens = text[list(lines)].gather(1, places)
        return DraftBlock((tokens + 1) % 40 if wrong else tokens, block.logits, block.confidence_logits)

    monkeypatch.setattr(Drafter, "draft", known)


@pytest.mark.parametrize(("wrong", "new"), [(False, 421), (True, 106)])
def test_thousands_of_rounds_that_are_all_right_or_all_wrong(wrong, new, monkeypatch):
    target = tiny_target(vocab_size=40, sharpness=3, max_position_embeddings=512)
    head, kwargs = tiny_head(target), batch(24) | {"max_new_tokens": new}
    plain = target.generate(**kwargs)
    drafts_that_follow(plain, monkeypatch, wrong)
    output = target.generate(**kwargs, assistant_model=head, return_dict_in_generate=True)
    assert torch.equal(output.sequences, plain)
    lengths = output.dspark.committed_lengths
    assert sum(map(len, lengths)) >= 2000
    assert {length for row in lengths for length in row} == ({1} if wrong else {head.config.gamma + 1})


# -- Letter by letter -----------------------------------------------------------------------------------------------

NAMES = ["qXv7_raTlumbe_39kd", "unsigned_frobnicator_0x5EaD", "zz9PluralZalpha_getterFactory", "_a1b2c3d4e5f6g7h8"]


@pytest.fixture(scope="module")
def pair():
    model, head, tokenizer = dspark_hf.embedded_pair(torch.float32)
    return model, whole_blocks(head), tokenizer


@pytest.fixture(scope="module")
def code(pair):
    """Beginnings full of long random names, and what plain decoding makes of them."""
    model, _, tokenizer = pair
    texts = [
        f"def {a}({b}, {c}):\n    {d} = {b} + {c}\n    {a}_{d} = {d}.{c}({b})\n    return {a}_{d}\n\n\ndef {a}_{c}():\n"
        for a, b, c, d in (NAMES, NAMES[::-1], NAMES[2:] + NAMES[:2])
    ]
    tokenizer.padding_side = "left"
    inputs = tokenizer(texts, return_tensors="pt", padding=True) | {"max_new_tokens": 40, "do_sample": False}
    return inputs, model.generate(**inputs)


@pytest.mark.parametrize("length", rest_slow(range(1, 8), quick=(1, 4, 7)))
def test_names_are_written_as_in_plain_at_every_draft_length(length, pair, code):
    model, head, _ = pair
    inputs, plain = code
    output = model.generate(**inputs, assistant_model=head, num_assistant_tokens=length, return_dict_in_generate=True)
    assert torch.equal(output.sequences, plain)
    assert max(map(max, output.dspark.drafted_lengths)) == length


@pytest.mark.parametrize("length", rest_slow(range(1, 9), quick=(1, 5, 8)))
def test_names_that_recur_at_every_length_of_a_block_of_8(length):
    target = tiny_target(vocab_size=40, sharpness=3)
    head, names = tiny_head(target, block_size=8), torch.randint(1, 40, (3, 12))
    ids = torch.cat([names, names.flip(0), names, names[:, :5]], dim=1)
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False}
    ours = target.generate(**kwargs, assistant_model=head, num_assistant_tokens=length)
    assert torch.equal(ours, target.generate(**kwargs))


# -- No numbers -----------------------------------------------------------------------------------------------------


def spoil(module, row: int) -> None:
    """Makes the output of a module, [R, ...], no number in one row."""

    def with_nan(module, args, output):
        output = output.clone()
        if len(output) > row:
            output[row] = torch.nan
        return output

    module.register_forward_hook(with_nan)


@pytest.mark.parametrize("head_type", ["vanilla", "rnn"])
def test_a_head_whose_states_are_no_numbers_in_one_row(head_type):
    """Its drafts there are never accepted, whatever token they are; nothing else changes."""
    target = tiny_target(vocab_size=40, sharpness=3)
    head, kwargs = tiny_head(target, markov_head_type=head_type), batch(3) | {"max_new_tokens": 40}
    plain = target.generate(**kwargs)
    without = target.generate(**kwargs, assistant_model=head, return_dict_in_generate=True).dspark
    spoil(head.norm, 1)
    output = target.generate(**kwargs, assistant_model=head, return_dict_in_generate=True)
    assert torch.equal(output.sequences, plain)
    assert [output.dspark.committed_lengths[row] for row in (0, 2)] == [without.committed_lengths[r] for r in (0, 2)]


def test_samples_of_a_head_whose_states_are_no_numbers_in_one_row():
    target = tiny_target(vocab_size=40)
    head, kwargs = tiny_head(target), batch(3) | {"max_new_tokens": 40, "do_sample": True, "top_k": 0}
    spoil(head.norm, 1)
    output = target.generate(**kwargs, assistant_model=head, return_dict_in_generate=True)
    assert output.sequences.min() >= 0 and output.sequences.max() < 40
    # Later rounds may have the row in another place.
    stats = output.dspark
    assert {c for drafts in stats.confidence[1][:8] for c in drafts} == {0.0}
    assert len(stats.draft_tokens[1]) > 8 and sum(stats.accepted_lengths[1][:8]) == 0 and stats.accepted[0] > 0


GREEDY, SAMPLED, PENALISED = {"do_sample": False}, {"do_sample": True}, {"do_sample": False, "repetition_penalty": 1.01}


@pytest.mark.parametrize(
    ("way", "settings"),
    [(way, own) for way in ("eager", "lockstep") for own in (GREEDY, SAMPLED, PENALISED)]
    + [pytest.param("compiled", SAMPLED, marks=pytest.mark.slow)],
)
def test_no_number_is_never_accepted_also_where_the_target_wants_what_stands_for_it(way, settings):
    """Token 0 is shown to the target in place of drafts of NaN, and here it writes nothing else."""
    target = tiny_target(vocab_size=40)
    head, kwargs = tiny_head(target), batch(2) | {"max_new_tokens": 20} | settings
    target.lm_head.register_forward_hook(lambda module, args, logits: logits + 100 * (torch.arange(40) == 0))
    spoil(head.norm, 1)
    kwargs |= static() if way == "compiled" else {}
    if way == "lockstep":
        # Alone in the batch, with a processor that nothing is known of.
        kwargs |= {"input_ids": kwargs["input_ids"][:1], "attention_mask": kwargs["attention_mask"][:1]}
        kwargs["logits_processor"] = [lambda ids, scores: scores]
        spoil(head.norm, 0)
    output = target.generate(**kwargs, assistant_model=head, return_dict_in_generate=True)
    assert not output.sequences[:, 6:].any()
    *others, spoilt = output.dspark.committed_lengths
    assert spoilt[:4] == [1] * 4 and all(lengths[:3] == [5] * 3 for lengths in others)


@pytest.mark.slow
def test_samples_beside_drafts_that_are_no_numbers_in_their_middle():
    """Where the head's numbers end within a block, what is written still has the target's distribution."""
    target = tiny_target(sharpness=2)
    head = tiny_head(target)

    def with_nan(module, args, output):
        output = output.clone()
        output[:, 1:] = torch.nan
        return output

    head.norm.register_forward_hook(with_nan)
    [drawn] = draw(target, head, [[3, 5]])
    assert p_value(drawn, exact_distribution(target, [3, 5], [])) > 1e-3


def test_a_target_whose_logits_are_no_numbers_in_one_row():
    target = tiny_target(vocab_size=40, sharpness=3)
    head, kwargs = tiny_head(target), batch(3) | {"max_new_tokens": 40}
    spoil(target.lm_head, 1)
    with pytest.raises(ValueError, match="row 1 of the batch hold NaN"):
        target.generate(**kwargs, assistant_model=head)


# -- The last position ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", rest_slow([1, 4, 7], quick=[4]))
def test_texts_end_at_the_last_position(block_size):
    """Rows of different lengths, all of them up to the last position that the config names, and by a manager whose
    slots are taken again and again."""
    target = tiny_target(vocab_size=40, sharpness=3, max_position_embeddings=48)
    head = tiny_head(target, block_size=block_size)
    kwargs = batch(3, 9) | {"max_length": 48}
    kwargs["attention_mask"][1, :5] = 0
    plain = target.generate(**kwargs)
    assert plain.shape[1] == 48 and torch.equal(target.generate(**kwargs, assistant_model=head), plain)
    prompts = torch.randint(1, 40, (8, 9)).tolist()
    settings = {"max_new_tokens": 39, "do_sample": False}
    with target.continuous_batching_context_manager(
        GenerationConfig(**settings), continuous_batching_config=config(2), assistant_model=head
    ) as manager:
        ids = [manager.add_request(prompt) for prompt in prompts]
        found = results(manager, len(prompts))
    for request, prompt in zip(ids, prompts, strict=True):
        alone = target.generate(torch.tensor([prompt]), **settings)[0, 9:].tolist()
        assert found[request].generated_tokens == alone and len(alone) == 39


# -- Heads of no use ------------------------------------------------------------------------------------------------


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    said = []
    monkeypatch.setattr(observers.logger, "warning", said.append)
    return said


@pytest.mark.parametrize(("rows", "new"), [(1, 80), (4, 30)])
def test_a_head_of_no_use_is_pointed_out_once_a_call(rows, new, warnings):
    target = tiny_target(vocab_size=64, sharpness=3)
    head, kwargs = tiny_head(target), batch(rows) | {"max_new_tokens": new}
    stats = target.generate(**kwargs, assistant_model=head, return_dict_in_generate=True).dspark
    assert stats.drafted_tau < 1.2 and sum(stats.verified) > 64
    assert len(warnings) == 1 and "dspark-hf doctor" in warnings[0] and "tau is 1." in warnings[0]
    target.generate(**kwargs, assistant_model=head)
    assert len(warnings) == 2


def test_nothing_is_said_of_heads_that_help_or_did_not_draft(pair, code, warnings, monkeypatch):
    model, head, _ = pair
    inputs, _ = code
    stats = model.generate(
        **inputs | {"max_new_tokens": 200, "min_new_tokens": 200}, assistant_model=head, return_dict_in_generate=True
    ).dspark
    assert sum(map(len, stats.committed_lengths)) >= 64 and stats.drafted_tau >= stats.tau > 1.2
    target = tiny_target(vocab_size=64, sharpness=3)
    few = target.generate(**batch(1) | {"max_new_tokens": 20}, assistant_model=tiny_head(target))
    assert few.shape[1] == 26
    # A threshold that no draft reaches.
    undrafted = tiny_head(target)
    undrafted.generation_config.assistant_confidence_threshold = 1.0
    kwargs = batch(1) | {"max_new_tokens": 100, "return_dict_in_generate": True}
    stats = target.generate(**kwargs, assistant_model=undrafted).dspark
    assert stats.drafted_tau == 0 and sum(stats.verified) == 0 and stats.tau == 1
    assert warnings == []


# -- Quantised heads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_transformers", [False, True])
def test_bench_takes_a_quantised_head(by_transformers):
    quantization = pytest.importorskip("torchao.quantization")
    model, head, tokenizer = dspark_hf.embedded_pair(torch.float32)
    int8 = quantization.Int8WeightOnlyConfig()
    if by_transformers:
        config = TorchAoConfig(int8)
        head = DSparkHead.from_pretrained(FOLDER / "head", quantization_config=config, dtype=torch.float32)
    else:
        quantization.quantize_(head, int8)
    assert type(head.fc.weight) is not torch.nn.Parameter
    cells = cells_of(head, ["Tom has 3 boxes of 12 pencils."], [1], ["plain", "dspark"], turns=1)
    records = list(bench(model, head, tokenizer, cells, estimate(model, head, tokenizer, cells, 16), 16))
    plain, dspark = records
    assert dspark.identical and dspark.tau >= 1 and dspark.tokens_per_second > 0
