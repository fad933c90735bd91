"""The bars of what the kernels become on a GPU; and that the program which prints them would notice."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from benchmarks import gpu_static, nvcc
from benchmarks.ahead_of_time import TARGETS, Resources
from benchmarks.gpu_bound import DEVICES, bound, cycles
from tests.conftest import INTERPRETING
from tests.ptxsim import Counts
from tests.ptxsim.counting import Requests

pytestmark = pytest.mark.skipif(INTERPRETING, reason="compiles kernels, which TRITON_INTERPRET=1 prevents")


def broken(
    target: str, dtype: torch.dtype, cases: list[gpu_static.Case], kernels: gpu_static.Kernels = gpu_static.TRITON
) -> list[str]:
    rows = [row for case in cases for row in gpu_static.rows_of(case, target, dtype, kernels)]
    assert rows
    return [line for row in rows for line in gpu_static.broken_bars(target, dtype, row, rows)]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("head_dims", [(), (64,), (128,)], ids=["rows", "heads of 64", "heads of 128"])
def test_bars(target, head_dims):
    cases = gpu_static.cases(head_dims, every_option=False)
    wanted = [case for case in cases if (case.op == "attention") == bool(head_dims)]
    assert broken(target, torch.bfloat16, wanted) == []


@pytest.mark.parametrize("target", TARGETS)
def test_bars_where_registers_are_fewest(target):
    assert broken(target, torch.bfloat16, [gpu_static.attention_case(128, ", window, softcap")]) == []


needs_nvcc = pytest.mark.skipif(nvcc.missing() is not None, reason=str(nvcc.missing()))


@needs_nvcc
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bars_of_cuda(dtype):
    cases = [case for case in gpu_static.cases((), every_option=False) if case.in_cuda]
    assert broken("sm_80", dtype, cases, gpu_static.CUDA) == []


@needs_nvcc
@pytest.mark.parametrize(
    "target",
    [pytest.param(t, marks=pytest.mark.slow) if t != "sm_80" else t for t in ("sm_86", *gpu_static.CUDA_TARGETS)],
)
def test_no_variant_in_cuda_spills(target):
    """Those of other widths, dtypes and alignments, too."""
    assert len(nvcc.compiled(target)) > 90
    assert gpu_static.broken_variants(target) == []


def test_kernels_are_compiled_as_the_build_compiles_them():
    cmake = (nvcc.ROOT / "cmake" / "cuda.cmake").read_text()
    assert "set(CMAKE_CUDA_STANDARD 17)" in cmake
    assert "target_compile_options(lemur_cuda PRIVATE --fmad=false)" in cmake
    assert {"-std=c++17", "--fmad=false"} <= set(nvcc.OPTIONS)
    listed = re.search(r"set\(CUDA_KERNELS([^)]*)\)", cmake)[1].split()
    assert sorted(listed) == [str(path.relative_to(nvcc.ROOT)) for path in nvcc.SOURCES]


def test_a_variant_that_spills_is_named(monkeypatch):
    good, bad = nvcc.Compiled(32, 0, 0, ("LDG.E.128",)), nvcc.Compiled(32, 8, 0, ("LDG.E.128", "STL"))
    monkeypatch.setattr(nvcc, "compiled", lambda target: {"good": good, "bad": bad})
    assert gpu_static.broken_variants("sm_90") == ["sm_90: CUDA C++, bad: stack 8 bytes, spills 4 bytes"]


def test_cuda_has_narrower_bars():
    moved = {"counts": counts(loaded=Counter(x=3300)), "least": 6400.0, "op": "swiglu", "kernel": "forward"}
    for language, wrong in (("Triton", 0), ("CUDA C++", 0)):
        assert len(gpu_static.broken_bars("sm_80", torch.bfloat16, row(language=language, **moved), [])) == wrong
    moved["counts"] = counts(loaded=Counter(x=3400), loads=Requests(10, 3200, 3200, 3200, 103, 100))
    for language, wrong in (("Triton", 0), ("CUDA C++", 2)):
        assert len(gpu_static.broken_bars("sm_80", torch.bfloat16, row(language=language, **moved), [])) == wrong


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bars_of_everything(target, dtype):
    assert broken(target, dtype, gpu_static.cases((16, 64, 96, 128, 256), every_option=True)) == []


GOOD = Resources(32, 0, 0, 1024, 128, {"HMMA": 8, "LDGSTS": 4}, 128)


def row(resources: Resources = GOOD, **changes) -> gpu_static.Row:
    fields = {
        "language": "Triton",
        "op": "attention",
        "kernel": "dq",
        "shape": "",
        "config": "",
        "resources": resources,
    } | changes
    return gpu_static.Row(**fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stack": 8}, "stack 8 bytes"),
        ({"spills": 4}, "spills 4 bytes"),
        ({"shared": 164 * 1024}, "past 163 KiB"),
        ({"widest": 64}, "its widest load has 64 bits"),
        ({"instructions": {"LDGSTS": 4}}, "no tensor-core instruction"),
        ({"instructions": {"HMMA": 4}}, "no asynchronous copy"),
    ],
)
def test_what_was_compiled_badly_is_named(changes, message):
    assert gpu_static.broken_bars("sm_80", torch.bfloat16, row(), []) == []
    (line,) = gpu_static.broken_bars("sm_80", torch.bfloat16, row(Resources(**(vars(GOOD) | changes))), [])
    assert message in line


def counts(**changes) -> Counts:
    """Of a kernel that moves 6,400 bytes as it should."""
    loads = Requests(requests=10, bytes=3200, unique_bytes=3200, wide_bytes=3200, units=100, fewest_units=100)
    stores = Requests(requests=10, bytes=3200, unique_bytes=3200, wide_bytes=3200, units=100, fewest_units=100)
    fields = {"ctas": 1, "loads": loads, "stores": stores, "loaded": Counter(x=3200), "stored": Counter(y=3200)}
    return Counts(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loaded": Counter(x=3600)}, "traffic 1.062 times"),
        ({"loads": Requests(10, 3200, 3200, 3200, 110, 100)}, "loads use 90.9% of their sectors"),
        ({"stores": Requests(10, 3200, 3200, 3200, 110, 100)}, "stores use 90.9% of their sectors"),
        ({"stores": Requests(10, 3200, 3200, 0, 100, 100)}, "50.0% of its global bytes move 16 at a time"),
        ({"shared_loads": Requests(10, 3200, 3200, 3200, 12, 10)}, "0.20 bank conflicts a request of shared loads"),
        ({"shared_stores": Requests(10, 3200, 3200, 3200, 12, 10)}, "0.20 bank conflicts a request of shared stores"),
    ],
)
def test_what_moves_badly_is_named(changes, message):
    good = row(op="swiglu", kernel="forward", counts=counts(), least=6400.0)
    assert gpu_static.broken_bars("sm_80", torch.bfloat16, good, [good]) == []
    bad = row(op="swiglu", kernel="forward", counts=counts(**changes), least=6400.0)
    (line,) = gpu_static.broken_bars("sm_80", torch.bfloat16, bad, [bad])
    assert message in line


def test_what_no_access_could_move_16_at_a_time_is_left_out():
    moved = counts(loads=Requests(10, 3200, 3200, 2600, 100, 100))  # 90.6% of all bytes
    for scattered, broken in ((0.1, 0), (0.08, 1)):
        bad = row(counts=moved, least=6400.0, scattered=scattered)
        assert len(gpu_static.broken_bars("sm_80", torch.bfloat16, bad, [bad])) == broken


def test_a_bound_by_hand():
    """One SM's worth of each unit, from the rates of the vendor's tables."""
    device = DEVICES["sm_80"]
    executed = {
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": 108 * 10,  # 2,048 products each, 1,024 a cycle
        "ex2.approx.ftz.f32": 108 * 7,  # 32 of a warp, 16 a cycle
        "fma.rn.f32": 108 * 6,  # 64 a cycle
        "mov.b32": 10**6,
    }
    needs = cycles(Counts(instructions=Counter(executed), distinct=1555 * 1410), device)
    assert needs["tensor"] == pytest.approx(20)
    assert needs["special"] == pytest.approx(14)
    assert needs["float32"] == pytest.approx(3)
    assert needs["issue"] == pytest.approx(23 / 4)
    assert needs["dram"] == pytest.approx(1410 * 1.41)  # 1.41 us
    assert bound(needs, device) == ("dram", pytest.approx(1.41))
    with pytest.raises(ValueError, match="not in the table"):
        cycles(Counts(instructions=Counter({"frob.b32.x": 1})), device)


@pytest.mark.parametrize("opcode", ["add.s64", "setp.lt.and.f32", "cvt.rn.bf16x2.f32", "lop3.b32", "ld.global.v4.b32"])
def test_an_instruction_of_every_kind_has_a_cost(opcode):
    assert cycles(Counts(instructions=Counter({opcode: 1})), DEVICES["sm_90"])["issue"] > 0
