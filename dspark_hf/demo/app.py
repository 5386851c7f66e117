"""The demo's page: four tabs around one engine."""

from pathlib import Path

import gradio as gr
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..embedded import embedded_pair
from ..evaluation.report import device_name
from ..modeling_dspark import DSparkHead
from ..serving.memory import keep_together
from ..serving.products import keep_few
from . import chat, load, race, rounds
from .session import DemoSession

TITLE = "DSpark: the same text, sooner"
STYLE = Path(__file__).parent / "style.css"
# Visitors that may wait for the model; more are asked to come back.
LONGEST_QUEUE = 32
# Fonts of the machine: a page that asks a server for its fonts does not work offline.
THEME = gr.themes.Soft(primary_hue="emerald", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def default_pair() -> tuple[PreTrainedModel, DSparkHead, PreTrainedTokenizerBase]:
    """The embedded pair; in float32 on a processor, where texts are then the same to the last token."""
    if torch.cuda.is_available():
        return embedded_pair(device="cuda")
    # The page's server needs a core too: threads that wait for one another crawl when one of them has none.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    return embedded_pair(dtype=torch.float32)


def build(
    model: PreTrainedModel | None = None,
    head: DSparkHead | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> gr.Blocks:
    """The app around a pair, the embedded one by default; [`launch`] starts it."""
    keep_few()
    keep_together()
    embedded = model is None
    session = DemoSession(*default_pair()) if embedded else DemoSession(model, head, tokenizer)
    name = "the built-in pair" if embedded else f"{model.name_or_path} and {head.name_or_path}"
    with gr.Blocks(title=TITLE, analytics_enabled=False) as app:
        gr.Markdown(f"# {TITLE}")
        gr.Markdown(
            "A small draft head guesses the next tokens, the model checks all of them at once and keeps what it would "
            f"have written anyway. Here: {name}, {str(session.model.dtype).removeprefix('torch.')}, on "
            f"{device_name(session.model.device)}."
        )
        with gr.Tab("Race"):
            race.tab(session)
        with gr.Tab("Chat"):
            chat.tab(session, embedded)
        with gr.Tab("Inside a round"):
            rounds.tab(session)
        with gr.Tab("Load"):
            load.tab(session)
    app.queue(max_size=LONGEST_QUEUE)
    session.warm_up()
    return app


def launch(app: gr.Blocks, **kwargs) -> None:
    """`app.launch` with the demo's looks."""
    app.launch(theme=THEME, css_paths=STYLE, footer_links=[], ssr_mode=False, **kwargs)
