"""Which GPUs the CUDA kernels of a build serve, and why not others."""

import pytest
import torch

from lemur_fast import _compiled, _devices


@pytest.mark.parametrize(
    ("capability", "architectures", "fits"),
    [
        ((8, 0), ["sm_80"], True),
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100"], True),
        ((10, 3), ["sm_100a"], False),
        ((10, 3), ["sm_100f"], True),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((7, 5), ["sm_80", "sm_90", "compute_80"], False),
        ((12, 0), ["sm_100f", "compute_100f"], False),
        ((10, 3), ["compute_100f"], True),
        ((9, 0), [], False),
    ],
)
def test_what_a_build_runs_on(capability, architectures, fits):
    reason = _compiled.lacking(capability, architectures)
    assert (reason is None) == fits
    if not fits:
        assert reason.endswith(f"this GPU is sm_{capability[0]}{capability[1]}")


class FakeModule:
    def __init__(self, cuda: str | None) -> None:
        self.cuda = cuda

    def build_info(self):
        return {"cuda": self.cuda, "cuda_missing": "no nvcc" if self.cuda is None else "", "cuda_archs": ["sm_80"]}


@pytest.mark.parametrize(
    ("cuda", "capability", "reason"),
    [
        (None, (8, 0), "the CUDA kernels were not built: no nvcc"),
        ("13.0", (9, 0), "the CUDA kernels were built for sm_80; this GPU is sm_90"),
        ("13.0", (8, 0), None),
    ],
)
def test_refusals(monkeypatch, cuda, capability, reason):
    monkeypatch.setattr(_compiled, "C", FakeModule(cuda))
    monkeypatch.setattr(_compiled, "missing", None)
    monkeypatch.setattr(_devices, "capability", lambda device: capability if device.index == 1 else (8, 9))
    _compiled._of_build.cache_clear()
    try:
        refuses = _compiled.refuses_cuda
        assert refuses(torch.device("cuda", 1), torch.bfloat16, weight_dtype=torch.float32) == reason
        assert refuses(torch.device("cpu"), torch.bfloat16) == "needs CUDA tensors"
        if reason is None:
            dtypes = "takes float32, bfloat16 and float16, not torch.float64"
            assert refuses(torch.device("cuda", 1), torch.float64) == dtypes
            assert refuses(torch.device("cuda", 1), torch.float32, weight_dtype=torch.float64) == dtypes
        monkeypatch.setattr(_compiled, "missing", "the compiled part is missing")
        assert refuses(torch.device("cuda", 1), torch.bfloat16) == "the compiled part is missing"
    finally:
        _compiled._of_build.cache_clear()
