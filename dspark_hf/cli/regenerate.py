"""Training data: a target's own answers."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from transformers import AutoTokenizer

from ..checkpoints.files import check_source
from ..heads import head_of
from .common import (
    EMBEDDED,
    Dtype,
    Limit,
    MaxNewTokens,
    Model,
    app,
    is_embedded,
    load,
    note,
    output_file,
    progress,
    say,
)

if TYPE_CHECKING:
    from ..training.regenerate import Totals


@app.command()
def regenerate(
    data: Annotated[
        str,
        typer.Option(
            help="Prompts: a .jsonl, .json or .parquet file, or a Hub data set such as openai/gsm8k:main:train. Rows "
            "have messages, a prompt or a question."
        ),
    ],
    output: Annotated[Path, output_file("--output", help="File of rows for `dspark-hf train`, a .jsonl.")],
    model: Model = None,
    head: Annotated[
        str | None, typer.Option(help="Draft head for --model. Default: a known one, else decoding without drafts.")
    ] = None,
    no_draft: Annotated[bool, typer.Option("--no-draft", help="Decode without a head.")] = False,
    max_new_tokens: MaxNewTokens = 2048,
    max_length: Annotated[int, typer.Option(min=3, help="Tokens of prompt and answer, as of `train`.")] = 4096,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, show_default=False, help="0 is greedy. Default: as the model's generation config samples."),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, show_default=False, help="Default: as the model's generation config.")
    ] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let models think that can.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that decode at once, in each process.")] = 16,
    limit: Limit = None,
    seed: int = 0,
    dtype: Dtype = "auto",
) -> None:
    """Let a target answer prompts: a head learns best from what its target writes.

    A run that was interrupted goes on where it was. Several processes: accelerate launch -m dspark_hf.cli regenerate ..
    """
    from ..evaluation.runs import Processes
    from ..training import regenerate as answers

    if output.suffix != ".jsonl":
        raise ValueError(f"--output {output}: expected a .jsonl file, which `dspark-hf train --data` reads.")
    embedded = is_embedded(model)
    if not embedded:
        check_source(model)
    tokenizer = AutoTokenizer.from_pretrained(model or EMBEDDED)
    # What is wrong with the data is said before the models are loaded.
    prompts = answers.load_prompts(data, tokenizer, max_length, thinking, limit)
    processes = Processes()
    if not embedded and head is None and not no_draft:
        head = _known_head(model)
    target, draft_head, _ = load(model, head, dtype, needs_head=False)
    drafting = None if no_draft else draft_head
    settings = answers.Settings(max_new_tokens, max_length, temperature, top_p, thinking, seed, batch_size)
    config = answers.sampling_config(target, settings)
    run = answers.describe_run("embedded" if embedded else model, target.dtype, prompts, settings, config)
    rows = answers.Rows(output, run, processes.index)
    if processes.index == 0:
        rows.begin()
    processes.wait()
    if rows.begin():
        done = rows.done()
        processes.wait()
        todo = [number for number in range(len(prompts)) if number not in done][processes.index :: processes.count]
        own, totals, started = {number: prompts[number] for number in todo}, answers.Totals(), time.perf_counter()
        with progress("answering") if processes.index == 0 else nullcontext(lambda text: None) as report:
            for answer in answers.regenerate(target, drafting, own, settings, config):
                rows.append(answers.row_of(prompts[answer.prompt], answer, tokenizer))
                totals += answers.Totals.of(answer)
                ended = min(len(done) + totals.answers * processes.count, len(prompts))
                speed = processes.count * totals.tokens / (time.perf_counter() - started)
                report(f"{ended} of {len(prompts)} prompts answered, {speed:.0f} tokens/s")
        totals = sum(processes.gather([totals]), answers.Totals())
        if processes.index == 0:
            rows.finish()
            say(_described(totals, time.perf_counter() - started, drafting is not None), style="dim")
    processes.close()
    if processes.index == 0:
        options = f"--model {'embedded' if embedded else model} --data {output} --output my-head"
        say(f"{len(prompts)} rows in {output}: dspark-hf train {options}")


def _known_head(model: str) -> str | None:
    try:
        head = head_of(model)
    except ValueError:
        note(f"No head is known for {model}: decoding without drafts. --head names one.")
        return None
    note(f"head: {head}")
    return head


def _described(totals: "Totals", seconds: float, drafts: bool) -> str:
    tau = f", tau {totals.tau:.2f}" if drafts and totals.tau else ""
    return (
        f"{totals.answers} answers, {totals.tokens} tokens in {seconds:.0f} s: {totals.tokens / seconds:.0f} tokens/s"
        f"{tau}; {totals.cut} reached a limit before their end"
    )
