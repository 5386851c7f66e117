"""Inside a round: what was drafted, verified and accepted, and how sure the head was."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import gradio as gr
import numpy as np
import pandas as pd

from ..generation.stats import DSparkStats
from ..scheduling.algorithm import survival
from . import parts
from .generation import Committed, Finished, Generation
from .session import DemoSession, Stop

ACCEPTED, CORRECTION, BONUS, OWN = "accepted", "correction", "bonus", "own"
LEGEND = {
    ACCEPTED: "accepted draft",
    CORRECTION: "correction by the target",
    BONUS: "bonus after a whole block",
    OWN: "target's own, nothing drafted",
    "rejected": "rejected draft",
    "unverified": "draft not verified",
}
EXAMPLE = "Mia has 40 marbles. She buys 5 bags with 9 marbles each. How many marbles does she have now?"


@dataclass(frozen=True)
class Round:
    """One round of the row.

    drafts, confidence: all that were drafted. verified, accepted: how many of them, from the first on. own: the token
    that the target added, `None` where the text ended inside the drafts.
    """

    drafts: list[int]
    confidence: list[float]
    verified: int
    accepted: int
    own: int | None

    @property
    def own_kind(self) -> str:
        if not self.verified:
            return OWN
        return BONUS if self.accepted == self.verified else CORRECTION


@dataclass(frozen=True, eq=False)
class Trace:
    """A finished generation, as gr.State keeps it. first: the token of the prompt's pass. expected: tokens that the
    scheduler expected of each round."""

    first: int
    rounds: list[Round]
    expected: list[float]
    block_size: int


def story(tokens: list[int], stats: DSparkStats) -> Trace:
    """The rounds of row 0, from its new tokens and its statistics."""
    rounds, place = [], 1
    for drafts, confidence, verified, accepted, committed in zip(
        stats.draft_tokens[0],
        stats.confidence[0],
        stats.verified_lengths[0],
        stats.accepted_lengths[0],
        stats.committed_lengths[0],
        strict=True,
    ):
        place += committed
        own = tokens[place - 1] if committed > accepted else None
        rounds.append(Round(drafts, confidence, verified, accepted, own))
    return Trace(tokens[0], rounds, stats.expected_lengths[0], stats.gamma)


def acceptance(rounds: list[Round], block_size: int) -> pd.DataFrame | None:
    """By position: the share of drafts that survived, and the survival that the head's confidence predicted for the
    same drafts. Positions that were never verified are left out; `None` when no draft was.

    A draft is accepted only if all before it are, so a round says something of every position up to its last verified
    one, but for those behind the end of the text.
    """
    happened: list[list[float]] = [[] for _ in range(block_size)]
    predicted: list[list[float]] = [[] for _ in range(block_size)]
    for one in rounds:
        known = one.accepted if one.own is None else one.verified
        for k, value in enumerate(survival(np.array(one.confidence))[:known]):
            happened[k].append(float(k < one.accepted))
            predicted[k].append(float(value))
    rows = [
        {"position": k + 1, "share": float(np.mean(values)), "what": what}
        for what, table in (("survived", happened), ("predicted", predicted))
        for k, values in enumerate(table)
        if values
    ]
    return pd.DataFrame(rows) if rows else None


def run(
    session: DemoSession, ids: list[int], most: float | None, temperature: float | None, stop: Stop
) -> Iterator[list[int] | Trace]:
    """The tokens so far, every tick, and at the end the story of the rounds, if there was a round."""
    tokens: list[int] = []
    for event in session.stream(Generation(ids, True, session.settings(most, temperature)), stop):
        if isinstance(event, Committed):
            tokens += event.tokens
        elif isinstance(event, Finished):
            if event.stats.rounds:
                yield story(tokens, event.stats)
            return
        elif event is None:
            yield tokens


# -- How it is shown ------------------------------------------------------------------------------------------------


def legend() -> str:
    return '<div class="legend">' + "".join(f'<i class="{k}">{v}</i>' for k, v in LEGEND.items()) + "</div>"


def text(session: DemoSession, trace: Trace, count: int) -> str:
    """HTML of the text of the first `count` rounds; the drafts that a correction replaced are its title."""
    shown, spans = trace.rounds[:count], [("prompt", trace.first, "from the prompt's pass")]
    for number, one in enumerate(shown, start=1):
        spans += [(ACCEPTED, token, f"round {number}: accepted draft") for token in one.drafts[: one.accepted]]
        if one.own is not None:
            spans.append((one.own_kind, one.own, f"round {number}: {LEGEND[one.own_kind]}{_rejected(session, one)}"))
    texts = parts.token_texts(session.tokenizer, [token for _, token, _ in spans])
    # Tokens of a newline, or of nothing to see, keep their place.
    marks = (
        f'<span class="{kind}" tabindex="0" data-tip="{escape(title)}">{escape(_visible(piece))}</span>'
        + ("<br>" if "\n" in piece else "")
        for (kind, _, title), piece in zip(spans, texts, strict=True)
    )
    return f'<div class="tokens">{"".join(marks)}</div>'


def strips(session: DemoSession, trace: Trace, count: int) -> str:
    """HTML of a line for every round, the last first: its drafts with their confidence, and the target's own token."""
    lines = []
    for number in range(min(count, len(trace.rounds)), 0, -1):
        one = trace.rounds[number - 1]
        cells = [
            _cell(session, token, _state(one, k), f"{confidence:.0%}", confidence)
            for k, (token, confidence) in enumerate(zip(one.drafts, one.confidence, strict=True))
        ]
        if one.own is not None:
            cells.append(_cell(session, one.own, one.own_kind, "target", 1.0))
        lines.append(
            f'<div class="strip"><div class="name"><b>{number}</b><span>{len(one.drafts)} drafted, {one.verified} '
            f'verified, {one.accepted} accepted</span></div><div class="cells">{"".join(cells)}</div></div>'
        )
    return f'<div class="strips">{"".join(lines)}</div>'


def figures(trace: Trace, count: int) -> dict[str, str]:
    shown = trace.rounds[:count]
    committed = sum(one.accepted + (one.own is not None) for one in shown)
    return {
        "rounds": str(len(shown)),
        "tau": f"{committed / len(shown):.2f}",
        "tau expected": f"{sum(trace.expected[:count]) / len(shown):.2f}",
        "drafted": str(sum(len(one.drafts) for one in shown)),
        "verified": str(sum(one.verified for one in shown)),
        "accepted": str(sum(one.accepted for one in shown)),
    }


def _state(one: Round, k: int) -> str:
    if k < one.accepted:
        return ACCEPTED
    return "rejected" if k < one.verified else "unverified"


def _cell(session: DemoSession, token: int, kind: str, below: str, share: float) -> str:
    piece = escape(_visible(session.tokenizer.decode([token])).replace(" ", "\N{OPEN BOX}"))
    return (
        f'<div class="cell {kind}" title="{LEGEND[kind]}"><code>{piece}</code><small>{below}</small>'
        f'<i style="width: {share:.0%}"></i></div>'
    )


def _rejected(session: DemoSession, one: Round) -> str:
    """The drafts of a round that were verified and did not survive, in words."""
    drafts = one.drafts[one.accepted : one.verified]
    return f", instead of {session.tokenizer.decode(drafts)!r}" if drafts else ""


def _visible(piece: str) -> str:
    return piece.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")


# -- The tab --------------------------------------------------------------------------------------------------------


def tab(session: DemoSession) -> None:
    """The tab's components and what they do."""
    gr.Markdown(
        "In every round the head drafts a few tokens, the model checks them all in one pass, keeps those that it would "
        "have written itself and adds one of its own. Point at a token to see how it came about."
    )
    prompt = gr.Textbox(value=EXAMPLE, label="Prompt", lines=2, max_lines=6, elem_id="rounds-prompt")
    with gr.Row():
        most = parts.max_tokens(session.most_new_tokens)
        temperature = parts.temperature()
    with gr.Row():
        start = gr.Button("Generate", variant="primary", elem_id="rounds-start")
        halt = gr.Button("Stop", elem_id="rounds-stop")
    count = gr.Slider(1, 2, value=1, step=1, label="Rounds shown", visible=False, elem_id="rounds-count")
    numbers = gr.HTML(parts.note("Press Generate."), elem_id="rounds-numbers")
    gr.HTML(legend())
    shown = gr.HTML(elem_id="rounds-text")
    gr.Markdown("#### Drafts that survived, and what the head's confidence predicted")
    plot = gr.LinePlot(
        x="position",
        y="share",
        color="what",
        color_map={"survived": "#12a150", "predicted": "#e8833a"},
        y_lim=[0, 1],
        x_title="position in the block",
        x_axis_format="d",
        y_title="share of drafts",
        color_title=" ",
        height=280,
        elem_id="rounds-plot",
    )
    detail = gr.HTML(elem_id="rounds-strips")
    stop, trace = gr.State(Stop()), gr.State()

    def view(trace: Trace | None, count: float):
        if trace is None:
            return gr.skip()
        count = int(count)
        return (
            parts.figures(figures(trace, count)),
            text(session, trace, count),
            acceptance(trace.rounds[:count], trace.block_size),
            strips(session, trace, count),
        )

    def generate(prompt: str, most: float, temperature: float, stop: Stop):
        ids = session.encode([{"role": "user", "content": prompt}])
        yield parts.note(parts.WAITING), "", gr.skip(), "", gr.skip(), None
        last = None
        for last in run(session, ids, most, temperature, stop):
            if isinstance(last, Trace):
                total = len(last.rounds)
                slider = gr.Slider(1, max(total, 2), value=total, visible=True)
                yield *view(last, total), slider, last
            else:
                text = f'<div class="tokens">{escape(session.decode(last, ended=False))}</div>'
                yield parts.note(f"{len(last)} tokens"), text, gr.skip(), "", gr.skip(), None
        if not isinstance(last, Trace):
            yield (
                parts.note("Nothing to show: the text was stopped, or has one token."),
                gr.skip(),
                gr.skip(),
                "",
                gr.skip(),
                None,
            )

    ask, views = [start.click, prompt.submit], [numbers, shown, plot, detail]
    parts.clear(stop, ask)
    gr.on(
        ask,
        generate,
        [prompt, most, temperature, stop],
        [*views, count, trace],
        **parts.MODEL,
        show_progress_on=numbers,
    )
    parts.request(stop, halt)
    # A slider that its own update has replaced is Gradio's again: a number that is deleted has to stay in the browser.
    first = "(trace, count) => [trace, count ?? 1]"
    count.input(view, [trace, count], views, **parts.FREE, trigger_mode="always_last", js=first)
