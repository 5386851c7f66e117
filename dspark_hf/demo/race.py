"""The race: plain decoding and DSpark on one prompt, measured one after the other, then replayed on one clock."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import torch

from ..evaluation.verify import BROKEN, IDENTICAL, ROUNDING, ROUNDINGS
from . import parts
from .generation import Committed, Finished, Generation
from .session import TICK, DemoSession, Stop

# A replay of the slower run takes at least so long, so that eyes can follow; the clock is slowed for both alike.
REPLAY_SECONDS = 6.0
EXAMPLES = [
    "Natalia has 24 marbles. She buys 3 bags with 12 marbles each and gives 15 marbles to Tom. How many marbles does "
    "she have now?",
    "Sarah makes 15 tickets an hour. Sarah does this for 6 hours. Lily makes 20 every hour for 6 hours. How many "
    "tickets do they make together?",
    "Continue this Python code:\nclass Node:\n    def __init__(self, name, value):",
]


@dataclass
class Side:
    """One side of the race as it happened. seconds: of the whole generation once it has ended, so far before."""

    draft: bool
    commits: list[Committed] = field(default_factory=list)
    seconds: float = 0.0
    ended: bool = False

    @property
    def tokens(self) -> list[int]:
        return [token for commit in self.commits for token in commit.tokens]

    @property
    def speed(self) -> float:
        """Tokens a second, prompt included."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    @property
    def tau(self) -> float | None:
        """Tokens a round; the first token belongs to none."""
        rounds = len(self.commits) - 1
        return (len(self.tokens) - len(self.commits[0].tokens)) / rounds if rounds > 0 else None

    def take(self, event: Any) -> None:
        """Add what the engine tells."""
        if isinstance(event, Committed):
            self.commits.append(event)
            self.seconds = event.seconds
        elif isinstance(event, Finished):
            self.seconds, self.ended = event.seconds, True

    def until(self, seconds: float) -> "Side":
        """The run as it stood then."""
        if seconds >= self.seconds:
            return self
        return Side(self.draft, [commit for commit in self.commits if commit.seconds <= seconds], seconds)


@dataclass(eq=False)
class Race:
    """Both sides, and what is to be said of their texts."""

    plain: Side = field(default_factory=lambda: Side(draft=False))
    dspark: Side = field(default_factory=lambda: Side(draft=True))
    verdict: str = ""
    kind: str = ""

    @property
    def speedup(self) -> float | None:
        """Of tokens a second, so that texts of different length compare too."""
        return self.dspark.speed / self.plain.speed if self.plain.speed and self.dspark.speed else None


@dataclass(frozen=True)
class Gap:
    """Work: how far behind the target's best next token another one is, and what rounding explains."""

    input_ids: list[int]
    token: int

    def __call__(self, session: DemoSession) -> Iterator[bool]:
        with session.manager.pause():
            output = session.generate(self.input_ids, None, max_new_tokens=1, do_sample=False, output_scores=True)
        scores = output.scores[0][0].float()
        bound = ROUNDINGS * torch.finfo(session.model.dtype).eps * scores[scores.isfinite()].abs().max()
        yield bool(scores.max() - scores[self.token] <= bound)


def race(
    session: DemoSession, ids: list[int], most: float | None, temperature: float | None, stop: Stop
) -> Iterator[Race]:
    """Run both sides; the race so far, every tick."""
    result, settings = Race(), session.settings(most, temperature)
    for run in (result.plain, result.dspark):
        for event in session.stream(Generation(ids, run.draft, settings), stop):
            run.take(event)
            if event is None and run.commits:
                yield result
        if stop.requested or not run.ended:
            result.verdict = "Stopped."
            yield result
            return
    result.verdict, result.kind = _verdict(session, ids, result, temperature, stop)
    yield result


def _verdict(
    session: DemoSession, ids: list[int], result: Race, temperature: float | None, stop: Stop
) -> tuple[str, str]:
    plain, ours = result.plain.tokens, result.dspark.tokens
    faster = f"{parts.times(result.speedup)} the speed of plain decoding"
    if temperature:
        return (
            f"exact in distribution: {faster}. Sampling draws other words each time, from the target's own "
            "distribution, with the head as without."
        ), "good"
    if plain == ours:
        return f"{IDENTICAL}: the same {len(ours)} tokens, one by one, at {faster}.", "good"
    shared = next((i for i, (a, b) in enumerate(zip(plain, ours, strict=False)) if a != b), None)
    if shared is None:
        return f"{BROKEN}: one text goes on where the other ends, after {min(len(plain), len(ours))} tokens.", "bad"
    # Greedy decoding has no ties to break between two kernels but those that rounding makes.
    rounding = any(event is True for event in session.stream(Gap(ids + plain[:shared], ours[shared]), stop))
    if rounding:
        return f"{ROUNDING}, from token {shared + 1} on, where both next tokens score alike; {faster}.", ""
    return f"{BROKEN}: token {shared + 1} is not what the target would have chosen.", "bad"


def replay(result: Race) -> Iterator[tuple[float, float, Side, Side]]:
    """Seconds on the clock, how much it is slowed, and both runs as they stood then, in step with real time."""
    longest = max(result.plain.seconds, result.dspark.seconds)
    slowed = max(1.0, REPLAY_SECONDS / longest)
    started = time.monotonic()
    while (clock := (time.monotonic() - started) / slowed) < longest:
        yield clock, slowed, result.plain.until(clock), result.dspark.until(clock)
        time.sleep(TICK)
    yield longest, slowed, result.plain, result.dspark


# -- The tab --------------------------------------------------------------------------------------------------------


def tab(session: DemoSession) -> None:
    """The tab's components and what they do."""
    gr.Markdown(
        "The same model writes the same text twice: word by word as usual, then with a small draft head that guesses "
        "several tokens ahead for the model to check in one go."
    )
    prompt = gr.Textbox(value=EXAMPLES[0], label="Prompt", lines=3, max_lines=6, elem_id="race-prompt")
    gr.Examples(EXAMPLES, prompt, label="Examples")
    with gr.Row():
        most = parts.max_tokens(session.most_new_tokens)
        temperature = parts.temperature()
    with gr.Row():
        start = gr.Button("Race", variant="primary", elem_id="race-start")
        halt = gr.Button("Stop", elem_id="race-stop")
    verdict = gr.HTML(parts.note("Press Race."), elem_id="race-verdict")
    with gr.Row():
        panes = [_pane("Plain decoding", "race-plain"), _pane("With DSpark", "race-dspark")]
    again = gr.Button("Replay", size="sm", elem_id="race-replay")
    stop, result = gr.State(Stop()), gr.State()
    outputs = [verdict, *(part for pane in panes for part in pane), result]

    def run(prompt: str, most: float, temperature: float, stop: Stop):
        ids = session.encode([{"role": "user", "content": prompt}])
        yield parts.note(parts.WAITING), "", "", "", "", None
        for current in race(session, ids, most, temperature, stop):
            side = "With DSpark" if current.dspark.commits else "Plain decoding"
            text = current.verdict or f"Measuring: {side.lower()} ..."
            shown = current if current.kind else None
            yield parts.note(text, current.kind), *_panes(session, current, current.plain, current.dspark), shown

    def show_replay(current: Race | None):
        if current is None:
            return
        for clock, slowed, plain, dspark in replay(current):
            slow = f", slowed {slowed:.0f} times for the eye" if slowed > 1 else ""
            text = f"Replay of both on one clock{slow}: {clock:.2f} s"
            if dspark.ended and plain.ended:
                text = current.verdict
            kind = current.kind if dspark.ended and plain.ended else ""
            yield parts.note(text, kind), *_panes(session, current, plain, dspark)

    ask = [start.click, prompt.submit]
    parts.clear(stop, ask)
    measured = gr.on(ask, run, [prompt, most, temperature, stop], outputs, **parts.MODEL, show_progress_on=verdict)
    replayed = measured.success(show_replay, result, outputs[:-1], **parts.FREE)
    replayed_again = again.click(show_replay, result, outputs[:-1], **parts.FREE)
    parts.request(stop, halt, cancels=[replayed, replayed_again])


def _pane(title: str, name: str) -> tuple[gr.HTML, gr.Textbox]:
    with gr.Column(min_width=300):
        gr.Markdown(f"### {title}")
        numbers = gr.HTML(elem_id=f"{name}-numbers", min_height=96)
        text = gr.Textbox(show_label=False, lines=9, max_lines=9, elem_id=name, placeholder="The text appears here.")
    return numbers, text


def _panes(session: DemoSession, whole: Race, plain: Side, dspark: Side) -> tuple[str, str, str, str]:
    """Numbers and text of both sides as they stand."""
    ratio = dspark.speed / plain.speed if plain.speed and dspark.speed else None
    sides = []
    for run, final in ((plain, whole.plain), (dspark, whole.dspark)):
        values = {
            "tokens/s": parts.rate(len(run.tokens), run.seconds),
            "elapsed": f"{run.seconds:.2f} s",
            "speed-up": parts.times(ratio if run.draft else 1.0),
            "tau": "-" if run.tau is None else f"{run.tau:.2f}",
        }
        # While it runs nobody knows how long a text will be; the other side's length is the best guess.
        goal = len(final.tokens) if final.ended else max(len(whole.plain.tokens), 1)
        share = len(run.tokens) / goal if final.ended or run.draft else 0.0
        kind = "dspark" if run.draft else "plain"
        sides += [parts.figures(values) + parts.bar(share, kind), session.decode(run.tokens, run.ended)]
    return tuple(sides)
