"""Calibration of a head's confidence."""

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoints.files import check_source
from ..evaluation.prompts import DOMAINS, domain_prompts, read_prompts
from .common import (
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
    show,
    write_json,
)


@app.command()
def calibrate(
    model: Model = None,
    head: Head = None,
    prompts: Prompts = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the calibrated head. Default: --head itself, when it is a folder.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 16,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Of decoding; 0 is greedy.")] = 0.0,
    limit: Limit = None,
    plot: Annotated[Path | None, output_file("--plot", help="Reliability diagram, such as reliability.png.")] = None,
    json_file: Annotated[Path | None, output_file("--json", help="Also write the report to this file.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Fit the temperatures and shifts of a head's confidence and write them into its config.

    Half of the prompts are for fitting, the other half for the report. Without --prompts the sets of the sweep are
    taken; a head should be calibrated on what it will be used for.
    """
    from ..evaluation import calibrate as calibration
    from ..evaluation.plots import check_picture

    if plot is not None:
        check_picture(plot)
    if output is None and head is not None and not Path(head).is_dir():
        check_source(head)
        raise ValueError(f"--head {head} is not a folder to write into: give --output.")
    texts = read_prompts(prompts) if prompts else [p for name in DOMAINS for p in domain_prompts(name)]
    texts = texts[:limit]
    target, draft_head, tokenizer = load(model, head, dtype)
    with progress("drafting") as report:
        found = calibration.calibrate(
            target, draft_head, tokenizer, texts, batch_size, max_new_tokens, temperature, report
        )
    show(calibration.as_table(found))
    draft_head.config.update({"confidence_temperatures": found.temperatures, "confidence_shifts": found.shifts})
    if output is not None:
        draft_head.save_pretrained(output)
        say(f"head written to {output}")
    elif head is not None:
        draft_head.config.save_pretrained(head)
        say(f"temperatures written to {Path(head) / 'config.json'}")
    else:
        say("the embedded head is left as it is: give --output to write a calibrated copy")
    if plot is not None:
        calibration.plot(found, plot)
    if json_file is not None:
        write_json(json_file, calibration.as_json(found))
