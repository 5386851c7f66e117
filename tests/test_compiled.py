"""Compiled rounds. What is the same for every backend of the compiler is tested with one that only traces, which takes
a second where inductor takes half a minute, on models of one layer; rounds in earnest, and the families but for one,
are behind `--all`."""

import gc
import logging
import random
import weakref

import pytest
import torch
from conftest import FixedCosts, lengths_compared, tiny_head, tiny_target, whole_blocks
from test_sampling import PROMPTS, SETTINGS, draw, exact_distribution, p_value
from test_targets import FAMILIES, VOCAB, bigram_head, build
from torch._dynamo.utils import counters
from transformers import CompileConfig
from transformers.generation import logits_process as stock

import dspark_hf
from dspark_hf.evaluation.prompts import domain_prompts, encode
from dspark_hf.generation import compiled
from dspark_hf.generation.graphs import Graphs, draft_tiers, graphs_of, power_of_two
from dspark_hf.generation.processors import OF_LOGITS
from dspark_hf.scheduling.estimates import AcceptanceStats
from dspark_hf.scheduling.load import Load
from dspark_hf.scheduling.scheduler import LoadSchedule
from dspark_hf.scheduling.settings import Settings

VOCABULARY = 24
# Full and sliding layers, both in one model, positions that are not rotary throughout, experts.
FIVE = ["qwen3", "mistral-sliding", "gemma3", "gpt-neox", "qwen3-moe"]


def static(backend="eager", **fields) -> dict:
    return {"cache_implementation": "static", "compile_config": CompileConfig(backend=backend, mode=None, **fields)}


def batch(rows: int, longest: int = 12, vocabulary: int = VOCABULARY) -> dict:
    """Left-padded prompts of different lengths."""
    ids, mask = torch.randint(1, vocabulary, (rows, longest)), torch.ones(rows, longest, dtype=torch.long)
    for row in range(1, rows):
        mask[row, : (3 * row) % (longest - 2)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture
def pair():
    target = tiny_target(vocab_size=VOCABULARY, sharpness=3, num_hidden_layers=1)
    return target, tiny_head(target)


def new_tokens(target, inputs, **kwargs):
    return target.generate(**inputs, max_new_tokens=24, **{"do_sample": False} | kwargs)


def check_family(family: str, backend: str, sizes: list[int], rejects: bool = True) -> None:
    """Greedy, prompts of different lengths, rows that end early. rejects: whether some drafts must fail."""
    target = build(family)
    for rows in sizes:
        inputs = batch(rows, vocabulary=VOCAB) | {"max_new_tokens": 40, "do_sample": False}
        # Some row ends early.
        inputs |= {"eos_token_id": target.generate(**inputs)[rows // 2, 32].item(), "pad_token_id": 0}
        plain = target.generate(**inputs)
        head = bigram_head(target, plain[:, 12:])
        with lengths_compared():
            found = target.generate(**inputs, assistant_model=head, return_dict_in_generate=True, **static(backend))
        assert found.sequences.tolist() == plain.tolist()
        assert graphs_of(head, target).refused is None and graphs_of(head, target).made
        assert 0 < sum(found.dspark.accepted) <= sum(found.dspark.verified) - rejects


def test_the_same_text():
    check_family("gemma3", "eager", [7])


@pytest.mark.slow
@pytest.mark.parametrize("family", FIVE)
def test_the_same_text_with_inductor(family):
    check_family(family, "inductor", [1, 4, 7])


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_the_same_text_of_the_embedded_pair_with_inductor(rows):
    target, head, tokenizer = dspark_hf.embedded_pair(dtype=torch.float32)
    inputs = encode(domain_prompts("gsm8k")[:rows], tokenizer, target.device)
    settings = {"max_new_tokens": 64, "do_sample": False}
    with lengths_compared():
        found = target.generate(**inputs, **settings, assistant_model=head, **static("inductor"))
    assert found.tolist() == target.generate(**inputs, **settings).tolist() and graphs_of(head, target).made


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(FIVE)))
def test_the_same_text_of_all_families(family):
    check_family(family, "eager", [1, 4, 7], rejects=False)


@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("limit", [1, 3, 7])
def test_the_load_schedule_chooses_among_tiers(rows, limit):
    """Whatever there is room for, and whatever costs what."""
    for verify in (0.02, 0.2, 0.5, 2.0):
        shared = AcceptanceStats.initial(7)
        costs = FixedCosts(7, verify=verify)
        schedule = LoadSchedule(Settings(7, "load", None), shared, rows, costs, False, False, tiers=draft_tiers(7))
        plan = schedule.plan([limit] * rows, 100, Load(rows, 0))
        assert plan.probe or plan.length in (0, 3, 7) and not plan.packed


@pytest.mark.slow
def test_heads_of_other_kinds(pair):
    """Heads that draft by other means than the vanilla one are captured too."""
    target, _ = pair
    inputs = batch(1)
    for options in ({"markov_head_type": "rnn"}, {"markov_head_type": "gated"}, {"enable_confidence_head": False}):
        head = whole_blocks(tiny_head(target, **options))
        found = new_tokens(target, inputs, assistant_model=head, **static())
        assert found.tolist() == new_tokens(target, inputs).tolist()
        assert graphs_of(head, target).refused is None and graphs_of(head, target).made


def test_plain_where_nobody_asked(pair):
    """On a CPU static caches alone compile nothing, as in plain decoding, and neither does `disable_compile`."""
    target, head = pair
    inputs = batch(2)
    new_tokens(target, inputs, assistant_model=head, cache_implementation="static")
    new_tokens(target, inputs, assistant_model=head, disable_compile=True, **static())
    assert not graphs_of(head, target).made


@pytest.mark.slow
def test_nothing_is_compiled_after_a_warm_up(pair):
    """A hundred calls of any prompts and limits, after one of the most tokens for each power of two of rows: three rows
    go by the passes of four, and sampling temperatures are no part of a graph."""
    target, head = pair
    compiles = []

    def counting(graph, inputs):
        compiles.append(1)
        return graph.forward

    options = static(counting) | {"assistant_model": head, "do_sample": True, "top_k": 0, "temperature": 0.9}
    for rows in (4, 2, 1):
        target.generate(**batch(rows, 200), max_new_tokens=50, **options)
    graphs = graphs_of(head, target)
    assert len(compiles) == graphs.count == 12
    chance = random.Random(0)
    for _ in range(100):
        inputs = batch(chance.randint(1, 4), chance.randint(3, 200))
        temperature = {"temperature": chance.uniform(0.5, 1.5)}
        target.generate(**inputs, max_new_tokens=chance.randint(2, 50), **options | temperature)
    assert len(compiles) == graphs.count == 12


def test_a_pass_is_one_graph_that_the_device_runs_alone(pair):
    """No break, and nothing that makes the host wait: no value that is read, no shape that depends on one."""
    target, head = pair
    graphs = []

    def noting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    counters.clear()
    new_tokens(target, batch(2), assistant_model=head, **static(noting))
    assert not counters["graph_break"] and len(graphs) == 1 + len(draft_tiers(head.config.gamma))
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op.startswith("call")}
    waits = ("item", "tolist", "nonzero", "masked_select", "multinomial", "unique", "cpu", "numpy")
    assert called and not called & set(waits) and not any(name.endswith(waits) for name in called)


def test_a_changed_model_is_captured_again(pair):
    """The layers of a model may be replaced, or get hooks, between calls."""
    target, head = pair
    inputs = batch(2)
    new_tokens(target, inputs, assistant_model=head, **static())
    torch.manual_seed(3)
    target.model.layers[0].mlp = type(target.model.layers[0].mlp)(target.config).eval()
    found = new_tokens(target, inputs, assistant_model=head, **static())
    assert found.tolist() == new_tokens(target, inputs).tolist()
    hook = target.model.layers[0].register_forward_hook(lambda module, args, output: output * 0.5)
    found = new_tokens(target, inputs, assistant_model=head, **static())
    assert found.tolist() == new_tokens(target, inputs).tolist()
    hook.remove()
    found = new_tokens(target, inputs, assistant_model=head, **static())
    assert found.tolist() == new_tokens(target, inputs).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_sampling_draws_from_the_target(setting):
    target = tiny_target(sharpness=2)
    head, (kwargs, warpers) = whole_blocks(tiny_head(target)), SETTINGS[setting]
    for prompt, tokens in zip(PROMPTS, draw(target, head, list(PROMPTS), **kwargs, **static()), strict=True):
        assert p_value(tokens, exact_distribution(target, prompt, warpers)) > 1e-4
    assert graphs_of(head, target).made


@pytest.mark.parametrize("kind", sorted(OF_LOGITS - compiled.NOT_CAPTURED, key=lambda kind: kind.__name__))
def test_processors_of_logits_are_captured(kind):
    """With their fractions as tensors, and to the same effect."""
    arguments = {
        stock.EpsilonLogitsWarper: (0.01,), stock.MinPLogitsWarper: (0.1,), stock.TemperatureLogitsWarper: (0.7,),
        stock.TopKLogitsWarper: (4,), stock.TopPLogitsWarper: (0.8,), stock.TypicalLogitsWarper: (0.8,),
        stock.SuppressTokensLogitsProcessor: ([3, 7],),
    }  # fmt: skip
    torch._dynamo.reset()
    own = kind(*arguments.get(kind, ()))
    logits = torch.randn(4, VOCABULARY)
    if kind is stock.SuppressTokensLogitsProcessor:
        # Graphs read the tokens, but are made for so many.
        kinds = [compiled.choice_of([kind(tokens)], True) for tokens in ([3, 7], [4, 8], [3])]
        assert kinds[0] == kinds[1] != kinds[2]
    [copy] = compiled.buffered([own], torch.device("cpu"))
    found = torch.compile(lambda x: copy(None, x), fullgraph=True, backend="eager")(logits)
    torch.testing.assert_close(found, own(None, logits.clone()))
    assert not any(isinstance(value, float) and not name.startswith("_") for name, value in vars(copy).items())


REASONS = {
    "scores": {"return_dict_in_generate": True, "output_scores": True},
    "look at more than logits": {"repetition_penalty": 1.2},
    "plain decoding calls them": {"stopping_criteria": [lambda ids, scores, **kwargs: torch.zeros(len(ids)).bool()]},
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_cannot_be_captured_runs_eagerly(pair, reason, caplog, monkeypatch):
    """With a line that says why, and the same text."""
    target, head = pair
    inputs, said = batch(2), []
    monkeypatch.setattr("dspark_hf.generation.generate.logger.warning_once", said.append)
    found = new_tokens(target, inputs, assistant_model=head, **REASONS[reason], **static())
    plain = new_tokens(target, inputs, **REASONS[reason])
    found, plain = (own if torch.is_tensor(own) else own.sequences for own in (found, plain))
    assert found.tolist() == plain.tolist() and not graphs_of(head, target).made
    assert len(said) == 1 and reason in said[0]


def test_a_model_that_breaks_graphs_runs_eagerly(pair, monkeypatch):
    target, head = pair
    said = []
    monkeypatch.setattr(compiled.logger, "warning", said.append)
    forward = target.model.layers[0].mlp.forward

    def breaking(x):
        torch._dynamo.graph_break()
        return forward(x)

    monkeypatch.setattr(target.model.layers[0].mlp, "forward", breaking)
    inputs = batch(3)
    for _ in range(2):
        found = new_tokens(target, inputs, assistant_model=head, **static())
        assert found.tolist() == new_tokens(target, inputs).tolist()
    assert len(said) == 1 and "cannot be compiled" in said[0] and not graphs_of(head, target).made


@pytest.mark.slow
def test_a_model_in_another_dtype_is_captured_again(pair):
    target, head = pair
    inputs = batch(2)
    new_tokens(target, inputs, assistant_model=head, **static())
    target.double(), head.double()
    found = new_tokens(target, inputs, assistant_model=head, **static())
    assert found.tolist() == new_tokens(target, inputs).tolist() and graphs_of(head, target).refused is None


@pytest.mark.slow
def test_fewer_rows_use_smaller_passes_where_there_are_some(pair, monkeypatch):
    """Rows that end early leave passes of more lines than they need; a smaller call has made some."""
    target, head = pair
    used = []
    serving = Graphs.serving

    def noted(self, rows, shape):
        passes = serving(self, rows, shape)
        used.append((rows, passes.rows))
        return passes

    monkeypatch.setattr(Graphs, "serving", noted)
    inputs = batch(4)
    ends = {"eos_token_id": list(range(1, 6)), "pad_token_id": 0, "assistant_model": whole_blocks(head)}
    new_tokens(target, inputs, **ends, **static())
    assert {lines for _, lines in used} == {4} and min(rows for rows, _ in used) < 3
    new_tokens(target, batch(1), **ends, **static())
    used.clear()
    new_tokens(target, inputs, **ends, **static())
    assert {(rows, lines) for rows, lines in used if rows == 1} == {(1, 1)}


@pytest.mark.slow
def test_a_returned_cache_goes_on(pair):
    """The cache that a call returns is continued by plain decoding; that its slots serve the next call changes none of
    it."""
    target, head = pair
    inputs = batch(2)
    options = {"assistant_model": head, "return_dict_in_generate": True, "do_sample": False}
    first = target.generate(**inputs, max_new_tokens=10, **options, **static())
    cache = getattr(first, "cache", None) or first.past_key_values
    target.generate(**batch(2), max_new_tokens=10, **options, **static())
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 10, dtype=torch.long)], dim=1)
    name = "cache" if hasattr(first, "cache") else "past_key_values"
    rest = target.generate(first.sequences, attention_mask=mask, max_new_tokens=10, do_sample=False, **{name: cache})
    whole = target.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert rest.tolist() == whole.tolist()


@pytest.mark.slow
def test_graphs_are_freed_with_the_models():
    target = tiny_target(vocab_size=VOCABULARY, sharpness=3, num_hidden_layers=1)
    head = tiny_head(target)
    new_tokens(target, batch(1), assistant_model=head, **static())
    gone = [weakref.ref(own) for own in (target, head, graphs_of(head, target))]
    del target, head
    torch._dynamo.reset()
    gc.collect()
    assert [own() for own in gone] == [None] * 3


@pytest.mark.slow
def test_the_log_says_what_was_captured(pair, caplog):
    target, head = pair
    compiled.logger.setLevel(logging.INFO)
    said = []
    try:
        compiled.logger.info, info = said.append, compiled.logger.info
        new_tokens(target, batch(3), assistant_model=head, **static())
    finally:
        compiled.logger.info = info
        compiled.logger.setLevel(logging.NOTSET)
    assert len(said) == 1 and "4 rows over 256 slots" in said[0]


@pytest.mark.parametrize("number, power", [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (257, 512)])
def test_powers_of_two(number, power):
    assert power_of_two(number) == power


@pytest.mark.slow
def test_inductor_writes_the_same_text():
    """The smallest case in earnest: one layer and drafts of one token."""
    target = tiny_target(vocab_size=VOCABULARY, sharpness=3, num_hidden_layers=1)
    head, inputs = tiny_head(target, block_size=1), batch(2)
    found = new_tokens(target, inputs, assistant_model=head, **static("inductor"))
    assert found.tolist() == new_tokens(target, inputs).tolist() and graphs_of(head, target).made
