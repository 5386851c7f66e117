"""What reading the head of a DeepSeek V4 checkpoint takes: memory for the head, whatever the target's size."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_deepseek_v4 import STORED, case, pytestmark  # noqa: F401

MB = 2**20
# Experts are so many times as wide as in the case, and there are so many times as many: the head is larger than what
# else a process allocates, and its single matrices are not.
WIDER, MORE = 16, 40
# Of the target, in every shard: as much as would be seen if a single one of them were read.
TARGET = 1024 * MB
# Matrices that are just being dequantised, in several threads, and what the allocator keeps of them.
MARGIN = 24 * MB
# In a process of its own, as another's memory is what its tests have taken before. The first head, a small one, is for
# what libraries load and keep when they are first used. Memory is looked at behind every matrix and at the end. Pages
# of files, which the system takes back when it needs them, count only in what the process held at most.
READ = """
import sys
from dspark_hf import DSparkHead
from dspark_hf.checkpoints.stored import StoredWeight

def memory(field):
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(field))

def looking(*args):
    tensor = read(*args)
    seen.append(memory("RssAnon"))
    return tensor

DSparkHead.from_pretrained(sys.argv[1])
before, own, seen, read = memory("VmRSS"), memory("RssAnon"), [], StoredWeight._read
StoredWeight._read = looking
head = DSparkHead.from_pretrained(sys.argv[2])
seen.append(memory("RssAnon"))
print(sum(tensor.nbytes for tensor in head.state_dict().values()), max(seen) - own, memory("VmHWM") - before)
"""


def enlarge(tensors: dict, experts: int) -> dict:
    """The tensors of a shard with more and wider experts, which repeat those that are there, with their scales."""
    large = {}
    for name, tensor in tensors.items():
        if "ffn.experts." in name or ".shared_experts." in name:
            tensor = tensor.repeat((1, WIDER) if ".w2." in name else (WIDER, 1))
        elif "ffn.gate." in name:
            tensor = tensor.repeat(MORE, *[1] * (tensor.ndim - 1))
        large[name] = tensor
        before, routed, after = name.partition("ffn.experts.")
        if routed:
            first, kind = after.split(".", 1)
            large |= {f"{before}{routed}{int(first) + i * experts}.{kind}": tensor for i in range(1, MORE)}
    return {name: tensor.clone() for name, tensor in large.items()}


def append_zeros(shard: Path, name: str, size: int) -> None:
    """A further tensor of a file, of bytes that take no room on the disk."""
    whole = shard.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8:start]), whole[start:]
    header[name] = {"dtype": "I8", "shape": [size], "data_offsets": [len(data), len(data) + size]}
    written = json.dumps(header).encode()
    with shard.open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written + data)
        file.truncate(8 + len(written) + len(data) + size)


@pytest.fixture
def large(case, tmp_path) -> Path:  # noqa: F811
    """A copy of the quantised checkpoint with a large head and a far larger target, parts of it beside the head."""
    folder = tmp_path / "large"
    shutil.copytree(case / STORED[1], folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    config, index = (
        json.loads((folder / name).read_text()) for name in ("config.json", "model.safetensors.index.json")
    )
    experts = config["n_routed_experts"]
    config |= {"n_routed_experts": experts * MORE, "moe_intermediate_size": config["moe_intermediate_size"] * WIDER}
    for i, shard in enumerate(sorted(folder.glob("*.safetensors"))):
        tensors = load_file(shard)
        if any(name.startswith("mtp.") for name in tensors):
            tensors = enlarge(tensors, experts)
            save_file(tensors, shard)
            index["weight_map"] |= dict.fromkeys(tensors, shard.name)
        append_zeros(shard, f"of_the_target.{i}", TARGET)
        index["weight_map"][f"of_the_target.{i}"] = shard.name
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_the_peak_is_that_of_the_head(case, large):  # noqa: F811
    """Dequantised, in its own type, and once: neither a second copy nor anything of the target."""
    command = [sys.executable, "-c", READ, str(case / STORED[1]), str(large)]
    # Glibc keeps an arena for every thread; how many there are depends on the machine's cores.
    output = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MALLOC_ARENA_MAX": "1"})
    assert not output.returncode, output.stderr
    size, peak, with_files = map(int, output.stdout.split())
    assert 0.8 * size < peak < size + MARGIN < 1.5 * size
    assert with_files < TARGET / 4
