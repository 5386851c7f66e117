"""What the tabs share: how numbers and tokens are shown, and the settings of a generation."""

from collections.abc import Callable, Iterable
from html import escape

import gradio as gr
from transformers import PreTrainedTokenizerBase

from .session import DEFAULT_NEW_TOKENS, DEFAULT_TEMPERATURE, DEFAULT_TOP_P, REPLACEMENT, SLOTS

# What is measured, one piece of work at a time; further visitors wait in the queue of this name and see their place.
MODEL = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal", "api_visibility": "private"}
# Requests that decode together.
SHARED = {
    "concurrency_id": "shared",
    "concurrency_limit": SLOTS,
    "show_progress": "minimal",
    "api_visibility": "private",
}
# For what does not need the model.
FREE = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

WAITING = "Waiting for the model. Right after the start it measures a plain step on this machine, which takes a while."


def figures(values: dict[str, str]) -> str:
    """HTML of a row of numbers, each with its name below."""
    cells = (f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in values.items())
    return f'<div class="figures">{"".join(cells)}</div>'


def note(text: str, kind: str = "") -> str:
    """HTML of a line of plain text. kind: `good`, `bad` or nothing."""
    return f'<div class="note {kind}">{escape(text)}</div>'


def bar(share: float, kind: str) -> str:
    """HTML of a bar that is filled up to a share."""
    return f'<div class="bar {kind}"><i style="width: {100 * min(1.0, share):.1f}%"></i></div>'


def rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.0f}" if seconds > 0 else "-"


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> list[str]:
    """The text of every token. A character that several tokens make up belongs to the last of them."""
    texts, pending = [], []
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending)
        if text.endswith(REPLACEMENT) and len(pending) < 4:
            texts.append("")
            continue
        texts.append(text)
        pending = []
    return texts


def clear(stop: gr.State, starts: list[Callable]) -> None:
    """Events that start work take back the visitor's request to stop, an `engine.Stop`; to be wired before the work."""
    gr.on(starts, lambda stop: setattr(stop, "requested", False), stop, None, **AT_ONCE)


def request(stop: gr.State, button: gr.Button, cancels: list | None = None) -> None:
    """The button requests that the work stops, and ends the given events."""
    button.click(lambda stop: setattr(stop, "requested", True), stop, None, cancels=cancels, **AT_ONCE)


def slider(minimum: float, maximum: float, value: float, **options) -> gr.Slider:
    """A slider whose number may be deleted, which gives `None`: Gradio's own fails to compare that with its bounds."""
    made = gr.Slider(minimum, maximum, value=value, **options)
    preprocess = made.preprocess
    made.preprocess = lambda payload: None if payload is None else preprocess(payload)
    return made


def max_tokens(most: int, value: int = DEFAULT_NEW_TOKENS) -> gr.Slider:
    return slider(1, most, min(value, most), step=1, label="New tokens, at most", min_width=180)


def temperature() -> gr.Slider:
    return slider(0, 1.5, DEFAULT_TEMPERATURE, step=0.05, label="Temperature (0: greedy)", min_width=180)


def top_p() -> gr.Slider:
    return slider(0.05, 1, DEFAULT_TOP_P, step=0.05, label="Top-p (when sampling)", min_width=180)
