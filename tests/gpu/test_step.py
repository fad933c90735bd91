"""A training step on a PackedBatch: as separate documents, without waits, twice alike, in a CUDA graph."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lemur_fast as lf
from tests.llama.test_execution import count_waits
from tests.llama.tiny import assert_same, documents, gradients, pair, separate_documents, tiny_llama


def batch_on(device: torch.device) -> lf.PackedBatch:
    return lf.PackedBatch.from_documents(documents(), pad_to=32).to(device)


@pytest.fixture
def model(device: torch.device) -> nn.Module:
    ours, _ = pair()
    return ours.to(device)


def test_packed_equals_separate_documents(device, model):
    stock = tiny_llama().to(device)
    loss = model(**batch_on(device).model_inputs()).loss
    loss.backward()
    total, exact = separate_documents(stock, [doc.to(device) for doc in documents()])
    assert_same((loss.detach(), gradients(model)), (total, exact), rtol=2e-5)


@contextmanager
def no_sync() -> Iterator[None]:
    """Raises where the host waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_step_never_waits_for_the_device(device, model):
    """On a GPU torch itself watches, inside our operators too; on a CPU operators that would wait are counted."""
    torch.use_deterministic_algorithms(False)  # as users run it; the mode also changes which backend serves
    batch = batch_on(device)
    if device.type == "cpu":
        assert count_waits(model, batch.model_inputs()) == 0
        return
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for watch in (nullcontext, no_sync):  # the first step compiles kernels
        torch.cuda.synchronize()
        with watch():
            model(**batch.model_inputs()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def test_the_watch_notices(gpu):
    with no_sync(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(3, device=gpu).sum().item()


def train(model: nn.Module, batch: lf.PackedBatch, steps: int) -> list[Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch.model_inputs()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def test_two_runs_give_the_same_bits(device, model):
    torch.use_deterministic_algorithms(False)  # as users run it; the mode also changes which backend serves
    batch = batch_on(device)
    first, second = (train(copy.deepcopy(model), batch, 4) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert first[-1] < first[0]


def test_a_step_in_a_cuda_graph(gpu):
    """Captured once, replayed on another batch of the same shape: the loss and gradients of an ordinary step."""
    torch.use_deterministic_algorithms(False)
    ours, _ = pair()
    model = ours.to(gpu)
    eager = copy.deepcopy(model)
    batch = batch_on(gpu)
    inputs = batch.model_inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch's documentation asks: warm up beside the default stream
        for _ in range(3):
            model.zero_grad()
            model(**inputs).loss.backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = model(**inputs).loss
        loss.backward()
    other = lf.PackedBatch.from_documents([doc.flip(0) for doc in documents()], pad_to=32).to(gpu)
    for name, value in other.model_inputs().items():
        if isinstance(value, Tensor):
            inputs[name].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    expected = eager(**other.model_inputs()).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, gradient in gradients(eager).items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=1e-6, atol=1e-8)


SANITIZED = """
import torch, lemur_fast as lf
from tests.gpu.test_ops import ATTENTION, LARGER, bits
device = torch.device("cuda")
for name, make in {**LARGER, **{f"attention, {k}": v for k, v in ATTENTION.items()}}.items():
    bits(make().on(device, torch.bfloat16))
torch.cuda.synchronize()
print("ran all")
"""


TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SECONDS = float(os.environ.get("LEMUR_FAST_CHECK_SECONDS", 315)) - 15
"""For all tools; `make gpu-check` says how long its section has, and pytest begins and ends within it, too."""


@contextmanager
def under_every_tool(program: str, folder: Path, seconds: float) -> Iterator[Callable[[str], tuple[int | None, str]]]:
    """Tool -> how `SANITIZED` ended under it, None where it did not in time, and what was printed.

    All tools begin at once: what takes long is the host, which compiles and instruments.
    """
    end, running = time.monotonic() + seconds, {}
    for tool in TOOLS:
        command = [program, f"--tool={tool}", "--error-exitcode=3", sys.executable, "-c", SANITIZED]
        with (folder / tool).open("w") as stream:
            running[tool] = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)

    def ended(tool: str) -> tuple[int | None, str]:
        try:
            code = running[tool].wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        return code, (folder / tool).read_text(errors="replace")

    try:
        yield ended
    finally:
        for process in running.values():
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[int | None, str]]]:
    """See `under_every_tool`."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    with under_every_tool(program, tmp_path_factory.mktemp("sanitizer"), SECONDS) as ended:
        yield ended


def test_a_tool_that_hangs_takes_no_time_from_the_others(tmp_path):
    stand_in = tmp_path / "tool"
    stand_in.write_text("#!/bin/sh\ncase $1 in *memcheck) exec sleep 60;; *racecheck) echo a race; exit 3;; esac\n")
    stand_in.chmod(0o755)
    with under_every_tool(str(stand_in), tmp_path, 2.0) as ended:
        found = [ended(tool) for tool in TOOLS]
    assert found == [(None, ""), (3, "a race\n"), (0, ""), (0, "")]


@pytest.mark.parametrize("tool", TOOLS)
def test_compute_sanitizer(gpu, sanitized, tool):
    """Every op's kernels under each of its tools."""
    code, printed = sanitized(tool)
    if "Device not supported" in printed:
        pytest.skip("compute-sanitizer does not support this device")
    assert code is not None, f"not done after {SECONDS:.0f} s: {printed[-2000:]}"
    assert code == 0, printed[-6000:]
    assert "ran all" in printed
