"""The target's own answers to prompts: the text that a head learns best from.

The engine of continuous batching decodes them: prompts join as others end. A head makes that faster and changes no
distribution. Without one the same engine decodes without drafts: it takes every target that a head can be trained for
(hybrids too, which transformers' own `generate_batch` does not), and a run that was begun without a head goes on with
one.
"""

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_dspark import DSparkConfig
from ..evaluation.prompts import chat_as_model_input, sampling, turns_of
from ..evaluation.runs import append_lines, check_same_run, read_lines
from ..modeling_dspark import DSparkHead
from .data import check_messages, read_data, usable

# Seconds between looks whether the thread that decodes is still there.
LOOK = 1.0
# Requests that wait for a slot, for each that has one, so that no slot is ever idle.
AHEAD = 2
# Of the keys of a generation config those that say nothing of the text.
NOT_OF_TEXT = ("transformers_version", "_from_model_config")


@dataclass(frozen=True)
class Settings:
    """max_new_tokens: of an answer. max_length: of a prompt and its answer, as in training. temperature, top_p: instead
    of what the target's generation config says; temperature 0 is greedy. thinking: what chat templates that know
    `enable_thinking` are told. batch_size: prompts that decode at once."""

    max_new_tokens: int = 2048
    max_length: int = 4096
    temperature: float | None = None
    top_p: float | None = None
    thinking: bool = False
    seed: int = 0
    batch_size: int = 16


@dataclass(frozen=True)
class Prompt:
    """ids: what the target goes on from. messages: the chat that they are, `None` where the data hold tokens only."""

    ids: list[int]
    messages: list[dict[str, Any]] | None


@dataclass(frozen=True)
class Answer:
    """prompt: its index. tokens: the end-of-sequence token included. rounds: passes of the target behind the prompt.
    is_cut: whether a limit ended it."""

    prompt: int
    tokens: list[int]
    rounds: int
    is_cut: bool


# -- Prompts -----------------------------------------------------------------------------------------------------------


def load_prompts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = Settings.max_length,
    thinking: bool = False,
    limit: int | None = None,
) -> list[Prompt]:
    """The prompts of the first `limit` rows of a source; see `data.load_rows`. Rows that cannot be used are left out
    with one warning.

    A row is a chat in `messages`, whose last message is left out where the assistant wrote it; a `prompt` or
    `question`; or `input_ids` with a `loss_mask`, of which the prompt goes up to the last stretch that is supervised.

    Raises:
        ValueError: when no row can be used.
    """
    data, columns = read_data(source)

    def prompt(row: Any) -> Prompt:
        found = _from_tokens(row) if {"input_ids", "loss_mask"} <= columns else _from_text(row, tokenizer, thinking)
        if not 0 < len(found.ids) <= max_length - 2:
            raise ValueError(
                f"a prompt of {len(found.ids)} tokens leaves no room for an answer within {max_length} (--max-length)"
            )
        return found

    return usable(islice(data, limit), prompt, source, "answered")


def _from_tokens(row: dict[str, Any]) -> Prompt:
    ids, mask = row["input_ids"], row["loss_mask"]
    end = len(mask)
    while end and not mask[end - 1]:
        end -= 1
    while end and mask[end - 1]:
        end -= 1
    return Prompt(list(ids[:end]), None)


def _from_text(row: Any, tokenizer: PreTrainedTokenizerBase, thinking: bool) -> Prompt:
    if isinstance(row, dict) and row.get("messages") is not None:
        messages = row["messages"]
        check_messages(messages)
        # Columns that only some messages have are filled with nothing by `datasets`.
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
    else:
        turns = turns_of(row, "The row")
        if len(turns) > 1:
            raise ValueError(f"{len(turns)} `turns`; write chats as `messages`")
        messages = [{"role": "user", "content": turns[0]}]
    if not messages:
        raise ValueError("nothing comes before the answer")
    text = chat_as_model_input(messages, tokenizer, thinking)
    ids = tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"]
    return Prompt(list(ids), messages)


# -- Answers -----------------------------------------------------------------------------------------------------------


def sampling_config(model: PreTrainedModel, settings: Settings) -> GenerationConfig:
    """How answers are sampled: as the target's generation config says, but for what the settings do."""
    config = copy.deepcopy(model.generation_config)
    if settings.temperature == 0:
        unset = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p"))
        config.update(do_sample=False, **unset)
    elif settings.temperature is not None or settings.top_p is not None:
        if not config.do_sample:
            config.update(**sampling(1.0))
        given = {"temperature": settings.temperature, "top_p": settings.top_p}
        config.update(**{name: value for name, value in given.items() if value is not None})
    return config


def regenerate(
    model: PreTrainedModel,
    head: DSparkHead | None,
    prompts: dict[int, Prompt],
    settings: Settings,
    config: GenerationConfig | None = None,
) -> Iterator[Answer]:
    """The target's answers to prompts by index, as they end. What is sampled depends on the seed, a prompt's index and
    how its head schedules drafts, not on the other prompts.

    Args:
        head: drafts; `None` to decode without drafts.
        config: see [`sampling_config`], which it is by default.

    Raises:
        ValueError: for a prompt and limit that there is no memory for, before anything is decoded; and for an answer
            that failed, of a target whose logits are no numbers for instance.
    """
    batching = ContinuousBatchingConfig(max_requests_per_batch=settings.batch_size, allow_block_sharing=False)
    drafting = undrafting_head(model) if head is None else head
    config = sampling_config(model, settings) if config is None else config
    manager = model.init_continuous_batching(config, batching, assistant_model=drafting)
    manager.drafts = head is not None
    # The longest first: whether there is memory for it is known at once, and slots need not grow later.
    waiting = iter(sorted(prompts.items(), key=lambda item: -len(item[1].ids)))
    running: dict[str, int] = {}

    def send(count: int) -> None:
        for number, prompt in islice(waiting, count):
            limit = min(settings.max_new_tokens, settings.max_length - len(prompt.ids))
            # Prompts of one run and runs of two seeds share no numbers.
            seed = (settings.seed << 32) + number
            running[manager.add_request(prompt.ids, max_new_tokens=limit, seed=seed)] = number

    send((1 + AHEAD) * settings.batch_size)
    manager.start()
    try:
        while running:
            result = manager.get_result(timeout=LOOK)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("The thread that decodes has ended before the answers had.")
                continue
            number = running.pop(result.request_id)
            if result.error is not None:
                raise ValueError(f"Prompt {number + 1} could not be answered: {result.error}")
            tokens = result.generated_tokens
            yield Answer(number, tokens, result.rounds, tokens[-1] not in manager.ends)
            send(1)
    finally:
        manager.stop(hard_stop=True)


def undrafting_head(model: PreTrainedModel) -> DSparkHead:
    """A head of next to no size, for an engine that never drafts."""
    small = {"intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    config = DSparkConfig.from_target(
        model.config,
        block_size=2,
        num_hidden_layers=1,
        markov_rank=0,
        target_layer_ids=[0],
        enable_confidence_head=False,
        **small,
    )
    return DSparkHead(config).eval().to(model.device, model.dtype)


# -- Rows --------------------------------------------------------------------------------------------------------------


def row_of(prompt: Prompt, answer: Answer, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A row of training data: the very tokens, of which the answer's are supervised, and the chat for people to read
    and for other trainers; encoding it again need not give the same tokens."""
    row: dict[str, Any] = {"prompt": answer.prompt, "input_ids": prompt.ids + answer.tokens}
    row["loss_mask"] = [0] * len(prompt.ids) + [1] * len(answer.tokens)
    if prompt.messages is not None:
        text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        row["messages"] = [*prompt.messages, {"role": "assistant", "content": text}]
    return row


def describe_run(
    model: str, dtype: torch.dtype, prompts: list[Prompt], settings: Settings, config: GenerationConfig
) -> dict[str, Any]:
    """What a run that goes on must share with the one that it goes on from."""
    said = {key: value for key, value in config.to_diff_dict().items() if key not in NOT_OF_TEXT}
    digest = hashlib.sha256(json.dumps([prompt.ids for prompt in prompts]).encode()).hexdigest()
    run = {"target": model, "dtype": str(dtype).removeprefix("torch."), "prompts": len(prompts), "sha256": digest}
    limits = {key: value for key, value in asdict(settings).items() if key in ("max_new_tokens", "max_length", "seed")}
    # As JSON gives it back.
    return json.loads(json.dumps(run | {"settings": limits, "generation_config": said}))


class Rows:
    """The rows of a run: `OUTPUT.part-N.jsonl` beside the output for process N as long as the run lasts, the output
    itself at its end, in the order of the prompts. `OUTPUT.run.json` says what run it is.

    Args:
        output: a `.jsonl` file. run: see [`describe_run`].
    """

    def __init__(self, output: Path, run: dict[str, Any], process: int = 0):
        self.output, self.run = output, run
        self.part = output.with_name(f"{output.stem}.part-{process}.jsonl")

    def begin(self) -> bool:
        """Whether anything is to be done.

        Raises:
            ValueError: when the output is of another run.
        """
        path = run_file(self.output)
        if path.is_file():
            check_same_run(path, json.loads(path.read_text(encoding="utf-8")), self.run)
        elif self.output.exists():
            raise ValueError(f"{str(self.output)!r} is there already, and no run of `regenerate` wrote it.")
        else:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.run, indent=2) + "\n", encoding="utf-8")
        return not self.output.exists()

    def done(self) -> dict[int, tuple[Path, int]]:
        """Where the row of every prompt that has been answered begins: its file, and the place in it."""
        return {
            line["prompt"]: (path, place)
            for path in self._parts()
            for place, line in read_lines(path)
            if isinstance(line, dict) and "prompt" in line
        }

    def append(self, row: dict[str, Any]) -> None:
        append_lines(self.part, [row])

    def finish(self) -> None:
        """Write the output, all of it or nothing, and drop the parts."""
        unfinished, places = self.output.with_name(f"{self.output.name}.unfinished"), self.done()
        with unfinished.open("wb") as output, ExitStack() as stack:
            files = {path: stack.enter_context(path.open("rb")) for path in self._parts()}
            for _, (path, place) in sorted(places.items()):
                files[path].seek(place)
                output.write(files[path].readline())
        os.replace(unfinished, self.output)
        for path in self._parts():
            path.unlink()

    def _parts(self) -> Iterable[Path]:
        return sorted(self.output.parent.glob(f"{self.output.stem}.part-*.jsonl"))


@dataclass(frozen=True)
class Totals:
    """What answers came to. cut: answers that a limit ended."""

    answers: int = 0
    tokens: int = 0
    rounds: int = 0
    cut: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def of(cls, answer: Answer) -> "Totals":
        return cls(1, len(answer.tokens), answer.rounds, int(answer.is_cut))

    @property
    def tau(self) -> float | None:
        """Tokens a round of a row, `None` where there was none. A prompt's own pass is no round."""
        return (self.tokens - self.answers) / self.rounds if self.rounds else None


def run_file(output: str | Path) -> Path:
    """The file beside a file of rows that says how they were made."""
    return Path(output).with_suffix(".run.json")
