"""What a device is: the name of its model, and its compute capability."""

from __future__ import annotations

import functools
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch


def cpu_model() -> str:
    """The CPU's name, as its system tells it."""
    try:
        if sys.platform == "darwin":
            return subprocess.run(
                ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=True
            ).stdout.strip()
        text = Path("/proc/cpuinfo").read_text()
    except (OSError, subprocess.CalledProcessError):
        return platform.processor() or "unknown"
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or "unknown"


def model(device: torch.device) -> str | None:
    """The name of the device's model, by which tables are kept; None where there is no such device."""
    if device.type == "cpu":
        return cpu_model()
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return None


@functools.cache
def _capability_of(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@torch.compiler.assume_constant_result  # a device keeps its capability: the compiler need not trace the question
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device, its own and not the current device's."""
    return _capability_of(device.index)
