"""Every logits processor that `GenerationConfig` can switch on does with a head what it does without."""

import pytest
import torch
from conftest import tiny_head, tiny_target
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    WatermarkingConfig,
)

from dspark_hf.generation.processors import BlockProcessors, Prefixes, is_pure

VOCABULARY = 24

WARPERS = {
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "top_h": {"top_h": 0.5},
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.05},
    "eta_cutoff": {"eta_cutoff": 0.05},
}
PREFIX_FREE = {
    "suppress_tokens": {"suppress_tokens": [1, 4, 9]},
    "renormalize_logits": {"renormalize_logits": True},
    "remove_invalid_values": {"remove_invalid_values": True},
}
LOOKS_AT_THE_PREFIX = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[3], [5, 6], [7, 8, 9]]},
    "min_length": {"min_length": 14, "eos_token_id": [3, 11, 17]},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": [3, 11, 17]},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "begin_suppress_tokens": {"begin_suppress_tokens": [1, 2, 3, 4, 5, 6, 7, 8]},
    "sequence_bias": {"sequence_bias": {(4,): 3.0, (5, 6): 5.0, (9,): -4.0}},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (4, 1.3), "eos_token_id": 3},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="lefthash")},
    "prefix_allowed_tokens_fn": {
        "prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) + k) % 24 for k in (1, 5, 7)]
    },
    "several at once": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [2],
        "min_new_tokens": 4,
    },
}


class Forbid(LogitsProcessor):
    """A user's own processor: forbids what the sum of the last two tokens points at."""

    def __call__(self, input_ids, scores):
        index = (input_ids[:, -2:].sum(1, keepdim=True) + torch.arange(6)) % VOCABULARY
        return scores.scatter(1, index, float("-inf"))


@pytest.fixture(scope="module")
def pair():
    target = tiny_target(vocab_size=VOCABULARY, sharpness=3)
    return target, tiny_head(target)


def batch():
    ids, mask = torch.randint(1, VOCABULARY, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def check_greedy(pair, inputs, **settings):
    target, head = pair
    kwargs = inputs | {"max_new_tokens": 18, "do_sample": False} | settings
    plain = target.generate(**kwargs)
    assert torch.equal(target.generate(**kwargs, assistant_model=head), plain)
    return plain


@pytest.mark.parametrize("name", PREFIX_FREE | LOOKS_AT_THE_PREFIX)
def test_greedy(pair, name):
    settings = (PREFIX_FREE | LOOKS_AT_THE_PREFIX)[name]
    check_greedy(pair, {"input_ids": torch.tensor([[3, 9, 4, 7]])}, **settings)
    check_greedy(pair, batch(), **settings)


def test_the_settings_matter(pair):
    """Most of these settings change the text, so that the comparison above says something."""
    inputs = {"input_ids": torch.tensor([[3, 9, 4, 7]])}
    without = check_greedy(pair, inputs).tolist()
    changed = [name for name, s in LOOKS_AT_THE_PREFIX.items() if check_greedy(pair, inputs, **s).tolist() != without]
    assert len(changed) >= len(LOOKS_AT_THE_PREFIX) - 2


def test_user_processor(pair):
    check_greedy(pair, batch(), logits_processor=LogitsProcessorList([Forbid()]))


FOREIGN = {"encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "prefix_allowed_tokens_fn"}


@pytest.mark.parametrize("name", sorted((WARPERS | PREFIX_FREE | LOOKS_AT_THE_PREFIX).keys() - FOREIGN))
def test_a_block_equals_its_positions_one_by_one(pair, name):
    """What the target's logits of a block become is what each position would become in plain decoding."""
    target, _ = pair
    settings = dict((WARPERS | PREFIX_FREE | LOOKS_AT_THE_PREFIX)[name])
    prompts = torch.randint(1, VOCABULARY, (2, 5))
    config = GenerationConfig(
        do_sample=True, num_beams=1, max_length=12, pad_token_id=0, **{"eos_token_id": 2} | settings
    )
    target._prepare_special_tokens(config, True, prompts.device, 2)
    processors = target._get_logits_processor(
        config, input_ids_seq_length=5, encoder_input_ids=prompts, model_kwargs={}
    )
    assert all(map(is_pure, processors))
    block, logits = torch.randint(1, VOCABULARY, (2, 3)), torch.randn(2, 4, VOCABULARY) * 3
    prefixes = Prefixes(list(torch.cat([prompts, block], dim=1)), [0, 1])
    found = BlockProcessors(processors, True)(logits.clone(), prefixes)
    for j in range(4):
        expected = processors(torch.cat([prompts, block[:, :j]], dim=1), logits[:, j].clone())
        torch.testing.assert_close(found[:, j], expected)


@pytest.mark.parametrize("ignored", [None, 2, "by row"])
def test_a_repetition_penalty_goes_over_rows_of_any_length_at_once(ignored):
    """Rows of a batch have different lengths and paddings, and hold ids that the model cannot generate."""
    stock = RepetitionPenaltyLogitsProcessor(1.7)
    padding = [3, 0, 1]
    stock.prompt_ignore_length = torch.tensor([3, 1, 0, 1]) if ignored == "by row" else ignored
    rows = [0, 1, 3]
    lengths = (9, 6, 12)
    tokens = [
        torch.cat([torch.zeros(n, dtype=torch.long), torch.randint(1, VOCABULARY, (k,))])
        for n, k in zip(padding, lengths, strict=True)
    ]
    logits = torch.randn(3, 4, VOCABULARY) * 3
    found = BlockProcessors(LogitsProcessorList([stock]), True)(logits, Prefixes(tokens, rows))
    for r, (own, row) in enumerate(zip(tokens, rows, strict=True)):
        first = stock.prompt_ignore_length[row] if ignored == "by row" else ignored or 0
        alone = RepetitionPenaltyLogitsProcessor(1.7)
        for j in range(4):
            seen = own[first : len(own) - 3 + j]
            torch.testing.assert_close(found[r, j], alone(seen[None], logits[r, j : j + 1])[0])


def test_ids_that_cannot_be_generated_are_not_penalised():
    processors = BlockProcessors(LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.0)]), False)
    logits = torch.ones(1, 1, VOCABULARY)
    found = processors(logits, Prefixes([torch.tensor([3, VOCABULARY, VOCABULARY + 7])], [0]))
    expected = torch.ones(VOCABULARY)
    expected[3] = 0.5
    assert torch.equal(found[0, 0], expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_repetition_penalty_leaves_drafts(vanilla, rows):
    """Also where the release gives it the padding of every row."""
    target, head = vanilla.target(), vanilla.head()
    ids = torch.tensor([vanilla.expected["prompts"][2]["input_ids"]] * rows)
    mask = torch.ones_like(ids)
    mask[1:, :2] = 0
    kwargs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
    kwargs["repetition_penalty"] = 1.05
    head.generation_config.num_assistant_tokens_schedule = "constant"
    output = target.generate(**kwargs, assistant_model=head, return_dict_in_generate=True)
    assert torch.equal(output.sequences, target.generate(**kwargs))
    assert all(sum(row) > 0 for row in output.dspark.verified_lengths)


def counted(monkeypatch, *kinds):
    """Rows of every call of processors of these kinds."""
    rows = []

    def counting(call):
        def counted(self, input_ids, scores):
            rows.append(len(scores))
            return call(self, input_ids, scores)

        return counted

    for kind in kinds:
        monkeypatch.setattr(kind, "__call__", counting(kind.__call__))
    return rows


def test_prefix_free_processors_run_once_a_block(monkeypatch):
    rows = counted(monkeypatch, TemperatureLogitsWarper, TopKLogitsWarper)
    target = tiny_target(vocab_size=VOCABULARY)
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=3)
    processors = BlockProcessors(target._get_logits_processor(config), True)
    processors(torch.randn(4, 8, VOCABULARY), None)
    assert rows == [32, 32] and not processors.needs_prefix


def test_drafts_follow_the_processors(vanilla):
    """A head that ignored the processors would draft what the target may no longer say."""
    target, head = vanilla.target(), vanilla.head()
    ids = torch.tensor([vanilla.expected["prompts"][2]["input_ids"]])
    plain = target.generate(input_ids=ids, max_new_tokens=40, do_sample=False)
    forbidden = plain[0, ids.shape[1] :].unique().tolist()[::2]
    kwargs = {"input_ids": ids, "max_new_tokens": 40, "do_sample": False, "suppress_tokens": forbidden}
    output = target.generate(**kwargs, assistant_model=head, return_dict_in_generate=True)
    assert torch.equal(output.sequences, target.generate(**kwargs))
    assert output.dspark.tau > 1.3


class Matcher(LogitsProcessor):
    """A grammar: even and odd tokens in turn. Takes the last token in at every call but the first, of every row."""

    def __init__(self):
        self.turns = None

    def __call__(self, input_ids, scores):
        if self.turns is None:
            self.turns = torch.zeros(len(input_ids), 1, dtype=torch.long)
        else:
            assert torch.equal(input_ids[:, -1:] % 2, self.turns), "a token that the grammar did not allow"
            self.turns = 1 - self.turns
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 != self.turns, float("-inf"))


class Frequency(LogitsProcessor):
    """Counts the tokens of every row by itself."""

    def __init__(self):
        self.counts = None

    def __call__(self, input_ids, scores):
        if self.counts is None:
            self.counts = torch.zeros_like(scores)
        else:
            self.counts.scatter_add_(1, input_ids[:, -1:], torch.ones_like(scores[:, :1]))
        return scores - 2 * self.counts


@pytest.mark.parametrize("make", [Matcher, Frequency])
def test_processors_that_keep_a_state_see_every_token_once(pair, make):
    target, head = pair
    for inputs in ({"input_ids": torch.tensor([[3, 9, 4, 7]])}, batch()):
        kwargs = inputs | {"max_new_tokens": 18, "do_sample": False}
        plain = target.generate(**kwargs, logits_processor=LogitsProcessorList([make()]))
        ours = target.generate(**kwargs, logits_processor=LogitsProcessorList([make()]), assistant_model=head)
        assert torch.equal(ours, plain)


def test_a_grammar_holds_when_sampling(pair):
    """Its own assertion fails at any token that it did not allow, or is not told of in order."""
    target, head = pair
    kwargs = {"input_ids": torch.tensor([[3, 9, 4, 7]]), "max_new_tokens": 40, "do_sample": True, "temperature": 2.0}
    text = target.generate(**kwargs, logits_processor=LogitsProcessorList([Matcher()]), assistant_model=head)
    assert [token % 2 for token in text[0, 4:].tolist()] == [0, 1] * 20


@pytest.mark.slow
def test_a_processor_with_a_state_is_exact_when_sampling():
    """Distribution of the first three tokens against plain decoding's own."""
    target = tiny_target(vocab_size=4, sharpness=3)
    head = tiny_head(target)
    kwargs = {"input_ids": torch.tensor([[3, 2]]), "max_new_tokens": 3, "do_sample": True}
    count = 400

    def frequencies(**assistant):
        found = torch.zeros(64)
        for _ in range(count):
            text = target.generate(**kwargs, logits_processor=LogitsProcessorList([Frequency()]), **assistant)
            found[(text[0, 2:] * torch.tensor([16, 4, 1])).sum()] += 1
        return found

    plain, ours = frequencies(), frequencies(assistant_model=head)
    expected = (plain + ours) / 2
    often = expected > 5
    statistic = (((plain - ours) ** 2) / (2 * expected).clamp(min=1e-9))[often].sum()
    assert statistic < often.sum() + 4 * (2 * often.sum()) ** 0.5


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 1.5},
        {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)},
    ],
)
def test_settings_that_keep_a_state(pair, settings):
    check_greedy(pair, {"input_ids": torch.tensor([[3, 9, 4, 7]])}, **settings)


def test_a_batch_of_any_size_does_linear_work(monkeypatch):
    """Each position of each row is processed once, not once for every row of the batch."""
    seen = counted(monkeypatch, TemperatureLogitsWarper, NoRepeatNGramLogitsProcessor)
    target = tiny_target(vocab_size=VOCABULARY)
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=3, no_repeat_ngram_size=3, num_beams=1)
    stock = target._get_logits_processor(config, input_ids_seq_length=3, model_kwargs={})
    processors = BlockProcessors(stock, True)
    prefixes = Prefixes([torch.ones(8, dtype=torch.long)] * 16, list(range(16)))
    processors(torch.randn(16, 4, VOCABULARY), prefixes)
    assert sum(seen) == 2 * 16 * 4
