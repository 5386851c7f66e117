"""Compile every kernel for a GPU that need not be there (compute capability 9.0), with the launchers' constants.

    python kernels/tests/compile_for_gpu.py [fp32 bf16 fp16]

A process of its own, without TRITON_INTERPRET: the interpreter accepts things that the compiler does not.
"""

import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import triton
from dspark_kernels import attention, sequential, verify
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Of a block on that GPU.
SHARED_MEMORY = 227 * 1024
FLOATS = {"best", "m_parts", "l_parts", "acc_parts", "logits", "sinks"}
INT32 = {"index", "valid"}
INT64 = {"lengths", "drafts", "accepted", "next_tokens", "seeds", "keys", "anchors", "tokens", "starts", "counts"}
# The user's dtype.
OPEN = {"target", "draft", "base", "w1", "w2", "query", "key", "value", "output"}

CASES = [
    (verify._argmax_kernel, {"SLICE": 16384, "TILE": 4096}, {"logits"}),
    (verify._greedy_kernel, {"POSITIONS": 8, "SLICES": 16}, set()),
    (verify._log_sum_exp_kernel, {"SLICE": 16384, "TILE": 4096}, set()),
    (verify._race_kernel, {"POSITIONS": 8, "SLICES": 16, "SLICE": 4096, "TILE": 1024}, set()),
    (verify._race_winner_kernel, {"PARTS": 16}, set()),
    *(
        (
            sequential._position_kernel,
            {"LOOKUP": lookup, "SAMPLE": sample, "ROWS": 32, "RANK": 256, "TILE": 64, "WIDEN": False},
            set(),
        )
        for lookup in (False, True)
        for sample in (False, True)
    ),
    (sequential._tokens_kernel, {}, set()),
    *(
        (
            attention._split_kv_kernel,
            {"WINDOW": window, "QUERIES": 32, "WIDTH": 128, "DIM": 128, "SLICE": 256, "TILE": 64, "WIDEN": False},
            set(),
        )
        for window in (False, True)
    ),
    (attention._combine_kernel, {"SINKS": True, "QUERIES": 32, "SLICES": 32, "WIDTH": 128, "DIM": 128}, set()),
]


def signature_of(kernel, constants: dict, users: set[str], dtype: str) -> dict[str, str]:
    """Types of the arguments; names say which they are. users: those of the user's dtype beside `OPEN`."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in OPEN or name in users:
            types[name] = f"*{dtype}"
        elif name in FLOATS:
            types[name] = "*fp32"
        elif name in INT32:
            types[name] = "*i32"
        elif name in INT64:
            types[name] = "*i64"
        else:
            types[name] = "fp32" if name == "scale" else "i32"
    return types


if __name__ == "__main__":
    for kernel, constants, users in CASES:
        for dtype in sys.argv[1:] or ("fp32", "bf16", "fp16"):
            source = ASTSource(kernel, signature_of(kernel, constants, users, dtype), constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            print(f"{kernel.__name__} {dtype}: {compiled.metadata.shared} bytes of shared memory")
            assert compiled.asm["cubin"] and compiled.metadata.shared <= SHARED_MEMORY, kernel.__name__
