"""What runs where; and the repository as the `kernels` library sees it."""

# ruff: isort: skip_file

import os
import subprocess
import sys
from pathlib import Path

from interpreter import DEVICE
import dspark_kernels
import pytest
import torch
from dspark_kernels import dispatch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def on_kernels(monkeypatch):
    """As with CUDA tensors."""
    monkeypatch.setattr(dispatch, "uses_kernels", lambda *tensors: True)


def block(vocabulary=50, positions=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, positions, vocabulary, generator=g).to(dtype).to(DEVICE)
    tokens = logits[:, :-1].float().argmax(-1)
    return logits, tokens, torch.full((2,), positions - 1, device=DEVICE)


@pytest.mark.skipif(DEVICE == "cuda", reason="asks what happens without")
def test_cpu_tensors_go_to_torch():
    assert not dspark_kernels.uses_kernels(torch.zeros(1))


def test_the_environment_switches_kernels_off(monkeypatch):
    class OnGpu:
        is_cuda = True

    assert dspark_kernels.uses_kernels(OnGpu())
    monkeypatch.setenv("DSPARK_KERNELS", "off")
    assert not dspark_kernels.uses_kernels(OnGpu())


def test_both_give_the_same(on_kernels, monkeypatch):
    logits, tokens, lengths = block()
    kernel = dspark_kernels.verify_greedy(logits, tokens, lengths)
    monkeypatch.setattr(dispatch, "uses_kernels", lambda *tensors: False)
    for a, b in zip(kernel, dspark_kernels.verify_greedy(logits, tokens, lengths), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: block(dtype=torch.float64), "dtype torch.float64"),
        (lambda: block(positions=19), "blocks of 19 positions"),
        (lambda: block(vocabulary=262_145), "a vocabulary of 262145 tokens"),
    ],
)
def test_what_kernels_do_not_take_is_said_once(on_kernels, monkeypatch, recwarn, make, why):
    monkeypatch.setattr(dispatch, "_warned", set())
    inputs = make()
    for _ in range(2):
        accepted, _ = dspark_kernels.verify_greedy(*inputs)
        assert accepted.tolist() == inputs[2].tolist()
    assert len(recwarn) == 1 and why in str(recwarn[0].message)


def test_weights_in_columns_are_said_to_be_slow(on_kernels, monkeypatch, recwarn):
    monkeypatch.setattr(dispatch, "_warned", set())
    logits, _, _ = block()
    w1 = torch.randn(8, 50, device=DEVICE).T
    dspark_kernels.sample_block(logits, w1, w1, torch.zeros(2, dtype=torch.long, device=DEVICE))
    assert "rows do not lie together" in str(recwarn[0].message)


def test_import_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, dspark_kernels as k\n"
        "x = torch.randn(2, 3, 9)\n"
        "k.verify_sampled(x, x[:, :2], x[:, :2].argmax(-1), torch.tensor([2, 1]), torch.arange(2))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", [["bf16"], ["fp32", "fp16"]])
def test_kernels_compile_for_a_gpu(dtypes, tmp_path):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run(
        [sys.executable, ROOT / "tests" / "compile_for_gpu.py", *dtypes], check=True, env=environment, timeout=600
    )


def test_the_kernels_library_loads_a_local_build(tmp_path):
    kernels = pytest.importorskip("kernels")
    subprocess.run([sys.executable, ROOT / "build_local.py", "--output", tmp_path], check=True)
    loaded = kernels.get_local_kernel(tmp_path)
    assert Path(loaded.__file__).is_relative_to(tmp_path)
    logits, tokens, lengths = block()
    accepted, _ = loaded.verify_greedy(logits, tokens, lengths)
    assert accepted.tolist() == [2, 2]
