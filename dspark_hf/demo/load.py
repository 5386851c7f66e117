"""Load: users who come and go on the engine that all share, with drafts and without them in turns."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field

import gradio as gr
import pandas as pd

from ..evaluation.prompts import DEFAULT_PROMPTS
from ..serving.request import RequestOutput
from . import parts
from .requests import Requests
from .session import SLOTS, DemoSession, Stop

TURN_SECONDS, LONGEST_SECONDS = 1.5, 60.0
# A request asks for so many tokens at most; the user's next one follows at once.
REQUEST_TOKENS = 128
# Seconds for which a row that has joined is shown as new.
NEW = 0.5
PLAIN, DSPARK, TAU, VERIFIED = "plain", "DSpark", "tau", "drafts verified"
GREEN, GREY, ORANGE = "#12a150", "#8b95a5", "#e8833a"


@dataclass
class Level:
    """How many users a visitor wants; updated while they run. Kept in a `gr.State`."""

    users: int = 16

    __hash__ = object.__hash__


@dataclass(frozen=True)
class Counts:
    """What was decoded in some time. seconds: of it. tokens, rounds, verified, accepted: of all requests together."""

    seconds: float = 0.0
    tokens: int = 0
    rounds: int = 0
    verified: int = 0
    accepted: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def tau(self) -> float:
        """Mean tokens of a round of a request."""
        return 1 + self.accepted / max(1, self.rounds)

    @property
    def verified_length(self) -> float:
        """Mean drafts verified in a round of a request."""
        return self.verified / max(1, self.rounds)


@dataclass(frozen=True)
class Turn:
    """What one way of decoding gave for a while, at a load of so many users."""

    users: int
    draft: bool
    counts: Counts


@dataclass
class User:
    """A user's present request. number: from 1 on. asked: when, by `time.monotonic`. reported: what is known of it."""

    request_id: str
    number: int
    asked: float
    reported: Counts = field(default_factory=Counts)

    def take(self, output: RequestOutput) -> Counts:
        """What has been added since the last news."""
        now = Counts(0.0, len(output.generated_tokens), output.rounds, output.verified, output.accepted)
        before, self.reported = self.reported, now
        return Counts(*(new - old for new, old in zip(astuple(now), astuple(before), strict=True)))


@dataclass(frozen=True)
class Batch:
    """The batch as it stands. rows: number, share of its tokens and whether it is new, of every request that the load
    has in it. running: requests of everybody. joined, left: so far."""

    rows: list[tuple[int, float, bool]]
    draft: bool
    running: int
    joined: int
    left: int


@dataclass(frozen=True)
class Load:
    """Work: so many users, each with one request after another. They begin as one and double every two turns, up to
    the level as it is then.

    Gives [`Turn`]s, and a [`Batch`] every tick.
    """

    level: Level
    prompts: tuple[list[int], ...]
    seconds: float

    def __call__(self, session: DemoSession) -> Iterator[Turn | Batch]:
        with Requests(session.manager) as requests:
            users = Users(session, requests, self.prompts)
            try:
                for draft in itertools.cycle((True, False)):
                    if draft:
                        users.become(min(self.level.users, max(1, 2 * len(users.present))))
                    yield from users.turn(draft, self.seconds)
            finally:
                session.manager.drafts = True


class Users:
    """Users of the engine.

    Attributes:
        joined, left: requests that have.
    """

    def __init__(self, session: DemoSession, requests: Requests, prompts: tuple[list[int], ...]):
        self.session, self.requests, self.prompts = session, requests, prompts
        self.most = min(REQUEST_TOKENS, session.most_new_tokens)
        self.present: list[User] = []
        self.joined = self.left = 0

    def become(self, count: int) -> None:
        """Let users come, or the last of them go, until there are so many."""
        while len(self.present) < count:
            self.present.append(self._ask())
        while len(self.present) > count:
            self.requests.cancel(self.present.pop().request_id)
            self.left += 1

    def turn(self, draft: bool, seconds: float) -> Iterator[Turn | Batch]:
        """Decode one way for a while. It begins when everybody is there and the round is over that was under way."""
        self.session.manager.drafts = draft
        awaited, switched = {user.request_id for user in self.present}, time.perf_counter()
        begun = last = None
        counts = Counts()
        for output in self.requests.results():
            if output is None:
                yield self._batch(draft)
                continue
            added, now = self._take(output), output.timestamps[-1]
            if begun is None:
                # Whose request has ended need not be waited for, nor their next one.
                if now > switched or output.is_finished():
                    awaited.discard(output.request_id)
                begun = last = None if awaited else now
            elif now > last >= begun + seconds:
                # All of the last round has been counted.
                yield Turn(len(self.present), draft, counts + Counts(last - begun))
                return
            elif now > begun:
                counts, last = counts + added, now

    def _take(self, output: RequestOutput) -> Counts:
        """What is new of a request. Where it leaves, the next one of its user joins."""
        place = next(i for i, user in enumerate(self.present) if user.request_id == output.request_id)
        added = self.present[place].take(output)
        if output.is_finished():
            self.present[place] = self._ask()
            self.left += 1
        return added

    def _ask(self) -> User:
        settings = {"max_new_tokens": self.most, "do_sample": False}
        request_id = self.requests.ask(self.prompts[self.joined % len(self.prompts)], settings)
        self.joined += 1
        return User(request_id, self.joined, time.monotonic())

    def _batch(self, draft: bool) -> Batch:
        now, manager = time.monotonic(), self.session.manager
        rows = [(user.number, user.reported.tokens / self.most, now - user.asked < NEW) for user in self.present]
        return Batch(rows, draft, manager.num_running, self.joined, self.left)


def run(session: DemoSession, level: Level, stop: Stop) -> Iterator[Turn | Batch]:
    """The load's turns and batches, for [`LONGEST_SECONDS`] at most."""
    prompts, started = tuple(map(session.own_prompt, DEFAULT_PROMPTS)), time.monotonic()
    for event in session.stream(Load(level, prompts, TURN_SECONDS), stop):
        yield event
        if time.monotonic() - started > LONGEST_SECONDS:
            return


# -- How it is shown ------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What has been seen of a load. totals: by users and whether there were drafts."""

    totals: dict[tuple[int, bool], Counts] = field(default_factory=dict)
    batch: Batch | None = None
    users: int = 0

    def take(self, event: Turn | Batch) -> None:
        if isinstance(event, Batch):
            self.batch = event
            return
        key = event.users, event.draft
        self.users, self.totals[key] = event.users, self.totals.get(key, Counts()) + event.counts

    def figures(self) -> dict[str, str]:
        """The batch now, and what was measured at the last load."""
        ours, plain = self.totals.get((self.users, True)), self.totals.get((self.users, False))
        return {
            "in the batch": str(self.batch.running) if self.batch else "-",
            "joined": str(self.batch.joined) if self.batch else "-",
            "left": str(self.batch.left) if self.batch else "-",
            "DSpark tokens/s": f"{ours.speed:.0f}" if ours else "-",
            "plain tokens/s": f"{plain.speed:.0f}" if plain else "-",
            "speed-up": parts.times(ours.speed / plain.speed if ours and plain else None),
            "tau": f"{ours.tau:.2f}" if ours else "-",
            "drafts verified": f"{ours.verified_length:.2f}" if ours else "-",
        }

    def speeds(self) -> pd.DataFrame | None:
        """Tokens a second by users. A plot keeps the lines that its first value has, so it gets none before both ways
        have been measured."""
        rows = [(users, counts.speed, DSPARK if draft else PLAIN) for (users, draft), counts in self._by_users()]
        return _frame(rows, "tokens a second") if len({name for *_, name in rows}) > 1 else None

    def lengths(self) -> pd.DataFrame | None:
        """Tau and verified length by users."""
        ours = [(users, counts) for (users, draft), counts in self._by_users() if draft]
        rows = [(users, counts.tau, TAU) for users, counts in ours]
        rows += [(users, counts.verified_length, VERIFIED) for users, counts in ours]
        return _frame(rows, "tokens a round") if rows else None

    def _by_users(self) -> list[tuple[tuple[int, bool], Counts]]:
        return sorted(self.totals.items())


def _frame(rows: list[tuple[int, float, str]], value: str) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["requests at once", value, "what"]).round(2)


def rows(batch: Batch) -> str:
    """HTML of the rows of a batch, each with how far its request is."""
    cells = (
        f'<div class="row{" new" if is_new else ""}"><span>#{number}</span>'
        f"{parts.bar(share, 'dspark' if batch.draft else 'plain')}</div>"
        for number, share, is_new in batch.rows
    )
    way = "with drafts" if batch.draft else "plain, without drafts"
    return f'<div class="batch"><p>Rows, now decoding <b>{way}</b></p>{"".join(cells)}</div>'


# -- The tab --------------------------------------------------------------------------------------------------------


def tab(session: DemoSession) -> None:
    """The tab's components and what they do."""
    gr.Markdown(
        "Users who ask one thing after another, all decoded in one batch that requests join and leave between rounds; "
        "answers of the Chat tab are in it too. It begins with one user and doubles them up to the number below, which "
        "can be changed while it runs. The busier the machine, the more a rejected draft costs, so fewer are verified "
        "(the verified length), and tau, the tokens of a round, falls."
    )
    with gr.Accordion("What it is compared with", open=False):
        gr.Markdown(
            "*Plain* is continuous batching without drafts by the same engine: same requests, same batch, same cache, "
            "in turns of 1.5 seconds with *DSpark*, so that the difference is what the head brings and nothing else. "
            "transformers' own `generate_batch` would be the other choice, and the easier one to beat: with 8 requests "
            "on two CPU cores it decoded 68 tokens a second, this engine without drafts 161."
        )
    users = parts.slider(1, SLOTS, Level.users, step=1, label="Requests at once", elem_id="load-level")
    with gr.Row():
        start = gr.Button("Start", variant="primary", elem_id="load-start")
        halt = gr.Button("Stop", elem_id="load-stop")
    numbers = gr.HTML(parts.figures(Result().figures()), elem_id="load-numbers")
    batch = gr.HTML(parts.note("Press Start."), elem_id="load-batch")
    with gr.Row():
        with gr.Column(min_width=300):
            gr.Markdown("#### Throughput of all requests")
            speeds = _plot("tokens a second", {DSPARK: GREEN, PLAIN: GREY}, "load-speeds")
        with gr.Column(min_width=300):
            gr.Markdown("#### Tau and verified length with DSpark")
            lengths = _plot("tokens a round", {TAU: GREEN, VERIFIED: ORANGE}, "load-lengths")
    stop, level = gr.State(Stop()), gr.State(Level())

    def show(level: Level, stop: Stop):
        result = Result()
        yield parts.figures(result.figures()), parts.note(parts.WAITING), None, None
        for event in run(session, level, stop):
            result.take(event)
            shown = rows(result.batch) if result.batch else gr.skip()
            plots = (result.speeds(), result.lengths()) if isinstance(event, Turn) else (gr.skip(), gr.skip())
            yield parts.figures(result.figures()), shown, *plots
        over = "Stopped." if stop.requested else f"Over, after {LONGEST_SECONDS:.0f} seconds."
        yield gr.skip(), parts.note(over), gr.skip(), gr.skip()

    parts.clear(stop, [start.click])
    outputs = [numbers, batch, speeds, lengths]
    start.click(show, [level, stop], outputs, **parts.MODEL, show_progress_on=numbers)
    parts.request(stop, halt)
    users.change(
        lambda level, count: setattr(level, "users", int(count or Level.users)), [level, users], None, **parts.AT_ONCE
    )


def _plot(value: str, colors: dict[str, str], elem_id: str) -> gr.LinePlot:
    return gr.LinePlot(
        x="requests at once",
        x_axis_format="d",
        y=value,
        color="what",
        color_map=colors,
        color_title=" ",
        y_lim=[0, None],
        x_lim=[0, None],
        tooltip="all",
        height=320,
        elem_id=elem_id,
    )
