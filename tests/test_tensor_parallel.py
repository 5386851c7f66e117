"""Targets that several processes share by tensor parallelism: all of them make the same passes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_targets import NEW_TOKENS, build

WORKER = Path(__file__).parent / "workers" / "tensor_parallel.py"
PROCESSES = 2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["constant", "load", "load, learnt"])
def outcomes(request, tmp_path_factory) -> list[dict]:
    """What the worker wrote with a schedule, of each process."""
    target, results = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("results")
    build("qwen3").save_pretrained(target)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    command = [*launch, WORKER, target, request.param, results]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=450)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((results / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_processes_go_through_the_same_rounds(outcomes, rows, sample, request):
    """And write plain's text where it is greedy."""
    first, second = (of[f"{rows}, {sample}"] for of in outcomes)
    assert first["text"] == second["text"]
    assert first["drafted"] == second["drafted"] and first["verified"] == second["verified"]
    if not sample:
        assert first["text"] == first["plain"]
    assert [len(row) for row in first["text"]] == [9 + NEW_TOKENS] * rows
    if "learnt" not in request.node.name:
        assert sum(map(sum, first["drafted"])) > 0
