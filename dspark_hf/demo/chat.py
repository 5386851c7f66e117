"""The chat: a conversation with the head, whose answers decode in one batch with what others ask."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from ..serving.request import RequestOutput
from . import parts
from .requests import Requests
from .session import DemoSession, Stop

EXAMPLES = [
    "Each ticket costs $12. Ben buys 4 of them. He also buys 2 drinks for $3 each. How much does he pay in total?",
    "Anna picked 36 apples. Ben picked half as many apples as Anna. How many apples did they pick together?",
    "Continue this Python code:\nclass Node:\n    def __init__(self, name, value):",
]

Message = dict[str, str]
# Options of `gr.Chatbot` that go with `shown`.
AS_TEXT = {"render_markdown": False, "latex_delimiters": []}


@dataclass(frozen=True)
class Answer:
    """An answer as far as it has come. beside: requests that decoded with it, at most. plain_step: seconds of one when
    nothing else was decoded."""

    output: RequestOutput
    beside: int
    plain_step: float

    @property
    def tokens(self) -> list[int]:
        return self.output.generated_tokens

    @property
    def ended(self) -> bool:
        return self.output.is_finished()

    def figures(self) -> dict[str, str]:
        """Numbers of the answer; the first token, which the prompt's pass gives, is left out of the speed."""
        steps, times = len(self.tokens) - 1, self.output.timestamps
        counts = {"tokens": str(len(self.tokens)), "others in the batch": str(self.beside)}
        if self.output.rounds < 1 or times[-1] == times[0]:
            return NO_FIGURES | counts
        elapsed = times[-1] - times[0]
        speeds = {
            "tokens/s": parts.rate(steps, elapsed),
            "speed-up": parts.times(steps * self.plain_step / elapsed),
            "tau": f"{steps / self.output.rounds:.2f}",
        }
        return speeds | counts


NO_FIGURES = dict.fromkeys(("tokens/s", "speed-up", "tau", "tokens", "others in the batch"), "-")


@dataclass(frozen=True)
class Question:
    """Work: have a conversation answered. settings: as `generate` takes them."""

    input_ids: list[int]
    settings: dict[str, Any]

    def __call__(self, session: DemoSession) -> Iterator[Answer | None]:
        plain_step, beside = session.measured_step(), 0
        with Requests(session.manager) as requests:
            requests.ask(self.input_ids, self.settings)
            for output in requests.results():
                if output is None:
                    yield None
                    continue
                # It has left the others when its last tokens come.
                beside = max(beside, session.manager.num_running - (not output.is_finished()))
                yield Answer(output, beside, plain_step)
                if output.is_finished():
                    return


def answer(
    session: DemoSession,
    history: list[Message],
    most: float | None,
    temperature: float | None,
    top_p: float | None,
    stop: Stop,
) -> Iterator[Answer | None]:
    """The answer to the last message, every tick and once it is over; `None` as long as there is none."""
    last = None
    for event in session.stream(Question(session.encode(history), session.settings(most, temperature, top_p)), stop):
        if event is None:
            yield last
        else:
            last = event
    yield last


def shown(history: list[Message]) -> list[Message]:
    """The messages as `gr.Chatbot` takes them. It renders HTML even without markdown, and what people and models write
    is text."""
    return [message | {"content": escape(message["content"])} for message in history]


# -- The tab --------------------------------------------------------------------------------------------------------


def tab(session: DemoSession, embedded: bool) -> None:
    """The tab's components and what they do."""
    about = (
        "It decodes in one batch with the answers of other visitors and the requests of the Load tab. The speed-up "
        "compares with plain decoding of this answer alone, by the time of a plain step measured at the start; tau is "
        "the tokens of a round."
    )
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
    numbers = gr.HTML(parts.figures(NO_FIGURES), elem_id="chat-numbers")
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
        most = parts.max_tokens(session.most_new_tokens)
    stop, history = gr.State(Stop()), gr.State([])

    def run(text: str, history: list[Message], temperature: float, top_p: float, most: float, stop: Stop):
        asked = [*history, {"role": "user", "content": text}]
        for current in answer(session, asked, most, temperature, top_p, stop):
            said = session.decode(current.tokens, current.ended) if current else ""
            new = [*asked, {"role": "assistant", "content": said}] if said else asked
            yield shown(new), new, "", parts.figures(current.figures() if current else NO_FIGURES)
        if not (current and current.ended):
            gr.Info("Stopped.", duration=3)

    inputs, outputs = [message, history, temperature, top_p, most, stop], [chatbot, history, message, numbers]
    ask = [send.click, message.submit]
    parts.clear(stop, ask)
    gr.on(ask, run, inputs, outputs, **parts.SHARED, show_progress_on=numbers)
    parts.request(stop, halt)
    gr.on(
        [clear.click, chatbot.clear],
        lambda: ([], [], parts.figures(NO_FIGURES)),
        None,
        [chatbot, history, numbers],
        **parts.AT_ONCE,
    )
