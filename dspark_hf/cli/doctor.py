"""Why a head accepts little."""

from pathlib import Path
from typing import Annotated

import typer

from ..evaluation.prompts import read_prompts
from .common import (
    DraftWindow,
    Dtype,
    Head,
    Limit,
    MaxNewTokens,
    Model,
    Prompts,
    app,
    load,
    output_file,
    progress,
    say,
    set_window,
    show,
    write_json,
)


@app.command()
def doctor(
    model: Model = None,
    head: Head = None,
    prompts: Prompts = None,
    max_new_tokens: MaxNewTokens = 64,
    draft_window: DraftWindow = None,
    limit: Limit = 8,
    json_file: Annotated[Path | None, output_file("--json", help="Also write the findings to this file.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Say why a head accepts little, and what mends it. Exit status 1 when something is wrong.

    Whole blocks are drafted greedily for at least five prompts; then every key of the head's config that trainers
    disagree on is tried otherwise.
    """
    from ..evaluation import doctor_report as report
    from ..evaluation.doctor import examine

    texts = read_prompts(prompts)[:limit]
    target, draft_head, tokenizer = load(model, head, dtype)
    set_window(draft_head, draft_window)
    with progress("examining") as tell:
        found = examine(target, draft_head, tokenizer, texts, max_new_tokens, tell)
    if found.measured is not None:
        for table in report.as_tables(found.measured):
            show(table)
        say(report.summary(found.measured), style="dim")
    for line, style in report.as_lines(found):
        say(line, style=style)
    if json_file is not None:
        write_json(json_file, report.as_json(found))
    if found.findings:
        raise typer.Exit(1)
