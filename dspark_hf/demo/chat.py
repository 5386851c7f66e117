"""The chat: a conversation with the head, and its speed against the plain step time measured at the start."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape

import gradio as gr

from . import parts
from .engine import Committed, Engine, Finished, Ready, Stop

EXAMPLES = [
    "A box holds 6 eggs and costs $3. How much do 42 eggs cost?",
    "Nora runs 4 miles on each weekday and 9 miles on Saturday. How many miles does she run in 3 weeks?",
    'Continue this Python code:\ndef mean(values):\n    """The mean of some numbers."""',
]

Message = dict[str, str]
# Options of `gr.Chatbot` that go with `shown`.
AS_TEXT = {"render_markdown": False, "latex_delimiters": []}


@dataclass
class Answer:
    """An answer as far as it has come. seconds: to each round's end, since the first token was there."""

    plain_step: float | None = None
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ended: bool = False

    def take(self, event: object) -> None:
        """Add what the engine tells."""
        if isinstance(event, Ready):
            self.plain_step = event.plain_step
        elif isinstance(event, Committed):
            self.tokens += event.tokens
            self.seconds.append(event.seconds)
        elif isinstance(event, Finished):
            self.ended = True

    def figures(self) -> dict[str, str]:
        """Numbers of the answer; the first token, which the prompt's pass gives, is left out of the speed."""
        steps, rounds = len(self.tokens) - 1, len(self.seconds) - 1
        if rounds < 1:
            return dict.fromkeys(("tokens/s", "speed-up", "tau"), "-") | {"tokens": str(len(self.tokens))}
        elapsed = self.seconds[-1] - self.seconds[0]
        return {
            "tokens/s": parts.rate(steps, elapsed),
            "speed-up": parts.times(steps * self.plain_step / elapsed),
            "tau": f"{steps / rounds:.2f}",
            "tokens": str(len(self.tokens)),
        }


def answer(
    engine: Engine,
    history: list[Message],
    most: float | None,
    temperature: float | None,
    top_p: float | None,
    stop: Stop,
) -> Iterator[Answer]:
    """The answer to the last message, every tick and once it is over."""
    result = Answer()
    work = engine.generation(engine.encode(history), True, most, temperature, top_p)
    for event in engine.stream(work, stop):
        result.take(event)
        if event is None:
            yield result
    yield result


def shown(history: list[Message]) -> list[Message]:
    """The messages as `gr.Chatbot` takes them. It renders HTML even without markdown, and what people and models write
    is text."""
    return [message | {"content": escape(message["content"])} for message in history]


# -- The tab --------------------------------------------------------------------------------------------------------


def tab(engine: Engine, embedded: bool) -> None:
    """The tab's components and what they do."""
    about = "The speed-up compares with a plain step of the same model, measured on this machine at the start."
    if embedded:
        about += (
            " The built-in model has 6 million parameters and knows grade-school word problems and some Python: it "
            "writes fluent solutions, often wrong ones, and cannot talk about anything else."
        )
    gr.Markdown(f"A conversation in which every answer is written with the draft head. {about}")
    chatbot = gr.Chatbot(
        show_label=False,
        height=380,
        **AS_TEXT,
        buttons=[],
        feedback_options=None,
        elem_id="chat-history",
        placeholder="Ask something.",
    )
    numbers = gr.HTML(parts.figures(Answer().figures()), elem_id="chat-numbers")
    with gr.Row():
        message = gr.Textbox(
            show_label=False,
            placeholder="Your message",
            lines=1,
            max_lines=5,
            scale=6,
            min_width=240,
            elem_id="chat-input",
        )
        send = gr.Button("Send", variant="primary", min_width=80, elem_id="chat-send")
        halt = gr.Button("Stop", min_width=80, elem_id="chat-stop")
        clear = gr.Button("New", min_width=80, elem_id="chat-clear")
    if embedded:
        gr.Examples(EXAMPLES, message, label="Things that the built-in model was trained for")
    with gr.Row():
        temperature = parts.temperature()
        top_p = parts.top_p()
        most = parts.max_tokens(engine.most_new_tokens)
    stop, history = gr.State(Stop()), gr.State([])

    def run(text: str, history: list[Message], temperature: float, top_p: float, most: float, stop: Stop):
        asked = [*history, {"role": "user", "content": text}]
        for current in answer(engine, asked, most, temperature, top_p, stop):
            said = engine.decode(current.tokens, current.ended)
            new = [*asked, {"role": "assistant", "content": said}] if said else asked
            yield shown(new), new, "", parts.figures(current.figures())
        if not current.ended:
            gr.Info("Stopped.", duration=3)

    inputs, outputs = [message, history, temperature, top_p, most, stop], [chatbot, history, message, numbers]
    ask = [send.click, message.submit]
    parts.clear(stop, ask)
    gr.on(ask, run, inputs, outputs, **parts.MODEL, show_progress_on=numbers)
    parts.request(stop, halt)
    gr.on(
        [clear.click, chatbot.clear],
        lambda: ([], [], parts.figures(Answer().figures())),
        None,
        [chatbot, history, numbers],
        **parts.AT_ONCE,
    )
