"""Long prompts, read in pieces: what a pass holds grows with the tokens that it reads."""

from collections.abc import Sequence

from .cache import on_device
from .round import RoundState
from .rows import Row
from .target import Target

# Tokens of a prompt that are read at once, where `prefill_chunk_size` does not say. Beside keys and values a pass holds
# of each of them the states that the head reads, and what it sees of the whole text (a row of the mask); and over so
# many every device is busy with arithmetic, so that longer passes would be no quicker.
PIECE = 2048


def read_ahead(
    state: RoundState,
    target: Target,
    piece: int,
    rows: Sequence[Row],
    lengths: list[int],
    joining: list[int] | None = None,
) -> None:
    """Read prompts, target and head both, until at most `piece` tokens of each row's `prompt` are left.

    Args:
        lengths, joining: as of `round.prefill`, which reads the rest.
    """
    places, device = list(range(len(rows))) if joining is None else joining, target.device
    while long := [i for i, row in enumerate(rows) if len(row.prompt) > piece]:
        tokens = on_device([rows[i].prompt[:piece] for i in long], device)
        those = None if joining is None and len(long) == len(rows) else [places[i] for i in long]
        read_at = on_device([lengths[i] for i in long], device)[:, None].expand_as(tokens) if target.growing else None
        passed = target.forward(tokens, state.cache, on_device([piece - 1], device), read_at, those)
        counts = [piece] * len(long)
        state.cache.commit(counts, those)
        state.drafter.read(those, passed.features, counts)
        for i in long:
            rows[i].prompt = rows[i].prompt[piece:]
