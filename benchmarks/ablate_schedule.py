"""What each constant of the load schedule is worth: the schedule as it is, on simulated machines and heads.

    python benchmarks/ablate_schedule.py [--rounds 200] [--json ablation.json]

A simulated machine has step times that no linear model fits exactly, with noise, single slow rounds and phases in which
all takes longer, as where others use it too; a simulated head has confidences that say half of what becomes of its
drafts. A call is so many rounds of a pair of which nothing is known. For every machine, head and number of rows the
tokens a second of the schedule are divided by those of the best fixed length there, and the table shows the geometric
mean of that, and how it changes with each constant at half and at twice its value. Simulated, so the numbers are the
same on every computer; the same draws are used for all.
"""

import argparse
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dspark_hf.scheduling import constants
from dspark_hf.scheduling.cost import CostModel
from dspark_hf.scheduling.estimates import AcceptanceStats
from dspark_hf.scheduling.load import Load
from dspark_hf.scheduling.plan import Step
from dspark_hf.scheduling.scheduler import LoadSchedule
from dspark_hf.scheduling.settings import Settings

GAMMA, CONTEXT, SEEDS = 7, 200, 3
ROWS = 1, 8, 32
CONSTANTS = [name for name in vars(constants) if name.isupper()]


@dataclass(frozen=True)
class Machine:
    """Seconds of steps. A pass over n tokens takes its latency, longer where it has more than `free` of them, and
    `wide` longer where a row has more than one."""

    name: str
    latency: float
    token: float
    free: int
    wide: float
    draft: float
    position: float

    def verify(self, rows: int, tokens: int) -> float:
        return self.latency + self.token * max(0, tokens - self.free) + self.wide * (tokens > rows)

    def drafting(self, rows: int, positions: int) -> float:
        return self.draft + self.position * positions * (1 + rows / 32) + self.token / 5 * rows


@dataclass(frozen=True)
class Head:
    """What becomes of drafts: the mean acceptance of a position, and how far rows differ."""

    name: str
    acceptance: float
    spread: float


# In milliseconds. The first two are the embedded pair in float32 and bfloat16 on two cores.
MACHINES = (
    Machine("cpu", 20.0, 0.4, 2, 6.0, 6.0, 0.7),
    Machine("cpu", 17.0, 1.5, 1, 0.0, 6.0, 0.8),
    Machine("gpu", 12.0, 0.02, 128, 0.5, 2.5, 0.3),
)
# A round in so many begins another phase, at most so many times slower.
PHASE, SLOWEST = 80, 1.8
HEADS = Head("good", 0.85, 0.6), Head("fair", 0.6, 0.8), Head("useless", 0.02, 0.2)


class World:
    """A call, as far as a schedule does not decide about it: the same for all schedules of a seed."""

    def __init__(self, machine: Machine, head: Head, rows: int, rounds: int, seed: int):
        draw = np.random.default_rng(seed)
        self.machine, self.rows = machine, rows
        odds = math.log(head.acceptance / (1 - head.acceptance))
        # Some texts are easy, and each is easy and hard in turns; the head sees half of the latter.
        odds = odds + head.spread * draw.standard_normal((1, rows, 1))
        hidden = odds + head.spread * draw.standard_normal((rounds, rows, GAMMA))
        seen = odds + head.spread * draw.standard_normal((rounds, rows, GAMMA))
        self.confidence = 1 / (1 + np.exp(-seen))
        accepted = draw.random((rounds, rows, GAMMA)) < 1 / (1 + np.exp(-(hidden + seen) / 2))
        self.accepted = accepted.cumprod(axis=2).sum(axis=2)
        slow = np.where(draw.random((rounds, 2)) < 0.01, 4.0, 1.0)
        begins = np.maximum.accumulate(np.where(draw.random(rounds) < 1 / PHASE, np.arange(rounds), 0))
        pace = (SLOWEST ** draw.random(rounds))[begins]
        self.noise = np.exp(0.05 * draw.standard_normal((rounds, 2))) * slow * pace[:, None]

    def seconds(self, number: int, drafting: int, positions: int, tokens: int) -> tuple[float, float]:
        draft = self.machine.drafting(drafting, positions) if positions else 0.0
        return draft * self.noise[number, 0], self.machine.verify(self.rows, tokens) * self.noise[number, 1]


def fixed(world: World, length: int) -> float:
    """Tokens a second of a length that nothing changes."""
    rounds, tokens, spent = len(world.accepted), 0, 0.0
    for number in range(rounds):
        spent += sum(world.seconds(number, world.rows, length, world.rows * (1 + length)))
        tokens += int((1 + np.minimum(world.accepted[number], length)).sum())
    return tokens / spent


def scheduled(world: World, device: str) -> float:
    """Tokens a second of the load schedule, of a pair of which nothing is known at first."""
    rows = world.rows
    settings, shared = Settings(GAMMA, "load", None), AcceptanceStats.initial(GAMMA)
    own = LoadSchedule(settings, shared, rows, CostModel(GAMMA, 0.25, device), True, device == "gpu")
    tokens, spent, most = 0, 0.0, [GAMMA] * rows
    for number in range(len(world.accepted)):
        plan = own.plan(most, CONTEXT, Load(rows, 0))
        drafting, drafted = list(plan.rows), plan.length
        verified = np.zeros(rows, dtype=int)
        if drafting:
            confidence = world.confidence[number][drafting]
            confidence = confidence[:, :drafted]
            survival = own.estimates.survival(confidence, drafting)
            if plan.packed:
                whole = np.zeros((rows, drafted))
                whole[drafting] = survival
                verified = own.choose(plan, whole, most)
            else:
                verified[drafting] = drafted
            accepted = np.minimum(world.accepted[number], verified)
            own.estimates.learn(drafting, confidence, survival, verified[drafting], accepted[drafting])
        accepted = np.minimum(world.accepted[number], verified)
        width = rows + int(verified.sum()) if plan.packed else rows * (1 + int(verified.max()))
        seconds = world.seconds(number, len(drafting), drafted if drafting else 0, width)
        step = Step(len(drafting), drafted if drafting else 0, 0, rows, width, plan.packed, CONTEXT)
        own.observe(step, Load(rows, 0), *(own_seconds / 1000 for own_seconds in seconds))
        tokens, spent = tokens + rows + int(accepted.sum()), spent + sum(seconds)
    return tokens / spent


def worlds(rounds: int) -> list[tuple[str, World, float]]:
    """Every device, call and the speed of the best fixed length there."""
    found = []
    for machine, head, rows, seed in itertools.product(MACHINES, HEADS, ROWS, range(SEEDS)):
        world = World(machine, head, rows, rounds, seed)
        found.append((machine.name, world, max(fixed(world, length) for length in range(GAMMA + 1))))
    return found


def shares(found: list[tuple[str, World, float]]) -> np.ndarray:
    """Of every call the speed of the schedule over that of the best fixed length."""
    return np.array([scheduled(world, device) / best for device, world, best in found])


def main(args: argparse.Namespace) -> None:
    found = worlds(args.rounds)
    base = shares(found)
    results = [{"constant": "as it is", "value": None, "mean": float(np.exp(np.log(base).mean())), "least": base.min()}]
    cases = itertools.product(CONSTANTS, (0.5, 2.0))
    for name, factor in track(list(cases), "simulating", console=Console(stderr=True)):
        before = getattr(constants, name)
        # Half of a factor on something, or of a rate of forgetting, is its root.
        value = before**factor if name in ("ROW_DECAY", "PRIOR_ACCEPTANCE") else type(before)(before * factor)
        setattr(constants, name, max(value, 1) if isinstance(before, int) else value)
        try:
            changed = shares(found)
        finally:
            setattr(constants, name, before)
        mean = float(np.exp(np.log(changed / base).mean()))
        results.append({"constant": name, "value": value, "mean": mean, "least": (changed / base).min()})
    table = Table(
        box=box.SIMPLE_HEAD, caption="mean: of all calls; least: of any. The first row over the best fixed length"
    )
    for column in ("constant", "value", "mean", "least"):
        table.add_column(column, justify="left" if column == "constant" else "right")
    for row in results:
        value = "" if row["value"] is None else f"{row['value']:.4g}"
        table.add_row(row["constant"], value, f"{row['mean']:.3f}", f"{row['least']:.3f}")
    Console().print(table)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2, default=float) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
