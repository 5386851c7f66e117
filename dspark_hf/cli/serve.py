"""An OpenAI-compatible server."""

from typing import Annotated

import typer

from .common import Dtype, Head, Model, app, is_embedded, load, note, say


@app.command()
def serve(
    model: Model = None,
    head: Head = None,
    host: Annotated[str, typer.Option(help="Address to listen at. 0.0.0.0: for everybody who can reach it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: as --model.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="DSPARK_API_KEY", help="What clients must show. Better by environment.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests that decode at once.")] = 16,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are told to come again.")] = 256,
    memory: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the free memory for their caches.")] = 0.8,
    max_prompt: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt at most.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of a request that does not say.")] = 1024,
    max_body: Annotated[int, typer.Option(min=1, help="Kilobytes of a request at most.")] = 1024,
    dtype: Dtype = "auto",
) -> None:
    """Serve a target with its head to OpenAI clients: requests are decoded together, drafts are verified as load
    allows."""
    import uvicorn
    from transformers import ContinuousBatchingConfig

    from ..serving.app import Limits, Service, build
    from ..serving.memory import keep_together
    from ..serving.products import keep_few

    keep_few()
    keep_together()
    target, head, tokenizer = load(model, head, dtype)
    config = ContinuousBatchingConfig(max_requests_per_batch=batch, max_queue_size=max_queue, max_memory_percent=memory)
    manager = target.init_continuous_batching(continuous_batching_config=config, assistant_model=head)
    try:
        manager.check_room(1, 1 + max_tokens)
    except ValueError as error:
        raise ValueError(f"{error} Here these are --max-tokens, --batch and --memory.") from None
    name = name or ("dspark-pair" if is_embedded(model) else model)
    service = Service(manager, tokenizer, name, api_key, Limits(1024 * max_body, max_prompt, max_tokens))
    say(f"http://{host}:{port}/v1 serves {name}: up to {batch} requests at once")
    if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
        note("Whoever reaches this address may use it: there is no --api-key.")
    uvicorn.run(build(service), host=host, port=port, log_level="warning", timeout_graceful_shutdown=30)
