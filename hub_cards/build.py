"""Writes the cards in this folder: one for every head in the registry, and one for the embedded pair.

python hub_cards/build.py
"""

import json
from pathlib import Path

import dspark_hf
from dspark_hf.evaluation.results import check_results, read_results
from dspark_hf.hub.cards import Card, card_of, render, vllm_command
from dspark_hf.hub.registry import PublishedHead, published_heads

HERE = Path(__file__).parent
LAYOUTS = {
    "deepspec": "DeepSpec",
    "dflash": "z-lab DFlash",
    "specforge": "SpecForge",
    "speculators": "speculators",
    "modelopt": "Model-Optimizer",
    "deepseek_v4": "DeepSeek V4: mtp.* in the target's own checkpoint",
}
# DeepSpec's README, section on released checkpoints.
DEEPSPEC_DATASETS = ["mlabonne/open-perfectblend"]
DEEPSPEC_LIMIT = (
    "Trained on answers of the target in its non-thinking mode (DeepSpec's README): drafts for a target that "
    "thinks are accepted less often."
)
NOT_RUN = (
    "This card was written by the `dspark-hf` project from public tables. The project tests that it reads this "
    "layout on small checkpoints of it, and has not run this one."
)
NO_LICENSE = "Its publisher has to say under which licence it may be used; this card does not know it."


def cards() -> dict[str, str]:
    """Texts of all cards by file name."""
    paper = json.loads((HERE / "data" / "paper.json").read_text())
    found = {f"{head.head.replace('/', '__')}.md": published_card(head, paper) for head in published_heads()}
    return {name: str(render(card)) for name, card in (found | {"embedded_pair.md": embedded_card()}).items()}


def published_card(head: PublishedHead, paper: dict) -> Card:
    from_paper = head.head in paper["heads"]
    names, of_deepspec = paper["benchmarks"], head.dialect == "deepspec"
    numbers = zip(names, paper["heads"].get(head.head, ()), strict=False)
    return Card(
        name=head.head.rpartition("/")[2],
        head=head.head,
        target=head.target,
        method=head.method,
        details={
            "trained by": head.source,
            "layout": LAYOUTS[head.dialect],
            "block": f"{head.block_size} rows" if head.block_size else "as its config.json says",
        },
        serving=serving(head),
        no_serving="Whether other engines serve DFlash heads in DeepSpec's layout is not documented.",
        datasets=DEEPSPEC_DATASETS if of_deepspec else None,
        paper={
            "settings": paper["settings"],
            "rows": [benchmark | {"accepted_length": number} for benchmark, number in numbers],
        }
        if from_paper
        else None,
        limits=[*([DEEPSPEC_LIMIT] if of_deepspec else []), NOT_RUN, NO_LICENSE],
    )


def serving(head: PublishedHead) -> str | None:
    """By layout: heads of speculators name their target; a z-lab block holds the anchor beside the drafts; the class of
    SpecForge's means another model to vLLM."""
    if head.dialect == "speculators":
        return f"vllm serve {head.head}"
    if head.dialect == "deepseek_v4":
        return vllm_command(head.target, None, head.method, head.block_size)
    if head.dialect == "deepspec":
        return vllm_command(head.target, head.head, "dspark", head.block_size) if head.method == "dspark" else None
    if head.dialect == "dflash":
        return vllm_command(head.target, head.head, "dflash", head.block_size and head.block_size - 1)
    return None


def embedded_card() -> Card:
    _, head, _ = dspark_hf.embedded_pair()
    results = read_results(HERE / "data" / "embedded_pair.json")
    check_results(results, head, "embedded")
    made = card_of(head, "embedded_pair", None, results=results, license="mit", datasets=["openai/gsm8k"])
    return Card(
        **vars(made)
        | {
            "own": False,
            "embedded": True,
            "details": {"target": "a Qwen3 of 5.8 million parameters that ships with it"} | made.details,
            "no_serving": "It ships with the package to show decoding; other engines have no use for it.",
            "limits": ["Its target is there to show decoding, not to be right about arithmetic."],
        }
    )


if __name__ == "__main__":
    for name, text in cards().items():
        (HERE / name).write_text(text, encoding="utf-8")
        print(HERE / name)
