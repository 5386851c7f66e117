"""The head, the rounds and the losses against numbers that the reference implementations computed.

Two cases of the repository have their target; of the others it has what the target fed to the head. What needs more
runs on the whole set; see `conftest.whole_set`.
"""

import pytest
import torch
from conftest import FIXTURES, biases, case_of, cases, recordings, whole_blocks
from transformers import LogitsProcessorList

from dspark_hf.generation.drafting import Drafter
from dspark_hf.generation.processors import BlockProcessors
from dspark_hf.training.blocks import Blocks, attention_masks, labels_and_weights
from dspark_hf.training.losses import dspark_losses

TOLERANCE = 1e-4
# Of the reference, for every prompt.
NEW_TOKENS = 64


@pytest.fixture(scope="module", params=cases())
def parts(request):
    case = case_of(request.param)
    return case, case.target(), case.head()


@pytest.fixture(scope="module", params=recordings(), ids=lambda case: case.name + "-light" * (not case.is_whole))
def recorded(request):
    return request.param, request.param.any_target(), request.param.head()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_rounds_of_every_prompt(parts):
    """Output ids and the accepted length of every round; a longer limit lets the last recorded round finish."""
    case, target, head = parts
    for prompt in case.prompts:
        expected, ids = prompt["acceptance_lengths"], torch.tensor([prompt["input_ids"]])
        output = target.generate(
            input_ids=ids,
            assistant_model=head,
            max_new_tokens=NEW_TOKENS + 2 * head.config.block_size,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        assert output.sequences[0, : len(prompt["generate_ids"])].tolist() == prompt["generate_ids"]
        assert output.dspark.committed_lengths[0][: len(expected)] == expected


@pytest.mark.parametrize("rows", [1, 3])
def test_the_load_schedule_keeps_the_tokens(parts, rows):
    """As users call it: whatever the schedule drafts, the text is that of plain generate."""
    case, target, head = parts
    prompts = [prompt["input_ids"] for prompt in case.prompts][:rows]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    head.generation_config.num_assistant_tokens_schedule = "load"
    try:
        sequences = target.generate(
            input_ids=ids, attention_mask=mask, assistant_model=head, max_new_tokens=NEW_TOKENS, eos_token_id=None
        )
    finally:
        whole_blocks(head)
    for row, prompt in enumerate(case.prompts[:rows]):
        assert sequences[row, longest:].tolist() == prompt["generate_ids"][len(prompt["input_ids"]) :]


def test_rounds_in_one_batch(parts):
    """The same prompts, left-padded together: every row accepts what it accepts alone."""
    case, target, head = parts
    prompts = [prompt["input_ids"] for prompt in case.prompts]
    longest = max(map(len, prompts))
    output = target.generate(
        input_ids=torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
        assistant_model=head,
        max_new_tokens=NEW_TOKENS + 2 * head.config.block_size,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    for row, prompt in enumerate(case.prompts):
        new = prompt["generate_ids"][len(prompt["input_ids"]) :]
        assert output.sequences[row, longest:].tolist()[: len(new)] == new
        expected = prompt["acceptance_lengths"]
        assert output.dspark.committed_lengths[row][: len(expected)] == expected


def test_drafts_are_accepted_as_by_the_reference(recorded):
    """The accepted length of every round whose context is known, from its draft and the target's own text."""
    case, target, head = recorded
    checked = 0
    for i, prompt in enumerate(case.prompts):
        if f"prompt{i}.features" not in case.tensors and not case.is_whole:
            continue
        text, known = prompt["generate_ids"], case.features(i, target, head).shape[1]
        lengths = prompt["acceptance_lengths"]
        starts = [len(prompt["input_ids"]) + sum(lengths[:r]) for r in range(len(lengths))]
        starts = [start for start in starts if start <= known]
        drafts = case.drafts(i, starts, target, head)
        for start, draft, expected in zip(starts, drafts, lengths, strict=False):
            follows = text[start + 1 :]
            pairs = list(zip(draft, follows, strict=False))
            accepted = next((k for k, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
            # The last round may go beyond the recorded text.
            assert accepted == min(expected - 1, len(follows))
        checked += len(drafts)
        assert i > 0 or len(drafts) == len(lengths)
    assert checked > 6


def test_numbers_of_every_round(recorded):
    """Features, hidden states, logits, draft tokens and confidence of the recorded rounds."""
    case, target, head = recorded
    for i, prompt in enumerate(case.prompts):
        if f"prompt{i}.rounds.start" in case.tensors:
            features = case.features(i, target, head)
            check_rounds(target, head, prompt, rounds_of(case, i), features)
            if f"prompt{i}.context_features" in case.tensors:
                close(features[0, : len(prompt["input_ids"])], case.tensors[f"prompt{i}.context_features"])
    assert len(rounds_of(case, 0)["start"]) == len(rounds_of(case, 1)["start"]) == 6


def rounds_of(case, i: int) -> dict[str, torch.Tensor]:
    start = f"prompt{i}.rounds."
    return {name.removeprefix(start): tensor for name, tensor in case.tensors.items() if name.startswith(start)}


@torch.no_grad()
def check_rounds(target, head, prompt, expected, features):
    drafter, seen = Drafter(head, target, 1), 0
    sampler = BlockProcessors(LogitsProcessorList(), do_sample=False).draft_sampler(None)
    for r, start in enumerate(expected["start"].tolist()):
        anchor = torch.tensor([prompt["generate_ids"][start]])
        assert anchor.item() == expected["anchor_id"][r]
        drafter.append(features[:, seen:start], [start - seen])
        hidden = drafter._hidden(anchor, None, *drafter.take(None))
        seen = start
        close(hidden[0], expected["hidden"][r])
        predictions = hidden[:, -head.config.gamma :]
        base = head.base_logits(predictions, drafter.embeddings)
        if "base_logits" in expected:
            close(base[0], expected["base_logits"][r])
        block = head.sample_block(hidden, anchor, drafter.embeddings, head.config.gamma, sampler)
        assert block.tokens.tolist() == [expected["draft_tokens"][r].tolist()]
        if "draft_vocab_tokens" in expected:
            assert head.draft_tokens[expected["draft_vocab_tokens"][r]].tolist() == block.tokens[0].tolist()
        if head.markov_head is not None:
            corrected = corrected_logits(head, predictions, base, anchor, block.tokens)
            close(corrected[0], expected["corrected_logits"][r])
        assert (block.confidence_logits is None) == ("confidence_logits" not in expected)
        if block.confidence_logits is not None:
            close(block.confidence_logits[0], expected["confidence_logits"][r])


def corrected_logits(head, hidden, base, anchor, tokens):
    previous = torch.cat([anchor[:, None], tokens[:, :-1]], dim=1)
    return base + biases(head, hidden, previous)


@pytest.mark.parametrize("rows_at_once", [None, 5], ids=["whole", "chunks"])
def test_training_forward_losses_and_gradients(parts, rows_at_once):
    case, target, head = parts
    if not case.name.startswith(("deepspec", "specforge")):
        pytest.skip("the loss of another trainer")
    t = {name.removeprefix("train."): value for name, value in case.tensors.items() if name.startswith("train.")}
    expected = case.expected["train"]
    blocks, size = Blocks(t["anchor_positions"], t["block_keep_mask"]), head.config.block_size
    labels, supervised = labels_and_weights(t["input_ids"], t["loss_mask"], blocks, size)
    assert torch.equal(supervised, t["eval_mask"])
    assert torch.equal(labels[supervised], t["target_ids"][supervised])
    head.zero_grad()
    masks = attention_masks(blocks, t["input_ids"].shape[1], head.mask_rules, size)
    inputs = t["input_ids"], t["context_features"], blocks.anchors, masks, head.share_embeddings(target)
    hidden, logits, confidence = head(*inputs)
    close(hidden[supervised], t["hidden"][supervised])
    close(logits[supervised], t["draft_logits"][supervised])
    if confidence is not None:
        close(confidence[supervised], t["confidence_pred"][supervised])

    def compare(known):
        goal = t["aligned_target_logits"], lambda rows: rows
        others = known.confidence_logits, labels, supervised
        options = {"parameters": known.parameters, "rows_at_once": rows_at_once}
        return dspark_losses(known.made_of, known.logits, *goal, *others, **options)

    losses = head(*inputs, finish=compare)
    assert losses.ce.item() == pytest.approx(expected["ce_loss"], abs=TOLERANCE)
    assert losses.l1.item() == pytest.approx(expected["l1_loss"], abs=TOLERANCE)
    if confidence is not None:
        assert losses.confidence.item() == pytest.approx(expected["confidence_loss"], abs=TOLERANCE)
    assert losses.total.item() == pytest.approx(expected["total_loss"], abs=TOLERANCE)
    losses.total.backward()
    close(head.fc.weight.grad, t["grad.fc.weight"])
    norms = {name: p.grad.norm().item() for name, p in head.named_parameters() if name in expected["grad_norms"]}
    assert norms == pytest.approx(expected["grad_norms"], abs=TOLERANCE)


def test_fixtures_stay_small():
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()) < 8_000_000
