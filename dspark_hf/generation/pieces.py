"""Long prompts, read in pieces: what a pass holds grows with the tokens that it reads."""

from collections.abc import Sequence

from .cache import on_device
from .round import RoundState
from .target import Target

# Tokens of a prompt that are read at once, where `prefill_chunk_size` does not say. Beside keys and values a pass holds
# of each of them the states that the head reads, and what it sees of the whole text (a row of the mask); and over so
# many every device is busy with arithmetic, so that longer passes would be no quicker.
PIECE = 2048


def read_ahead(
    state: RoundState,
    target: Target,
    piece: int,
    prompts: Sequence[list[int]],
    lengths: list[int],
    joining: list[int] | None = None,
) -> list[list[int]]:
    """Read prompts, target and head both, until at most `piece` tokens of each are left. Returns these.

    Args:
        prompts, lengths, joining: as of `round.prefill`, which reads the rest.
    """
    left, device = list(prompts), target.device
    places = list(range(len(left))) if joining is None else joining
    while long := [i for i, prompt in enumerate(left) if len(prompt) > piece]:
        tokens = on_device([left[i][:piece] for i in long], device)
        rows = None if joining is None and len(long) == len(left) else [places[i] for i in long]
        read_at = on_device([lengths[i] for i in long], device)[:, None].expand_as(tokens) if target.growing else None
        passed = target.forward(tokens, state.cache, on_device([piece - 1], device), read_at, rows)
        counts = [piece] * len(long)
        state.cache.commit(counts, rows)
        state.drafter.read(rows, passed.features, counts)
        for i in long:
            left[i] = left[i][piece:]
    return left
