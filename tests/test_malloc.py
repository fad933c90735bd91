"""Freed memory stays with the process: seen by the pages that the system hands out, each in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_SCRIPT = """
import resource
import torch
from lemur_fast import _malloc

print(_malloc.keep_freed_memory())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**26, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# The first ones: what else starts may take a piece of what was freed.
print(min(faults() for _ in range(6)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it tells glibc's malloc alone")
@pytest.mark.parametrize(
    "setting", ["", "MALLOC_TRIM_THRESHOLD_=131072", "GLIBC_TUNABLES=glibc.malloc.trim_threshold=131072"]
)
def test_freed_memory_is_kept_unless_the_environment_has_settings(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")  # nothing to do with it
    name, _, value = setting.partition("=")
    if name:
        monkeypatch.setenv(name, value)
    result = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    kept, faults = result.stdout.split()
    assert kept == str(not setting)
    assert (int(faults) < 16) == (not setting), f"{faults} pages were new"  # 32 or more, if they are huge
