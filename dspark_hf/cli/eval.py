"""Evaluation of a head."""

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..evaluation.prompts import DOMAINS
from .common import (
    Assistant,
    BaselineHead,
    Dtype,
    Head,
    Limit,
    Model,
    app,
    entries,
    load,
    load_others,
    output_file,
    progress,
    say,
    show,
    write_json,
)


@app.command("eval")
def evaluate(
    model: Model = None,
    head: Head = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="JSON lines with turns, gsm8k or code (which ship with the package), or a Hub data set such as "
            "openai/gsm8k:main:test. Comma-separated or several times. Default: gsm8k,code."
        ),
    ] = None,
    benchmarks: Annotated[
        str | None,
        typer.Option(
            help="Benchmarks of the paper, from the Hub: all, or gsm8k,math500,aime25,mbpp,humaneval,livecodebench,"
            "mt-bench,alpaca,arena-hard-v2. Instead of the default of --data, or beside --data."
        ),
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option(help="Also measure other ways to draft: mtp (the target's own layers for it), lookup, stock."),
    ] = None,
    assistant: Assistant = None,
    baseline_head: BaselineHead = None,
    results: Annotated[
        Path | None,
        output_file("--results", help="JSON file for the results; the prompts done so far are kept beside it."),
    ] = None,
    plot: Annotated[
        Path | None, output_file("--plot", help="Picture of acceptance and confidence, such as eval.png.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens a turn at most; DeepSpec takes 2048.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy; the paper's tables are at 1.")] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 8,
    first_turn: Annotated[
        bool, typer.Option("--first-turn", help="Answer only the first of a prompt's turns, as DeepSpec does.")
    ] = False,
    thinking: Annotated[
        bool, typer.Option("--thinking", help="Let models think that can; released heads were trained without.")
    ] = False,
    limit: Limit = None,
    seed: int = 0,
    dtype: Dtype = "auto",
) -> None:
    """Accepted length, verify rate, acceptance per position and quality of the confidence, by data set.

    Whole blocks are drafted and verified every round, as in the paper's tables. A run with --results that was
    interrupted goes on where it was. Several processes: accelerate launch -m dspark_hf.cli eval ...
    """
    from ..evaluation import results as reports
    from ..evaluation.acceptance import summarise
    from ..evaluation.benchmarks import load_benchmark, names_of, paper_of
    from ..evaluation.comparison import as_table, check_methods, compare
    from ..evaluation.data_sets import check_names, load_data_sets
    from ..evaluation.evaluate import EvalSettings, Log
    from ..evaluation.evaluate import evaluate as records_of
    from ..evaluation.plots import check_picture
    from ..evaluation.report import device_name
    from ..evaluation.runs import Processes

    if plot is not None:
        check_picture(plot)
    names = names_of(entries("--benchmarks", benchmarks)) if benchmarks else []
    chosen = data or ([] if benchmarks else DOMAINS)
    sets = load_data_sets([source for given in chosen for source in entries("--data", given)], limit)
    sets += [load_benchmark(name, limit) for name in names]
    check_names(sets)
    processes = Processes()
    target, draft_head, tokenizer = load(model, head, dtype)
    others = load_others(target, assistant, baseline_head)
    methods = (entries("--baselines", baselines) if baselines else []) + others.methods
    check_methods(target, methods, others)
    settings = EvalSettings(max_new_tokens, temperature, batch_size, first_turn, thinking, seed)
    run = {
        "head": "embedded" if model is None else draft_head.name_or_path,
        "fingerprint": reports.fingerprint(draft_head),
        "target": model or "embedded",
        "device": device_name(target.device),
        "dtype": str(target.dtype).removeprefix("torch."),
        "settings": asdict(settings),
        "data": [one.identity for one in sets],
    }
    log = Log(results, run, processes.index) if results is not None else None
    done = log.read() if log is not None else []
    processes.wait()
    total, new = sum(len(one.conversations) for one in sets), []
    with progress("evaluating") if processes.index == 0 else nullcontext(lambda text: None) as report:
        for found in records_of(target, draft_head, tokenizer, sets, settings, done, processes.index, processes.count):
            new += found
            if log is not None:
                log.append(found)
            report(f"evaluated {min(len(done) + len(new) * processes.count, total)} of {total} prompts")
    records = {(record.data, record.prompt): record for record in done + processes.gather(new)}
    processes.close()
    if processes.index > 0:
        return
    records = [records[one.name, i] for one in sets for i in range(len(one.conversations))]
    found = [summarise(one.name, [r for r in records if r.data == one.name]) for one in sets]
    paper = paper_of(run["target"])
    for table in reports.as_tables(found, paper):
        show(table)
    say(f"{max_new_tokens} new tokens, {run['dtype']}, {run['device']}", style="dim")
    if plot is not None:
        reports.plot(found, records, plot)
    if results is not None:
        write_json(results, reports.as_json(run, found))
    if methods:
        with progress("measuring other ways to draft") as report:
            beside = [*compare(target, draft_head, tokenizer, sets, methods, others, settings, report)]
        show(as_table(beside, settings))
        if results is not None:
            write_json(results, reports.as_json(run, found) | {"compared": [asdict(one) for one in beside]})
