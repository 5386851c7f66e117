"""What tables and files of results share."""

import platform
from pathlib import Path

import torch


def format_cell(value: float | None, pattern: str) -> str:
    """A value as a table shows it, "-" where there is none."""
    return "-" if value is None else pattern.format(value)


def device_name(device: torch.device) -> str:
    """The processor, as people name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = f"{torch.get_num_threads()} CPU thread{'s' if torch.get_num_threads() > 1 else ''}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{threads} of {model or platform.processor() or platform.machine()}"
