"""Model cards of draft heads: `card_template.md` filled in with what is known of a head and what was measured."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..modeling_dspark import DSparkHead
from .licenses import License, as_license

TEMPLATE = Path(__file__).parent / "card_template.md"
PAPER_NAME, PAPER = "DSpark paper, table 1", "https://huggingface.co/papers/2607.05147"
LIMITS = (
    "It drafts for the target named above, and less well for models fine-tuned from it, the further they are from it. "
    "Other models need a head of their own.",
    "How much it saves depends on the text: mathematics and code are drafted better than conversation. The text itself "
    "does not depend on the head.",
    "In bfloat16 and float16 a pass over several tokens rounds differently from passes over one, so where the two best "
    "tokens are within rounding of each other the text can differ from that of plain decoding; in float32 it does not.",
)


@dataclass(frozen=True)
class Card:
    """What a card says.

    name: the heading. head, target: Hub ids, as the snippets have them. method: `"dspark"` or `"dflash"`. details: rows
    of the table of facts. own: whether the repository brings `custom_generate`. embedded: whether it is the pair that
    ships with the package. serving: a command for vLLM, or else `no_serving` says why there is none. paper: numbers of
    the paper, `{"settings": .., "rows": [{"name", "slug", "accepted_length"}, ..]}`. results: what `dspark-hf eval`
    wrote. A card has numbers of one of both, never of both. training: what `dspark-hf train` wrote of its run.
    """

    name: str
    head: str
    target: str | None
    method: str
    details: dict[str, Any]
    own: bool = False
    embedded: bool = False
    serving: str | None = None
    no_serving: str = ""
    license: License | None = None
    datasets: list[str] | None = None
    paper: dict | None = None
    results: dict | None = None
    training: dict | None = None
    limits: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.paper and self.results:
            raise ValueError("A card has numbers of the paper or of a measurement, not of both.")


def render(card: Card) -> ModelCard:
    """The card as Markdown with front matter, parsed by huggingface_hub."""
    # torch brings it.
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    results = card.results or {}
    rows, settings = results.get("results", []), results.get("settings", {})
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card=card,
        front_matter=_front_matter(card).to_yaml(),
        target_link=f"[{card.target}](https://huggingface.co/{card.target})" if card.target else "its target",
        limits=[*LIMITS, *card.limits],
        decoding=f"temperature {settings['temperature']:g}" if settings.get("temperature") else "greedy decoding",
        positions=range(1, max((len(row["positions"]) for row in rows), default=0) + 1),
        confident=any(row["ece"] is not None for row in rows),
        percent=lambda share: "-" if share is None else f"{share:.1%}",
    )
    return ModelCard(text)


def _front_matter(card: Card) -> ModelCardData:
    tags = [card.method, "speculative-decoding", "draft-model", *(["custom_generate"] if card.own else [])]
    measured = _eval_results(card)
    return ModelCardData(
        library_name="transformers",
        base_model=card.target,
        # Of the relations that the Hub knows (adapter, finetune, merge, quantized) the one of parts beside a model.
        base_model_relation="adapter" if card.target else None,
        pipeline_tag="text-generation",
        tags=tags,
        license=card.license.identifier if card.license else None,
        license_name=card.license.name if card.license else None,
        license_link=card.license.link if card.license else None,
        datasets=card.datasets,
        model_name=card.name if measured else None,
        eval_results=measured or None,
    )


def _eval_results(card: Card) -> list[EvalResult]:
    source: dict[str, Any] = {}
    if card.paper:
        source = {"source_name": PAPER_NAME, "source_url": PAPER}
        rows = [(row["slug"], row["name"], row["accepted_length"]) for row in card.paper["rows"]]
    else:
        rows = [(row["name"], row["name"], row["accepted_length"]) for row in (card.results or {}).get("results", [])]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=slug,
            dataset_name=name,
            metric_type="accepted_length",
            metric_name="accepted length (tokens a round, bonus included)",
            metric_value=round(value, 2),
            **source,
        )
        for slug, name, value in rows
    ]


def card_of(
    head: DSparkHead,
    repository: str,
    target: str | None,
    own: bool = True,
    results: dict | None = None,
    license: str | License | None = None,
    datasets: list[str] | None = None,
    training: dict | None = None,
) -> Card:
    """The card of a head, from its config.

    Args:
        repository, target: Hub ids. own: whether the repository brings `custom_generate`. results: from
            [`~evaluation.results.read_results`]. license: an identifier that the Hub knows, or a `License`. training:
            what is in `training.json`.

    Raises:
        ValueError: for a licence that the Hub refuses.
    """
    config = head.config
    method = "dspark" if config.markov_rank else "dflash"
    return Card(
        name=repository.rpartition("/")[2],
        head=repository,
        target=target,
        method=method,
        details=_details(head),
        own=own,
        # vLLM takes a head of V4 from its target's checkpoint.
        serving=vllm_command(target, None if config.stage_config else repository, method, config.gamma)
        if target
        else None,
        no_serving="" if target else "Serving it beside its target with another engine takes the target's repository.",
        license=as_license(license),
        datasets=datasets,
        results=results,
        training=training,
    )


def _details(head: DSparkHead) -> dict[str, Any]:
    config = head.config
    sequential = f"{config.markov_head_type}, rank {config.markov_rank}" if config.markov_rank else "none"
    calibrated = ", calibrated" if config.confidence_temperatures else ""
    parameters = sum(
        p.numel() for name, p in head.named_parameters() if not name.startswith(("embed_tokens", "lm_head"))
    )
    return {
        "drafts a round": config.gamma,
        "draft layers": config.num_hidden_layers,
        "target layers read": ", ".join(map(str, config.target_layer_ids)),
        "sequential head": sequential,
        "confidence head": f"yes{calibrated}" if config.enable_confidence_head else "no",
        "parameters": f"{parameters:,}, beside the target's embedding and LM head",
    }


def vllm_command(target: str, head: str | None, method: str, drafts: int | None) -> str:
    """How vLLM serves a target with a head (`None` for one in the target's checkpoint) of `drafts` tokens a round
    (`None` leaves them to vLLM)."""
    config = (
        {"method": method} | ({"model": head} if head else {}) | ({"num_speculative_tokens": drafts} if drafts else {})
    )
    return f"vllm serve {target} --speculative-config '{json.dumps(config)}'"
