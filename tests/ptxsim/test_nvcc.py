"""Kernels as nvcc compiles them, against float64; without a barrier or a wait they have to fault."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ptxsim import Fault, Kernel

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")

# SYNC and WAIT are what the mutants leave out.
SOURCE = r"""
#include <cuda_bf16.h>
#include <cstdint>

// y = x / sqrt(mean(x^2) + eps) * w, a row for each block.
extern "C" __global__ void row_norm(const __nv_bfloat16* x, const float* w, __nv_bfloat16* y, int columns, float eps) {
    __shared__ float partial[32];
    const uint4* row = reinterpret_cast<const uint4*>(x + (size_t)blockIdx.x * columns);
    float sum = 0;
    for (int i = threadIdx.x; i < columns / 8; i += blockDim.x) {
        uint4 v = row[i];
        const __nv_bfloat162* h = reinterpret_cast<const __nv_bfloat162*>(&v);
        for (int k = 0; k < 4; k++) {
            float2 f = __bfloat1622float2(h[k]);
            sum += f.x * f.x + f.y * f.y;
        }
    }
    for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(0xffffffff, sum, o);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    SYNC;
    sum = 0;
    for (int i = 0; i < blockDim.x / 32; i++) sum += partial[i];
    float scale = rsqrtf(sum / columns + eps);
    uint4* out = reinterpret_cast<uint4*>(y + (size_t)blockIdx.x * columns);
    for (int i = threadIdx.x; i < columns / 8; i += blockDim.x) {
        uint4 v = row[i];
        __nv_bfloat162* h = reinterpret_cast<__nv_bfloat162*>(&v);
        for (int k = 0; k < 4; k++) {
            float2 f = __bfloat1622float2(h[k]);
            h[k] = __floats2bfloat162_rn(f.x * scale * w[8 * i + 2 * k], f.y * scale * w[8 * i + 2 * k + 1]);
        }
        out[i] = v;
    }
}

// c [16, 8 blocks] = a [16, k] b [8 blocks, k]^T, two warps a block, each with half of k.
extern "C" __global__ void product(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int k) {
    __shared__ __align__(16) __nv_bfloat16 left[2][16][24], right[2][8][24];
    __shared__ float sums[16][8];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    auto at = [](const void* p) { return (uint32_t)__cvta_generic_to_shared(p); };
    auto copy = [&](void* to, const void* from) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at(to)), "l"(from) : "memory");
    };
    b += (size_t)blockIdx.x * 8 * k;
    float d[4] = {0, 0, 0, 0};
    for (int start = warp * k / 2; start < (warp + 1) * k / 2; start += 16) {
        copy(&left[warp][lane / 2][lane % 2 * 8], a + (lane / 2) * k + start + lane % 2 * 8);
        if (lane < 16) copy(&right[warp][lane / 2][lane % 2 * 8], b + (lane / 2) * k + start + lane % 2 * 8);
        asm volatile("cp.async.commit_group;" ::: "memory");
        WAIT;
        __syncwarp();
        uint32_t x[4], y[2];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(at(&left[warp][lane % 16][lane / 16 * 8])) : "memory");
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(y[0]), "=r"(y[1]) : "r"(at(&right[warp][lane % 8][lane / 8 % 2 * 8])) : "memory");
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
        __syncwarp();
    }
    int row = lane / 4, column = lane % 4 * 2;
    if (warp == 1) {
        for (int i = 0; i < 4; i++) sums[row + i / 2 * 8][column + i % 2] = d[i];
    }
    SYNC;
    if (warp == 0) {
        for (int i = 0; i < 2; i++) {
            float2 v = make_float2(d[2 * i] + sums[row + 8 * i][column], d[2 * i + 1] + sums[row + 8 * i][column + 1]);
            *reinterpret_cast<float2*>(c + ((row + 8 * i) * gridDim.x + blockIdx.x) * 8 + column) = v;
        }
    }
}
"""


@functools.cache
def compiled(arch: str = "sm_80", sync: str = "__syncthreads()", wait: str = "0", options: tuple[str, ...] = ()) -> str:
    statement = f'asm volatile("cp.async.wait_group {wait};" ::: "memory")'
    with tempfile.TemporaryDirectory() as folder:
        source, to = Path(folder, "kernels.cu"), Path(folder, "kernels.ptx")
        source.write_text(f"#define SYNC {sync}\n#define WAIT {statement}\n#line 1\n{SOURCE}")
        subprocess.run(["nvcc", "-ptx", f"-arch={arch}", *options, "-o", to, source], check=True, capture_output=True)
        return to.read_text()


def bf16(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits, and the numbers in float64."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return x.view(torch.int16).numpy(), x.double().numpy()


def run_row_norm(ptx: str, threads: int = 64, columns: int = 1048) -> None:
    bits, x = bf16((3, columns), 0)
    w = np.linspace(0.5, 2, columns, dtype=np.float32)
    y = np.zeros((3, columns), np.int16)
    counts = Kernel(ptx, "row_norm").launch((3,), threads, [bits, w, y, columns, 1e-5])
    want = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * w
    got = torch.from_numpy(y).view(torch.bfloat16).double().numpy()
    assert np.abs(got - want).max() <= 2**-8 * np.abs(want).max()
    assert (np.abs(got - want) <= 2**-8 * np.abs(want) * 1.01).all()  # half a unit of bfloat16, and float32's own
    assert counts.barriers == 3
    assert counts.stores.bytes == y.nbytes
    assert counts.loads.bytes == 2 * x.size * 2 + x.size * 4  # x twice, and w for each row


def run_product(ptx: str, blocks: int = 2, k: int = 96) -> None:
    a_bits, a = bf16((16, k), 1)
    b_bits, b = bf16((8 * blocks, k), 2)
    c = np.zeros((16, 8 * blocks), np.float32)
    counts = Kernel(ptx, "product").launch((blocks,), 64, [a_bits, b_bits, c, k])
    assert np.abs(c - a @ b.T).max() < 1e-5 * k
    assert counts.instructions["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] == blocks * k // 16
    # ldmatrix has no conflicts, for rows of 48 bytes; each of 4 loads of the sums meets every bank it needs twice.
    assert counts.shared_loads.units - counts.shared_loads.fewest_units == 4 * blocks


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_results(arch: str) -> None:
    run_row_norm(compiled(arch))
    run_product(compiled(arch))


def test_one_warp_and_one_vector() -> None:
    run_row_norm(compiled(), threads=32, columns=8)
    run_row_norm(compiled(), threads=1024, columns=520)


def test_without_the_barrier() -> None:
    """The simulator runs warps in step, so the results are right all the same: the race has to be seen as such."""
    ptx = compiled(sync="")
    assert "bar.sync" not in ptx
    with pytest.raises(Fault, match=r"race: a shared load of what another thread stored|nobody has written"):
        run_row_norm(ptx)
    with pytest.raises(Fault, match=r"race: a shared load of what another thread stored|nobody has written"):
        run_product(ptx)


def test_with_a_barrier_of_the_warp_only() -> None:
    with pytest.raises(Fault, match=r"race: a shared load of what another thread stored|nobody has written"):
        run_row_norm(compiled(sync="__syncwarp()"))


def test_waiting_for_a_group_too_few() -> None:
    with pytest.raises(Fault, match=r"ldmatrix of shared memory that cp\.async has not been waited for"):
        run_product(compiled(wait="1"))


def test_a_row_that_is_no_multiple_of_a_vector_is_out_of_alignment() -> None:
    with pytest.raises(Fault, match="misaligned load of 16 bytes from global memory"):
        run_row_norm(compiled(), columns=1044)


def test_the_line_of_the_source_is_named() -> None:
    with pytest.raises(Fault, match=r"kernels\.cu:\d+, CTA \(0, 0, 0\) of row_norm"):
        run_row_norm(compiled(sync="", options=("-lineinfo",)))


def test_the_example_of_the_readme(tmp_path, monkeypatch) -> None:
    text = Path(__file__).with_name("README.md").read_text()
    cuda, python = (re.search(rf"```{name}\n(.*?)```", text, re.DOTALL)[1] for name in ("cuda", "python"))
    monkeypatch.chdir(tmp_path)
    compile_ = ["nvcc", "-ptx", "-arch=sm_80", "-lineinfo", "rows.cu"]
    assert " ".join(compile_) in text
    Path("rows.cu").write_text(cuda)
    subprocess.run(compile_, check=True, capture_output=True)
    exec(python, {})
    Path("rows.cu").write_text(cuda.replace("__syncthreads();", ""))
    subprocess.run(compile_, check=True, capture_output=True)
    with pytest.raises(Fault) as caught:
        exec(python, {})
    message = text[text.index("    Fault: ") + 11 :].split("\n\n")[0].replace("\n    ", "\n")
    # Registers are numbered as the compiler's version likes.
    assert re.sub(r"%\w+", "%", str(caught.value)) == re.sub(r"%\w+", "%", message)
