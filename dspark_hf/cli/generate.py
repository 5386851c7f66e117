"""Decode one prompt."""

import json
import time
from typing import Annotated

import typer
from transformers import TextStreamer

from ..evaluation.prompts import encode, sampling
from .common import Dtype, Head, MaxNewTokens, Model, app, load, say


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer or continue.")],
    model: Model = None,
    head: Head = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy decoding.")] = 0.0,
    no_draft: Annotated[bool, typer.Option("--no-draft", help="Decode without the head, to compare.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
    dtype: Dtype = "auto",
) -> None:
    """Generate text, streamed as it is committed, and say how fast that was."""
    target, draft_head, tokenizer = load(model, head, dtype, needs_head=not no_draft)
    inputs = encode([prompt], tokenizer, target.device)
    kwargs = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True} | sampling(temperature)
    if not no_draft:
        kwargs["assistant_model"] = draft_head
    if not as_json:
        kwargs["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    started = time.perf_counter()
    output = target.generate(**inputs, **kwargs)
    seconds = time.perf_counter() - started
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    tau = None if no_draft else output.dspark.tau
    if as_json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        record = {"text": text, "tokens": len(new), "seconds": seconds, "tokens_per_second": len(new) / seconds}
        typer.echo(json.dumps(record | {"tau": tau}))
        return
    summary = f"{len(new)} tokens in {seconds:.2f} s: {len(new) / seconds:.1f} tokens/s"
    rounds = "without a draft head" if no_draft else f"tau {tau:.2f} tokens a round, {output.dspark.rounds} rounds"
    say(f"{summary}, {rounds}", style="dim")
