"""The head, the rounds and the losses against numbers that the reference implementations computed.

DSPARK_FIXTURES=FOLDER runs the same checks on the cases in another folder of the same layout.
"""

import pytest
import torch
from conftest import FIXTURES, Case, cases
from safetensors.torch import load_file
from transformers import LogitsProcessorList

from dspark_hf.generation.drafting import Drafter
from dspark_hf.generation.processors import BlockProcessors
from dspark_hf.generation.target import Target
from dspark_hf.training.blocks import Blocks, attention_mask, labels_and_weights
from dspark_hf.training.losses import dspark_losses

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=cases())
def parts(request):
    case = Case(FIXTURES / request.param)
    return case, case.target(), case.head(), load_file(case.folder / "expected.safetensors")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_rounds_of_every_prompt(parts):
    """Output ids and the accepted length of every round; a longer limit lets the last recorded round finish."""
    case, target, head, _ = parts
    for prompt in case.expected["prompts"]:
        expected, ids = prompt["acceptance_lengths"], torch.tensor([prompt["input_ids"]])
        output = target.generate(
            input_ids=ids,
            assistant_model=head,
            max_new_tokens=case.expected["max_new_tokens"] + 2 * head.config.block_size,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        assert output.sequences[0, : len(prompt["generate_ids"])].tolist() == prompt["generate_ids"]
        assert output.dspark.accepted_lengths[0][: len(expected)] == expected


def test_rounds_in_one_batch(parts):
    """The same prompts, left-padded together: every row accepts what it accepts alone."""
    case, target, head, _ = parts
    prompts = [prompt["input_ids"] for prompt in case.expected["prompts"]]
    longest = max(map(len, prompts))
    output = target.generate(
        input_ids=torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
        assistant_model=head,
        max_new_tokens=case.expected["max_new_tokens"] + 2 * head.config.block_size,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    for row, prompt in enumerate(case.expected["prompts"]):
        new = prompt["generate_ids"][len(prompt["input_ids"]) :]
        assert output.sequences[row, longest:].tolist()[: len(new)] == new
        expected = prompt["acceptance_lengths"]
        assert output.dspark.accepted_lengths[row][: len(expected)] == expected


def test_numbers_of_every_round(parts):
    """Features, hidden states, base and corrected logits, draft tokens and confidence of the recorded rounds."""
    case, target, head, tensors = parts
    for i, prompt in enumerate(case.expected["prompts"]):
        recorded = {
            key.removeprefix(f"prompt{i}.rounds."): value
            for key, value in tensors.items()
            if key.startswith(f"prompt{i}.rounds.")
        }
        check_rounds(target, head, prompt, recorded, tensors.get(f"prompt{i}.context_features"))


@torch.no_grad()
def check_rounds(target, head, prompt, recorded, prompt_features):
    sequence = torch.tensor([prompt["generate_ids"]])
    runner, drafter = Target(target, head.config.target_layer_ids), Drafter(head, target, 1)
    processors = BlockProcessors(LogitsProcessorList(), do_sample=False)
    features = runner.forward(sequence, runner.new_cache(1)).features
    if prompt_features is not None:
        close(features[0, : len(prompt["input_ids"])], prompt_features)
    seen = 0
    for r, start in enumerate(recorded["start"].tolist()):
        anchor = sequence[:, start]
        assert anchor.item() == recorded["anchor_id"][r]
        drafter.remember(features[:, seen:start], [start - seen])
        hidden = drafter._hidden(anchor, None)
        seen = start
        close(hidden[0], recorded["hidden"][r])
        base = head.base_logits(hidden, drafter.tables)
        close(base[0], recorded["base_logits"][r])
        select = processors.drafting(None, [0])
        block = head.sample_block(hidden, anchor, drafter.tables, head.config.block_size, select)
        assert block.tokens.tolist() == [recorded["draft_tokens"][r].tolist()]
        corrected = corrected_logits(head, hidden, base, anchor, block.tokens)
        close(corrected[0], recorded["corrected_logits"][r])
        assert (block.confidence_logits is None) == ("confidence_logits" not in recorded)
        if block.confidence_logits is not None:
            close(block.confidence_logits[0], recorded["confidence_logits"][r])


def corrected_logits(head, hidden, base, anchor, tokens):
    if head.markov_head is None:
        return base
    previous = torch.cat([anchor[:, None], tokens[:, :-1]], dim=1)
    return base + head.markov_head.teacher_forced(hidden, previous)


def test_training_forward_losses_and_gradients(parts):
    case, target, head, tensors = parts
    t = {key.removeprefix("train."): value for key, value in tensors.items() if key.startswith("train.")}
    expected = case.expected["train"]
    blocks, size = Blocks(t["anchor_positions"], t["block_keep_mask"]), head.config.block_size
    labels, supervised = labels_and_weights(t["input_ids"], t["loss_mask"], blocks, size)
    assert torch.equal(supervised, t["eval_mask"])
    assert torch.equal(labels[supervised], t["target_ids"][supervised])
    head.zero_grad()
    hidden, logits, confidence = head(
        t["input_ids"],
        t["context_features"],
        blocks.anchors,
        attention_mask(blocks, t["input_ids"].shape[1], size),
        head.share_tables(target),
    )
    close(hidden[supervised], t["hidden"][supervised])
    close(logits[supervised], t["draft_logits"][supervised])
    if confidence is not None:
        close(confidence[supervised], t["confidence_pred"][supervised])
    losses = dspark_losses(logits, t["aligned_target_logits"], confidence, labels, supervised)
    assert losses.ce.item() == pytest.approx(expected["ce_loss"], abs=TOLERANCE)
    assert losses.l1.item() == pytest.approx(expected["l1_loss"], abs=TOLERANCE)
    if confidence is not None:
        assert losses.confidence.item() == pytest.approx(expected["confidence_loss"], abs=TOLERANCE)
    assert losses.total.item() == pytest.approx(expected["total_loss"], abs=TOLERANCE)
    losses.total.backward()
    close(head.fc.weight.grad, t["grad.fc.weight"])
    norms = {name: p.grad.norm().item() for name, p in head.named_parameters() if name in expected["grad_norms"]}
    assert norms == pytest.approx(expected["grad_norms"], abs=TOLERANCE)
