"""Which of the two implementations runs."""

import functools
import importlib.util
import os
import warnings
from types import ModuleType

import torch

from .reference import attention as attention_reference
from .reference import sequential as sequential_reference
from .reference import verify as verify_reference
from .reference.verify import INVALID as INVALID

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_VOCABULARY = 262_144
LARGEST_BLOCK = 16
LARGEST_RANK = 512
LARGEST_HEAD = 256

_warned: set[str] = set()


def verify_greedy(
    target_logits: torch.Tensor, draft_tokens: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept drafts while they are the target's argmax (the first of equals).

    Args:
        target_logits: [R, L+1, V], any strides. draft_tokens: [R, L] int64. lengths: [R] int64, drafts of each row
            that count; logits behind them are not looked at.

    Returns:
        accepted [R] int64, and the target's own token behind them [R] int64. Where a position that counts holds NaN,
        or nothing but -inf, these are 0 and `INVALID`.
    """
    module = _module("verify", verify_reference, _block_problem(target_logits), target_logits)
    return module.verify_greedy(target_logits, draft_tokens, lengths)


def verify_sampled(
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    lengths: torch.Tensor,
    seeds: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept draft x with probability min(1, p(x)/q(x)); after a rejection draw from norm(max(p - q, 0)), else from p,
    so that committed tokens are distributed as sampled from p (speculative sampling).

    Args:
        target_logits: [R, L+1, V] of p, any strides. draft_logits: [R, L, V] of q, what the drafts were drawn from.
        draft_tokens: [R, L] int64. lengths: [R] int64, as in `verify_greedy`.
        seeds: [R] int64; the same seeds, logits and drafts give the same tokens.

    Returns:
        as `verify_greedy`; a row is also invalid where a position of the draft, or +inf, makes no distribution.
    """
    problem = _block_problem(target_logits, draft_logits)
    module = _module("verify", verify_reference, problem, target_logits, draft_logits)
    return module.verify_sampled(target_logits, draft_logits, draft_tokens, lengths, seeds)


def sample_block(
    base_logits: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    anchors: torch.Tensor,
    seeds: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draft a block with the vanilla Markov head: logits are the base logits plus W1[token before] W2.

    Args:
        base_logits: [R, L, V], any strides. w1: [V, n]. w2: [V, n]. anchors: [R] int64, the tokens before the block.
        seeds: [R] int64 to sample; `None` for the argmax. temperature: divides the logits.

    Returns:
        tokens [R, L] int64, `INVALID` from the first position of a row that holds NaN or nothing but -inf; and what
        they were sampled from, the logits divided by the temperature [R, L, V] float32, `None` for the argmax.
    """
    problem = _block_problem(base_logits) or _head_problem(w1, w2)
    module = _module("sequential", sequential_reference, problem, base_logits, w1, w2)
    return module.sample_block(base_logits, w1, w2, anchors, seeds, temperature)


def sample_position(
    base_logits: torch.Tensor,
    embedded: torch.Tensor,
    w2: torch.Tensor,
    seeds: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One position of any sequential head, once its input to W2 is known: see `sample_block`.

    Args:
        base_logits: [R, V]. embedded: [R, n], what W2 is multiplied by: a W1 row, gated, or the output of the RNN.

    Returns:
        tokens [R], and the logits [R, V].
    """
    problem = _block_problem(base_logits[:, None]) or _head_problem(embedded, w2)
    module = _module("sequential", sequential_reference, problem, base_logits, embedded, w2)
    return module.sample_position(base_logits, embedded, w2, seeds, temperature)


def ragged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a few new tokens a row, whose own keys and values are in their slots already.

    Args:
        query: [R, H, n, D], n from 1 to 16. key, value: [R, H_kv, view, D], views of a cache; H a multiple of H_kv.
        starts: [R] int64, slot of a row's first query; the others follow. counts: [R] int64, queries that are there.
        scale: of the scores. window: a query sees the last so many slots, its own included; `None` for all.
        sinks: [H], a logit a head that takes part in the softmax and has no value.

    Returns:
        [R, n, H, D]; zeros for queries that are not there.
    """
    problem = None
    if query.shape[2] > LARGEST_BLOCK:
        problem = f"{query.shape[2]} queries a row, of {LARGEST_BLOCK} at most"
    elif query.shape[3] > LARGEST_HEAD:
        problem = f"heads of {query.shape[3]} dimensions, of {LARGEST_HEAD} at most"
    elif any(x.stride(3) != 1 for x in (query, key, value)):
        problem = "heads that do not lie together in memory"
    module = _module("attention", attention_reference, problem, query, key, value)
    return module.ragged_attention(query, key, value, starts, counts, scale, window, sinks)


def random_seeds(rows: int, device: torch.device) -> torch.Tensor:
    """Seeds [R] for the functions above, from torch's generator: `torch.manual_seed` reproduces them."""
    return torch.randint(2**63 - 1, (rows,), device=device)


def uses_kernels(*tensors: torch.Tensor) -> bool:
    """Whether tensors like these go to the kernels, as far as their device and the environment say. A compiler is shown
    torch, of which it makes kernels of its own."""
    if torch.compiler.is_compiling():
        return False
    wanted = os.environ.get("DSPARK_KERNELS", "").lower() not in ("off", "0", "false")
    return wanted and all(tensor.is_cuda for tensor in tensors) and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _module(name: str, reference: ModuleType, problem: str | None, *tensors: torch.Tensor) -> ModuleType:
    """The module of kernels, or what does the same in torch; with a warning where kernels do not take the tensors."""
    if not uses_kernels(*tensors):
        return reference
    dtypes = sorted({str(tensor.dtype) for tensor in tensors if tensor.dtype not in DTYPES})
    problem = f"dtype {', '.join(dtypes)}" if dtypes else problem
    if problem is None:
        return importlib.import_module(f".{name}", __package__)
    message = f"The {name} kernel does not take {problem}; torch runs instead, which is slower."
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)
    return reference


def _block_problem(*logits: torch.Tensor) -> str | None:
    if logits[0].shape[2] > LARGEST_VOCABULARY:
        return f"a vocabulary of {logits[0].shape[2]} tokens, of {LARGEST_VOCABULARY} at most"
    if logits[0].shape[1] > LARGEST_BLOCK + 1:
        return f"blocks of {logits[0].shape[1]} positions, of {LARGEST_BLOCK + 1} at most"
    return None


def _head_problem(*weights: torch.Tensor) -> str | None:
    if weights[1].shape[1] > LARGEST_RANK:
        return f"a rank of {weights[1].shape[1]}, of {LARGEST_RANK} at most"
    if any(weight.stride(1) != 1 for weight in weights):
        return "weights whose rows do not lie together in memory"
    return None
