"""What a draft takes of a round, and what the head keeps, at contexts of 512 to 16,384 tokens, with and without a
window.

    python benchmarks/long_contexts.py
    python benchmarks/long_contexts.py --contexts 1024 65536 --windows 4096 --dtype bfloat16

The pair has random weights: eight layers of target, three of head, as wide as the published heads are beside their
targets, so that every draft is made and hardly any is kept; and so has the context, whose keys, values and states are
made up instead of computed from a prompt. Rounds with a whole block and plain steps take turns in one engine; medians
are shown.
"""

import argparse
import time
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    Qwen3Config,
    Qwen3ForCausalLM,
    StoppingCriteriaList,
)

from dspark_hf import DSparkConfig, DSparkHead
from dspark_hf.generation.cache import SlotCache
from dspark_hf.generation.drafting import Drafter
from dspark_hf.generation.engine import Engine
from dspark_hf.generation.experience import scheduler_for
from dspark_hf.generation.processors import BlockProcessors
from dspark_hf.generation.rows import Row, read_rows
from dspark_hf.generation.stopping import Stopping
from dspark_hf.generation.target import Target

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384)
WINDOWS = (512, 2048)
# Steps of each kind that are measured, behind those that read what the prompt has left.
ROUNDS, FIRST = 24, 2
# Tokens whose states the head reads at once.
PIECE = 2048


def pair_of(dtype: torch.dtype) -> tuple[Qwen3ForCausalLM, DSparkHead]:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=131072,
    )  # fmt: skip
    target = Qwen3ForCausalLM(config).to(dtype).eval()
    head = DSparkHead(DSparkConfig.from_target(config, num_hidden_layers=3, markov_rank=64)).to(dtype).eval()
    head.generation_config.num_assistant_tokens_schedule = "constant"
    return target, head


class MadeUp:
    """For an engine what is known of its one row: random keys, values and states of all tokens but the last."""

    given_in_part = False

    def __init__(self, config: Qwen3Config):
        self.shape = config.num_key_value_heads, config.head_dim

    def load(self, rows: list[Row], places: list[int], slots: SlotCache, drafter: Drafter) -> None:
        (heads, size), count = self.shape, rows[0].cached
        kept = [tuple(torch.randn(heads, count, size, dtype=drafter.dtype) for _ in range(2)) for _ in slots.layers]
        slots.put(0, kept, count)
        for start in range(0, count, PIECE):
            size = min(PIECE, count - start)
            drafter.read(None, torch.randn(1, size, drafter.head.fc.in_features, dtype=drafter.dtype), [size])

    def keep_row(self, *args) -> None:
        """Rows are not remembered."""


def engine_of(model: Qwen3ForCausalLM, head: DSparkHead, context: int) -> Engine:
    """An engine whose one row has a context of so many tokens."""
    ids = torch.randint(5, 4000, (1, context))
    stopping = Stopping(StoppingCriteriaList([MaxLengthCriteria(context + 20 * (ROUNDS + FIRST))]))
    (row,) = read_rows(ids, None, 0, context, BlockProcessors(LogitsProcessorList(), do_sample=False), stopping)
    row.cached, row.prompt = context - 1, row.given[-1:]
    target, drafter = Target(model, head.config.target_layer_ids), Drafter(head, model, 1)
    scheduler = scheduler_for(target, drafter, 1, GenerationConfig())
    engine = Engine(target, drafter, scheduler, 1, past=MadeUp(model.config), private=True)
    engine.add([row])
    engine.step()
    return engine


def measure(engine: Engine) -> tuple[float, float, float]:
    """Median milliseconds of a draft, of a round with it, and of a plain step."""
    drafts, rounds, steps = [], [], []
    for index in range(2 * (ROUNDS + FIRST)):
        engine.planner.drafts = index % 2 == 0
        before = engine.clock.seconds.copy()
        engine.step()
        parts = {name: 1000 * (total - before.get(name, 0.0)) for name, total in engine.clock.seconds.items()}
        if index >= 2 * FIRST:
            (rounds if engine.planner.drafts else steps).append(sum(parts.values()))
            drafts += [parts["draft"]] if engine.planner.drafts else []
    return median(drafts), median(rounds), median(steps)


def kept_bytes(engine: Engine) -> int:
    """Memory of the head's cache."""
    return sum(x.nbytes for layer in engine.drafter.cache.layers for x in layer.whole)


def main(contexts: list[int], windows: list[int], dtype: str) -> None:
    target, head = pair_of(getattr(torch, dtype))
    table = Table(title=f"batch 1, {dtype}, {torch.get_num_threads()} threads; ms, medians of {ROUNDS}")
    for column in ("context", "window", "plain step", "draft", "round", "draft's share", "head's cache, MiB"):
        table.add_column(column, justify="right")
    for context in contexts:
        for window in (None, *windows):
            head.generation_config.draft_window = window
            engine = engine_of(target, head, context)
            draft, whole, step = measure(engine)
            cells = f"{step:.2f}", f"{draft:.2f}", f"{whole:.2f}", f"{draft / whole:.0%}"
            table.add_row(f"{context:,}", str(window or "-"), *cells, f"{kept_bytes(engine) / 2**20:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--windows", nargs="+", type=int, default=WINDOWS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cpu-time", action="store_true", help="of this process, where others run beside it")
    args = parser.parse_args()
    if args.cpu_time:
        # What the clock of an engine reads.
        time.perf_counter = time.process_time
    main(args.contexts, args.windows, args.dtype)
