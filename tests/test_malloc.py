"""Freed memory stays with the process: seen by the pages that the system hands out, each in a process of its own."""

from __future__ import annotations

import platform
import resource
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
    name, _, value = setting.partition("=")
    if name:
        monkeypatch.setenv(name, value)
    result = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    kept, faults = result.stdout.split()
    assert kept == str(not setting)
    pages = 2**26 // resource.getpagesize()
    assert (int(faults) < pages // 100) == (not setting), f"{faults} of {pages} pages were new"
