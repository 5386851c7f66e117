"""The audit of losslessness."""

from pathlib import Path
from typing import Annotated

import typer

from ..evaluation.prompts import read_prompts
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
def verify(
    model: Model = None,
    head: Head = None,
    prompts: Prompts = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 8,
    max_new_tokens: MaxNewTokens = 128,
    limit: Limit = None,
    sampling: Annotated[
        bool, typer.Option("--sampling", help="Audit sampling at temperature 1 instead of greedy decoding.")
    ] = False,
    draws: Annotated[int, typer.Option(min=1, help="Continuations to sample with --sampling.")] = 2000,
    json_file: Annotated[Path | None, output_file("--json", help="Also write the findings to this file.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Audit losslessness: the tokens with the head against the target's own. Exit status 1 when it is BROKEN, or
    inconclusive: nothing was drafted, or plain decoding does not repeat itself.

    Whole blocks are drafted and verified, whatever they cost. float32 is the sharper audit: what rounding can explain
    shrinks with the dtype.
    """
    from ..evaluation.verify import BROKEN, INCONCLUSIVE

    texts = read_prompts(prompts)[:limit]
    target, draft_head, tokenizer = load(model, head, dtype)
    # A schedule that saw no gain in drafts would leave nothing to audit.
    draft_head.generation_config.num_assistant_tokens_schedule = "constant"
    if sampling:
        findings = _verify_sampling(target, draft_head, tokenizer, texts, batch_size, draws)
    else:
        findings = _verify_greedy(target, draft_head, tokenizer, texts, batch_size, max_new_tokens)
    if json_file is not None:
        findings |= {"batch_size": batch_size, "dtype": str(target.dtype)}
        write_json(json_file, findings)
    failed = findings["verdict"] in (BROKEN, INCONCLUSIVE)
    say(f"verdict: {findings['verdict']}", style="red" if failed else "green")
    if failed:
        raise typer.Exit(1)


def _verify_greedy(target, draft_head, tokenizer, texts: list[str], batch_size: int, max_new_tokens: int) -> dict:
    """The greedy audit, shown; its findings."""
    from ..evaluation.verify import as_table, audit_greedy, greedy_as_json

    rows = []
    with progress("verifying") as report:
        for row in audit_greedy(target, draft_head, tokenizer, texts, batch_size, max_new_tokens):
            rows.append(row)
            report(f"verified {len(rows)} of {len(texts)} prompts")
    findings = greedy_as_json(rows)
    differing = len(findings["differences"])
    if differing:
        show(as_table(rows, tokenizer))
    counts = f"{len(rows) - differing} of {len(rows)} prompts identical, {findings['tokens']} tokens"
    counts += f", {findings['drafts_verified']} drafts verified"
    say(f"{counts}, batches of {batch_size}, {target.dtype}", style="dim")
    if not findings["plain_repeats"]:
        say("plain decoding wrote another text the second time: the target itself is not reproducible", style="yellow")
    return findings


def _verify_sampling(target, draft_head, tokenizer, texts: list[str], batch_size: int, draws: int) -> dict:
    """The sampling audit, shown; its findings."""
    from ..evaluation.verify import audit_sampling, draw, sampling_as_json

    drawn = []
    with progress("drawing") as report:
        for batch in draw(target, draft_head, tokenizer, texts, batch_size, draws):
            drawn += batch
            report(f"drew {len(drawn)} of {draws} continuations")
    with progress("comparing with the target's distribution"):
        audit = audit_sampling(target, tokenizer, texts, drawn, batch_size)
    test = f"chi-square {audit.statistic:.1f} at {audit.degrees_of_freedom} degrees of freedom"
    say(
        f"{audit.draws} draws, {audit.verified} drafts verified, {target.dtype}: {test}, p = {audit.p_value:.2g}",
        style="dim",
    )
    return sampling_as_json(audit)
