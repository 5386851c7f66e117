"""Step costs on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from .common import Dtype, Head, Model, app, load, output_file, progress, say, show, write_json

NEW_TOKENS = 48


@app.command()
def profile(
    model: Model = None,
    head: Head = None,
    rows: Annotated[int, typer.Option(min=1, help="Largest batch to look at.")] = 32,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the longest row.")] = 256,
    again: Annotated[bool, typer.Option("--again", help="Learn more, even where something is stored.")] = False,
    plot: Annotated[Path | None, output_file("--plot", help="Picture of the step times, such as profile.png.")] = None,
    json_file: Annotated[Path | None, output_file("--json", help="Also write the times to this file.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Show what a step costs on this machine, which is what the load schedule goes by. Generation learns it; where
    nothing is stored yet, a few prompts are answered first."""
    from ..evaluation import profile as known
    from ..evaluation.plots import check_picture
    from ..evaluation.prompts import DEFAULT_PROMPTS, encode
    from ..generation import experience
    from ..generation.target import Target

    if plot is not None:
        check_picture(plot)
    target, draft_head, tokenizer = load(model, head, dtype)
    runner = Target(target, draft_head.config.target_layer_ids)
    costs = experience.costs_of(draft_head, runner)
    sizes = sorted({1 << i for i in range(0, rows.bit_length(), 2)} | {rows})
    if costs.pace is None or again:
        draft_head.generation_config.num_assistant_tokens_schedule = "load"
        with progress("answering prompts") as report:
            for size in sizes:
                report(f"{size} at a time")
                prompts = [DEFAULT_PROMPTS[i % len(DEFAULT_PROMPTS)] for i in range(size)]
                batch = encode(prompts, tokenizer, target.device)
                target.generate(**batch, assistant_model=draft_head, max_new_tokens=NEW_TOKENS, do_sample=False)
        experience.store(draft_head, runner, at_once=True)
    times = known.times(costs, sizes, context)
    for part in known.as_tables(times, sizes, context):
        show(part)
    identity = experience.identity_of(target, draft_head, runner.device)
    path = str(experience.path_of(identity))
    say(f"{identity['device']}, {target.dtype}, stored in {path}", style="dim")
    if plot is not None:
        known.plot(times, sizes, plot)
    if json_file is not None:
        content = {kind: values.tolist() for kind, values in times.items()}
        write_json(json_file, {"identity": identity, "path": path, "rows": sizes, "context": context} | content)
