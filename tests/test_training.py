"""Blocks, data and the training loop."""

import json
from functools import partial

import pytest
import torch
from conftest import losses_of_logits, tiny_head, tiny_target
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dspark_hf import DSparkHead, embedded_pair
from dspark_hf.backbones.mask import draft_mask
from dspark_hf.training import data, trainer
from dspark_hf.training.blocks import attention_masks, labels_and_weights, sample_blocks
from dspark_hf.training.data import collate, encode_chat, load_rows
from dspark_hf.training.trainer import ShuffledByLength, TrainingArguments, train
from dspark_hf.training.warm_start import warm_start

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' end ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def tokenizer():
    words = ["unk", "end", "user", "assistant", *"abcdefghij"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="unk"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="end", chat_template=TEMPLATE)


def test_anchors_are_supervised_and_followed_by_a_label():
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1, 0, 1]])
    blocks = sample_blocks(mask, 6)
    assert blocks.anchors[0, blocks.keep[0]].tolist() == [2, 5, 6]
    assert not blocks.keep[1].any() and blocks.anchors[1].tolist() == [0] * 3, "no more than any sequence has"
    few = sample_blocks(mask, 2)
    assert few.keep[0].all() and set(few.anchors[0].tolist()) < {2, 5, 6}


def test_anchors_differ_from_draw_to_draw():
    mask = torch.ones(1, 64)
    drawn = {tuple(sample_blocks(mask, 4).anchors[0].tolist()) for _ in range(8)}
    assert len(drawn) == 8


def test_a_block_sees_the_context_before_its_anchor_and_itself():
    blocks = sample_blocks(torch.tensor([[0, 0, 1, 1, 1]]), 2)
    mask = attention_masks(blocks, 5, {"full_attention": partial(draft_mask, size=3)}, 3)["full_attention"][0, 0]
    assert blocks.anchors.tolist() == [[2, 3]] and mask.shape == (6, 11)
    assert mask[:3, :5].tolist() == [[True, True, False, False, False]] * 3
    assert mask[3:, :5].tolist() == [[True, True, True, False, False]] * 3
    assert mask[:, 5:].tolist() == [[True] * 3 + [False] * 3] * 3 + [[False] * 3 + [True] * 3] * 3


def test_rows_behind_an_unsupervised_label_do_not_count():
    ids, mask = torch.arange(8)[None], torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]])
    blocks = sample_blocks(mask, 8)
    labels, supervised = labels_and_weights(ids, mask, blocks, 3)
    kept = blocks.keep[0]
    by_anchor = dict(zip(blocks.anchors[0, kept].tolist(), supervised[0, kept].tolist(), strict=True))
    assert by_anchor[0] == [True, True, False]
    assert by_anchor[1] == [True, False, False]
    assert by_anchor[6] == [True, False, False]
    assert labels[0, 0].tolist() == [1, 2, 3]


def test_chat_supervises_the_assistant(tokenizer):
    row = encode_chat(
        [
            {"role": "user", "content": "a b"},
            {"role": "assistant", "content": "c d"},
            {"role": "user", "content": "e"},
            {"role": "assistant", "content": "f"},
        ],
        tokenizer,
    )
    words = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert words == ["user", "a", "b", "end", "assistant", "c", "d", "end", "user", "e", "end", "assistant", "f", "end"]
    assert [word for word, on in zip(words, row["loss_mask"], strict=True) if on] == ["c", "d", "end", "f", "end"]


# Writes an empty think block before answers behind the last question only, as Qwen3's template does.
REWRITES = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ m.role + ' ' }}{% if m.role == 'assistant' %}"
    "{% if m.reasoning is defined and loop.index0 > ns.last %}{{ 'j ' + m.reasoning + ' j ' }}"
    "{% elif loop.index0 > ns.last %}{{ 'j j ' }}{% endif %}{% endif %}{{ m.content|trim + ' end ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
TWO_TURNS = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": " c d "},
    {"role": "user", "content": "c d c"},
    {"role": "assistant", "content": "c d"},
]


def words_of(row, tokenizer) -> tuple[str, str]:
    """The text of a row, and what of it is supervised."""
    words = tokenizer.convert_ids_to_tokens(row["input_ids"])
    return " ".join(words), " ".join(word for word, on in zip(words, row["loss_mask"], strict=True) if on)


def test_a_template_that_rewrites_earlier_answers(tokenizer):
    tokenizer.chat_template = REWRITES
    text, supervised = words_of(encode_chat(TWO_TURNS, tokenizer), tokenizer)
    assert text == "user a b end assistant c d end user c d c end assistant j j c d end"
    assert supervised == "c d end c d end"


def test_what_was_thought_is_supervised_where_it_is_in_the_text(tokenizer):
    tokenizer.chat_template = REWRITES
    chat = [message | ({"reasoning": "e f"} if message["role"] == "assistant" else {}) for message in TWO_TURNS]
    text, supervised = words_of(encode_chat(chat, tokenizer), tokenizer)
    assert text == "user a b end assistant c d end user c d c end assistant j e f j c d end"
    assert supervised == "c d end e f j c d end"


def test_a_template_that_marks_what_the_assistant_writes(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ' ' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ 'j ' + m.content + ' end ' }}{% endgeneration %}{% else %}{{ m.content + ' end ' }}{% endif %}{% endfor %}"
    )
    text, supervised = words_of(encode_chat(TWO_TURNS[:2], tokenizer), tokenizer)
    assert (text, supervised) == ("user a b end assistant j c d end", "j c d end")


def test_a_template_that_hides_the_answer(tokenizer):
    """Written twice, it cannot be told which of the two the assistant wrote."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' + m.content + ' end ' }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="message 2"):
        encode_chat(TWO_TURNS[:2], tokenizer)


def test_the_embedded_pairs_own_template_ends_turns():
    tokenizer = embedded_pair()[2]
    row = encode_chat([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Four."}], tokenizer)
    supervised = [token for token, on in zip(row["input_ids"], row["loss_mask"], strict=True) if on]
    assert tokenizer.decode(supervised[:-1]).strip() == "Four." and supervised[-1] in tokenizer.all_special_ids


BAD_ROWS = {
    "null": ({"prompt": "a", "response": None}, "row 2: `response` is None"),
    "number": ({"prompt": "a", "response": 3}, "row 2: `response` is 3"),
    "missing": ({"prompt": "a"}, "row 2: no 'response'"),
    "empty": ({"prompt": "a", "response": ""}, "row 2: fewer than two supervised"),
    "no object": ("text", "row 2:"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_named_and_left_out(kind, tokenizer, tmp_path, monkeypatch):
    bad, named = BAD_ROWS[kind]
    path, good = tmp_path / "data.jsonl", {"prompt": "a", "response": "b c"}
    path.write_text("\n".join(json.dumps(row) for row in (good, bad, good, bad)))
    warnings = []
    monkeypatch.setattr(data.logger, "warning", warnings.append)
    assert len(load_rows(str(path), tokenizer, 100)) == 2
    (warning,) = warnings
    assert "2 of 4 rows" in warning and named in warning and "row 4" in warning
    path.write_text(json.dumps({"prompt": "", "response": "b c"} | (bad if isinstance(bad, dict) else {})) + "\n")
    if kind not in ("missing", "no object"):
        with pytest.raises(ValueError, match=named.replace("row 2", "row 1")):
            load_rows(str(path), tokenizer, 100)


BAD_CHATS = {
    "refused": ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "users take turns"),
    "no text": ([{"role": "user", "content": None}, {"role": "assistant", "content": "b c"}], "`content` of message 1"),
    "no role": ([{"content": "a"}], "with a `role`"),
    "null": (None, "not a list"),
    "nobody answers": ([{"role": "user", "content": "a"}], "fewer than two supervised"),
}


@pytest.mark.parametrize("kind", BAD_CHATS)
def test_bad_chats(kind, tokenizer, tmp_path):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.index0 % 2 == (m.role == 'user')|int %}"
        "{{ raise_exception('users take turns') }}{% endif %}{{ m.role + ' ' + m.content + ' end ' }}{% endfor %}"
    )
    chat, named = BAD_CHATS[kind]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": chat}))
    with pytest.raises(ValueError, match=f"row 1: .*{named}"):
        load_rows(str(path), tokenizer, 100)
    # What the assistant greets with is no part of a chat that the user has to begin.
    assert encode_chat(TWO_TURNS[1:], tokenizer) == encode_chat(TWO_TURNS[2:], tokenizer)


def test_layouts_of_a_file(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    rows = {
        "messages": [{"messages": chat}],
        "pairs": [{"prompt": "a", "response": "b c"}],
        "tokens": [{"input_ids": [2, 4, 1, 3, 5, 6, 1], "loss_mask": [0, 0, 0, 0, 1, 1, 1]}],
    }
    loaded = []
    for name, content in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        loaded.append(load_rows(str(path), tokenizer, 100))
    assert loaded[0] == loaded[1] == loaded[2]
    assert load_rows(str(tmp_path / "tokens.jsonl"), tokenizer, 6)[0]["loss_mask"] == [0, 0, 0, 0, 1, 1]


def test_bad_data(tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    with pytest.raises(ValueError, match=r"\['answer', 'question'\].*`messages`"):
        load_rows(str(path), tokenizer, 100)
    path.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    with pytest.raises(ValueError, match="supervised"):
        load_rows(str(path), tokenizer, 4)


def test_collate_pads_on_the_right():
    batch = collate([{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}, {"input_ids": [4], "loss_mask": [1]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 1, 1], [1, 0, 0]]


def test_sampler_covers_everything_and_repeats_with_the_seed():
    lengths = torch.randint(1, 90, (101,)).tolist()
    run = list(ShuffledByLength(lengths, 8, seed=3, batches=26))
    assert sorted(sum(run[:13], [])) == sorted(sum(run[13:], [])) == list(range(101))
    assert run[:13] != run[13:]
    assert list(ShuffledByLength(lengths, 8, seed=3, batches=26)) == run
    assert list(ShuffledByLength(lengths, 8, seed=3, batches=26, start=17)) == run[17:]


@pytest.fixture
def task():
    """A target and sequences that it wrote itself."""
    target = tiny_target(vocab_size=24, sharpness=4)
    sequences = target.generate(input_ids=torch.randint(1, 23, (48, 6)), max_new_tokens=26, do_sample=False)
    rows = [{"input_ids": ids, "loss_mask": [0] * 6 + [1] * 26} for ids in sequences.tolist()]
    return target, rows


def losses_of(folder) -> list[float]:
    return [json.loads(line)["total"] for line in (folder / "log.jsonl").read_text().splitlines()]


def arguments(folder, **kwargs) -> TrainingArguments:
    fields = {"epochs": 10, "batch_size": 8, "learning_rate": 5e-3, "anchors_per_sequence": 8, "save_every": 30}
    return TrainingArguments(output=folder, **fields | kwargs)


def test_training_raises_the_accepted_length(task, tmp_path):
    target, rows = task
    head = tiny_head(target)
    ids = torch.tensor([row["input_ids"][:8] for row in rows[:16]])

    def tau(head):
        head.generation_config.num_assistant_tokens_schedule = "constant"
        kwargs = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
        return target.generate(input_ids=ids, assistant_model=head, **kwargs).dspark.tau

    before, weights = tau(head), {name: p.clone() for name, p in target.named_parameters()}
    train(head, target, rows, arguments(tmp_path, epochs=25))
    losses = losses_of(tmp_path)
    assert losses[-1] < 0.7 * losses[0]
    assert tau(DSparkHead.from_pretrained(tmp_path)) > before + 0.5
    assert all(torch.equal(p, weights[name]) for name, p in target.named_parameters())


def test_resumed_run_equals_an_uninterrupted_one(task, tmp_path, monkeypatch):
    target, rows = task
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(tiny_head(target), target, rows, arguments(straight))

    real, calls = trainer.training_step, []

    def stops_at_40(*args):
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(trainer, "training_step", stops_at_40)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_head(target), target, rows, arguments(broken))
    monkeypatch.setattr(trainer, "training_step", real)
    train(tiny_head(target, seed=9), target, rows, arguments(broken), resume=True)
    for (name, a), b in zip(
        DSparkHead.from_pretrained(straight).state_dict().items(),
        DSparkHead.from_pretrained(broken).state_dict().values(),
        strict=True,
    ):
        torch.testing.assert_close(a, b, msg=name)


def test_nothing_to_resume(task, tmp_path):
    target, rows = task
    with pytest.raises(ValueError, match="no checkpoint to resume"):
        train(tiny_head(target), target, rows, arguments(tmp_path), resume=True)


OTHERS = {
    "block size": ({"block_size": 5}, {}, 48, "block_size 4, now 5"),
    "mask token": ({"mask_token_id": 3}, {}, 48, "mask_token_id 23, now 3"),
    "learning rate": ({}, {"learning_rate": 1e-3}, 48, "learning_rate 0.005, now 0.001"),
    "batch size": ({}, {"batch_size": 4}, 48, "batch_size 8, now 4"),
    "data": ({}, {}, 40, "data 48 sequences, .* now 40 sequences"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run with a checkpoint, its target and its data."""
    folder, target = tmp_path_factory.mktemp("begun"), tiny_target(vocab_size=24)
    rows = [{"input_ids": list(range(1, 16)), "loss_mask": [0] * 5 + [1] * 10}] * 48
    train(tiny_head(target), target, rows, arguments(folder, epochs=1, save_every=3))
    return folder, target, rows


@pytest.mark.parametrize("name", OTHERS)
def test_resuming_with_other_settings(name, begun, monkeypatch):
    """An error with both values, before any step."""
    folder, target, rows = begun
    fields, changed, count, named = OTHERS[name]
    monkeypatch.setattr(trainer, "training_step", None)
    with pytest.raises(ValueError, match=named):
        train(tiny_head(target, **fields), target, rows[:count], arguments(folder, epochs=2, **changed), resume=True)


def test_a_run_can_be_made_longer(begun):
    folder, target, rows = begun
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    train(tiny_head(target), target, rows, arguments(folder, epochs=2, save_every=30), resume=True)
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert steps == [6] and [json.loads(line)["step"] for line in lines] == [6, 10, 12]


def test_a_head_for_more_tokens_is_not_trained(task, tmp_path):
    target, rows = task
    with pytest.raises(ValueError, match="vocabulary of 22, the target one of 24"):
        train(tiny_head(tiny_target(vocab_size=22)), target, rows, arguments(tmp_path))


def test_head_of_another_target(task, tmp_path):
    target, rows = task
    with pytest.raises(ValueError, match="vocabulary"):
        train(tiny_head(tiny_target(vocab_size=16)), target, rows, arguments(tmp_path))


def test_warm_start_copies_layers_of_the_target(task):
    target, rows = task
    cold = tiny_head(target, num_hidden_layers=2)
    warm = tiny_head(target, num_hidden_layers=2)
    assert warm_start(warm, target) == [0, 1]
    for own, theirs in zip(warm.layers, target.model.layers, strict=False):
        assert torch.equal(own.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight)
        assert torch.equal(own.mlp.down_proj.weight, theirs.mlp.down_proj.weight)
    assert torch.equal(warm.norm.weight, target.model.norm.weight)
    projection = warm.fc.weight - cold.fc.weight
    assert projection.abs().sum().item() == pytest.approx(target.config.hidden_size, rel=1e-3)


def test_no_warm_start_where_shapes_differ(task):
    target, _ = task
    head = tiny_head(target, intermediate_size=48)
    before = {name: p.clone() for name, p in head.state_dict().items()}
    assert warm_start(head, target) == []
    assert all(torch.equal(p, before[name]) for name, p in head.state_dict().items())
    assert warm_start(tiny_head(target, num_hidden_layers=4), target) == []


def test_muon(task, tmp_path):
    target, rows = task
    train(tiny_head(target), target, rows, arguments(tmp_path, optimizer="muon", epochs=15))
    losses = losses_of(tmp_path)
    assert losses[-1] < 0.7 * losses[0]


def test_unknown_optimizer(task, tmp_path):
    target, rows = task
    with pytest.raises(ValueError, match="'sgd'"):
        train(tiny_head(target), target, rows, arguments(tmp_path, optimizer="sgd"))


def test_weight_of_the_cross_entropy():
    draft, goal = torch.randn(1, 2, 3, 5), torch.randn(1, 2, 3, 5)
    labels, supervised = torch.randint(0, 5, (1, 2, 3)), torch.ones(1, 2, 3, dtype=torch.bool)
    light, heavy = (losses_of_logits(draft, goal, None, labels, supervised, weight) for weight in (0.1, 1.0))
    assert heavy.total - light.total == pytest.approx(0.9 * light.ce.item(), rel=1e-5)
