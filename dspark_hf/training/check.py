"""A self-test of training: a head that sees nothing but a few texts must learn them by heart.

The texts are the target's own greedy answers to prompts of the data, so that a head that knows them drafts whole blocks
that are accepted. It is trained by the step that training has, and judged by the engine that decodes: where the two do
not agree on which row of a block follows which token, hardly a draft is accepted, however small the losses are.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch
from transformers import PreTrainedModel

from ..generation.compatibility import check_pair
from ..modeling_dspark import DSparkHead
from .data import Row, collate, left_padded, prompt_of
from .draft_vocabulary import choose_draft_vocabulary
from .step import check_trainable, share_frozen, target_states, training_step

ROWS = 8
# Tokens: of a prompt at most, its last ones, and of an answer beside whole blocks.
PROMPT = 128
BLOCKS = 6
# Share of the longest possible tau that must be reached; the steps within which, and between two looks at it.
ENOUGH = 0.9
STEPS, LOOK = 400, 50
ANCHORS = 16
LEARNING_RATE = 2e-3
CE_WEIGHT = 1.0


@dataclass(frozen=True)
class Check:
    """tau: tokens a round on the rows that were learnt. most: block and bonus token. steps, seconds: of training."""

    tau: float
    most: int
    steps: int
    seconds: float

    @property
    def passed(self) -> bool:
        return self.tau >= ENOUGH * self.most

    def __str__(self) -> str:
        said = f"tau {self.tau:.2f} of {self.most} after {self.steps} steps in {self.seconds:.0f} s"
        if self.passed:
            return f"check passed: {said}"
        return (
            f"check failed: {said}; {ENOUGH * self.most:.1f} are needed. Such a head does not learn {ROWS} rows by "
            "heart: it is too small, or training and decoding do not agree on what a row of a block predicts."
        )


def check(head: DSparkHead, target: PreTrainedModel, rows: list[Row], seed: int = 0) -> Check:
    """Train `head` on the target's answers to the prompts of the first rows until it drafts them.

    A reduced draft vocabulary is chosen anew, from the answers. The head is of no use afterwards.

    Raises:
        ValueError: when head and target do not fit, or the target ends all answers at once.
    """
    check_pair(target, head)
    check_trainable(head, target)
    head.to(target.device)
    target.requires_grad_(False).eval()
    most, started = head.config.gamma + 1, time.perf_counter()
    prompts = [prompt_of(row)[-PROMPT:] for row in rows[:ROWS]]
    texts = [row for row in _answers(target, prompts, 1 + BLOCKS * most) if sum(row["loss_mask"]) > 1]
    if not texts:
        raise ValueError("The target ends its answer to every prompt of the data at once: there is nothing to learn.")
    if head.config.draft_vocab_size is not None:
        choose_draft_vocabulary(head, target, texts)
    tau, steps, trained = 0.0, 0, _trained(head, target, texts, seed)
    while steps < STEPS and tau < ENOUGH * most:
        steps = [next(trained) for _ in range(LOOK)][-1]
        tau = tau_of(head, target, texts, 1 + BLOCKS * most)
    return Check(tau, most, steps, time.perf_counter() - started)


def _answers(target: PreTrainedModel, prompts: list[list[int]], length: int) -> list[Row]:
    """Prompts and the target's greedy answers of at most `length` tokens, which are supervised."""
    inputs = left_padded(prompts, target.device)
    output = target.generate(**inputs, max_new_tokens=length, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    ends = target.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    rows = []
    for prompt, answer in zip(prompts, output.tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
        rows.append({"input_ids": prompt + answer[:end], "loss_mask": [0] * len(prompt) + [1] * end})
    return rows


def _trained(head: DSparkHead, target: PreTrainedModel, rows: list[Row], seed: int) -> Iterator[int]:
    """The number of the step that was made, on and on."""
    batch = {name: x.to(target.device) for name, x in collate(rows).items()}
    embeddings, generator = share_frozen(head, target), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0)
    states = target_states(target, batch["input_ids"], head.config.target_layer_ids)
    for step in count(1):
        head.train()
        training_step(head, target, embeddings, batch, ANCHORS, generator, CE_WEIGHT, states).total.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield step


def tau_of(head: DSparkHead, target: PreTrainedModel, rows: list[Row], max_new_tokens: int) -> float:
    """Mean tokens a round of the prompts of rows answered greedily, in whole blocks; without the last round of a row,
    which ends where the row does, unless there is no other."""
    schedule = head.generation_config.num_assistant_tokens_schedule
    head.generation_config.num_assistant_tokens_schedule = "constant"
    output = target.generate(
        **left_padded([prompt_of(row)[-PROMPT:] for row in rows], target.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        assistant_model=head.eval(),
        return_dict_in_generate=True,
    )
    head.generation_config.num_assistant_tokens_schedule = schedule
    rounds = [n for row in output.dspark.committed_lengths for n in (row[:-1] or row)]
    return sum(rounds) / max(1, len(rounds))
