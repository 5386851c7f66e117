"""The step times of a pair on its device, and the scheduler that uses them."""

import random
import time
from collections import defaultdict
from weakref import WeakKeyDictionary

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from ..modeling_dspark import DSparkHead
from ..scheduling import cost
from ..scheduling.cost import CostTable
from ..scheduling.estimates import Experience
from ..scheduling.scheduler import ConstantSchedule, LoadSchedule, SyncedSchedule
from ..scheduling.settings import Settings
from .compatibility import check_pair
from .drafting import Drafter
from .ranks import Ranks
from .target import Target

logger = logging.get_logger(__name__)

# Tokens of context at which step times are measured, or as many as the target knows positions for.
CONTEXTS = (192, 512)
# Rows are measured up to this; beyond, times go on as between the last two.
MOST_ROWS = 64
# Everything is gone through again where the quickest rounds differ, as they do on a shared machine.
TURNS = 2
# Between two writes of a table that generation has moved along.
SECONDS_BETWEEN_WRITES = 60

_tables: dict[str, CostTable] = {}
# The same by the models themselves and what may change about them, as to read all of an identity takes milliseconds.
_known: WeakKeyDictionary[DSparkHead, WeakKeyDictionary[PreTrainedModel, dict[tuple, CostTable]]] = WeakKeyDictionary()
_written: dict[str, float] = {}
_experiences: WeakKeyDictionary[DSparkHead, WeakKeyDictionary[PreTrainedModel, Experience]] = WeakKeyDictionary()


def scheduler_for(
    target: Target, drafter: Drafter, rows: int, config: GenerationConfig, runs_ahead: bool, synced: bool = False
) -> ConstantSchedule:
    """The scheduler that a call, or else the head's `generation_config`, asks for, or the one for processes that wait
    for each other. Step times are measured if they have to be.

    Raises:
        ValueError: for settings that mean nothing to a DSpark head.
    """
    head = drafter.head
    settings = Settings.read(head.generation_config, head.config.gamma, config)
    shared = experience_of(head, target.model)
    if synced:
        return SyncedSchedule(settings, shared, rows)
    if settings.schedule == "constant":
        return ConstantSchedule(settings, shared, rows)
    table = step_times(target, head, rows)
    return LoadSchedule(settings, shared, rows, table, not config.do_sample, target.packs, runs_ahead)


def experience_of(head: DSparkHead, target: PreTrainedModel) -> Experience:
    """What this process has seen of the head's drafts for a target."""
    by_target = _experiences.setdefault(head, WeakKeyDictionary())
    if target not in by_target:
        by_target[target] = Experience.fresh(head.config.gamma)
    return by_target[target]


def step_times(target: Target, head: DSparkHead, rows: int) -> CostTable:
    """The pair's table, good for calls of `rows` rows: from memory, from the cache folder, or measured now."""
    changing = tuple(cost.settings_of(target.model, head, target.device).values())
    known = _known.setdefault(head, WeakKeyDictionary()).setdefault(target.model, {})
    if changing not in known:
        known[changing] = _table(target, head)
    table, ranks = known[changing], Ranks(target.model)
    counts = ranks.agreed(lambda: _counts_to_measure(table, rows))
    if not counts:
        return table
    logger.info(f"Measuring the step times of {type(target.model).__name__} for batches of {counts} rows.")
    # Rounds are timed by running them, and to run them takes a scheduler.
    from .trial import Samples, agree, measure, settled

    samples: dict[int, Samples] = {n: defaultdict(list) for n in counts}
    for _ in range(TURNS):
        for n, own in samples.items():
            measure(target.model, head, n, table.contexts, own, ranks.agreed(random.random))
        if ranks.agreed(lambda: all(map(agree, samples.values()))):
            break
    if not ranks.leads:
        return table
    for n, own in samples.items():
        measured = settled(own, table.contexts, head.config.gamma)
        if n in table.rows:
            table.bring_to(n, measured)
        else:
            table.extend(n, measured)
    table.save()
    return table


def _counts_to_measure(table: CostTable, rows: int) -> list[int]:
    """Row counts that a call of so many rows needs. What is known was measured at another time, and has moved since:
    the last of it is measured again, to compare."""
    missing = [n for n in _row_counts(rows) if not table.rows or n > table.rows[-1]]
    return [*table.rows[-1:], *missing] if missing else []


def prepare(model: PreTrainedModel, head: DSparkHead, rows: int) -> CostTable:
    """The pair's table before any call: what the first call of `rows` rows would measure is measured now.

    Raises:
        ValueError: when the head cannot draft for the model.
    """
    check_pair(model, head)
    return step_times(Target(model, head.config.target_layer_ids), head, rows)


def _table(target: Target, head: DSparkHead) -> CostTable:
    """The pair's table as far as it was measured."""
    identity, block_size = cost.identity_of(target.model, head, target.device), head.config.gamma
    key = str(cost.path_of(identity))
    if key not in _tables:
        stored = cost.load(identity, block_size)
        _tables[key] = stored or CostTable.empty(identity, _contexts(target, head), block_size)
    return _tables[key]


def forget(target: Target, head: DSparkHead) -> None:
    """Drop the pair's table, stored and in memory, so that it is measured anew."""
    path = cost.path_of(cost.identity_of(target.model, head, target.device))
    _tables.pop(str(path), None)
    _known.pop(head, None)
    path.unlink(missing_ok=True)


def _row_counts(rows: int) -> list[int]:
    """1, the first power of two that is enough for a call, and a quarter, a sixteenth .. of that. On two CPU cores
    times between these were found within 4 %, and those of all sizes off by about the same."""
    largest = min(max(2, 1 << (rows - 1).bit_length()), MOST_ROWS)
    fewer = range(0, largest.bit_length(), 2)
    return sorted({1, largest, *(largest >> i for i in fewer if largest >> i >= 4)})


def _contexts(target: Target, head: DSparkHead) -> list[int]:
    known = getattr(target.config, "max_position_embeddings", None) or 2 * CONTEXTS[-1]
    longest = max(1, known - head.config.gamma - 1)
    return sorted({min(context, longest) for context in CONTEXTS})


def store(scheduler: ConstantSchedule) -> None:
    """Write the step times that generation has moved along, now and then."""
    if not isinstance(scheduler, LoadSchedule):
        return
    key, now = str(scheduler.table.path), time.monotonic()
    if now - _written.setdefault(key, now) > SECONDS_BETWEEN_WRITES:
        _written[key] = now
        scheduler.table.save()
