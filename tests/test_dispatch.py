"""Which backend serves an op, and what the user is told about it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import lemur_fast as lf
from lemur_fast import _triton, dispatch

CPU = torch.device("cpu")


def chosen(op="rms_norm", dtype=torch.float32, elements=1, wants_grad=False, **traits):
    return dispatch.choose(op, CPU, dtype, elements, wants_grad, **traits)


def test_default_order_on_a_cpu_is_cpu_then_reference():
    for op in ("rotary", "swiglu", "cross_entropy", "linear_cross_entropy", "rms_norm"):
        assert chosen(op) == "cpu"
    assert chosen("attention", head_dim=64) == "cpu"
    assert chosen(dtype=torch.float64) == "reference"


def test_use_backend_prefers_in_order_and_nests():
    with lf.use_backend("reference", "cpu"):
        assert chosen() == "reference"
        with lf.use_backend("cpu"):
            assert chosen() == "cpu"
        assert chosen() == "reference"
    assert chosen() == "cpu"


def test_use_backend_is_undone_by_an_error():
    with pytest.raises(KeyError), lf.use_backend("reference"):
        raise KeyError
    assert chosen() == "cpu"


def test_a_backend_that_cannot_serve_raises_and_says_why():
    with (
        lf.use_backend("cpu"),
        pytest.raises(lf.BackendError, match=r"rms_norm on cpu in torch.float64.*cpu: takes float32"),
    ):
        lf.ops.rms_norm(torch.zeros(2, 4).double(), torch.zeros(4).double())
    with lf.use_backend("cuda", "triton"), pytest.raises(lf.BackendError, match=r"cuda: .*; triton: "):
        lf.ops.swiglu(torch.zeros(4), torch.zeros(4))


@pytest.mark.parametrize("names", [(), ("gpu",), ("cpu", "tritn")])
def test_unknown_backends_are_named(names):
    with (
        pytest.raises(ValueError, match="takes cuda, triton, varlen, flash_attn, cpu, reference"),
        lf.use_backend(*names),
    ):
        pass


def test_the_backward_uses_the_backend_of_the_forward(monkeypatch):
    seen = []
    backend = dispatch._registry["swiglu"]["reference"]
    for role, function in list(backend.functions.items()):
        monkeypatch.setitem(backend.functions, role, lambda *a, r=role, f=function: (seen.append(r), f(*a))[1])
    x = torch.zeros(4, requires_grad=True)
    with lf.use_backend("reference"):
        y = lf.ops.swiglu(x, x)
    y.sum().backward()
    assert seen == ["forward", "backward"]


def test_a_refusal_is_asked_for_once_a_kind_of_call(monkeypatch):
    asked = []
    backend = dispatch.Backend(lambda *call, **traits: asked.append((call, traits)), {})
    monkeypatch.setitem(dispatch._registry["swiglu"], "cpu", backend)
    with lf.use_backend("cpu"):
        assert [chosen("swiglu", elements=elements) for elements in (1, 2**24)] == ["cpu", "cpu"]
        assert len(asked) == 1
        for kind in ({"wants_grad": True}, {"dtype": torch.float16}, {"head_dim": 64}, {"head_dim": 128}):
            chosen("swiglu", **kind)
        assert len(asked) == 5
        torch.use_deterministic_algorithms(True)
        try:
            chosen("swiglu")
        finally:
            torch.use_deterministic_algorithms(False)
        assert len(asked) == 6
        chosen("swiglu")
        assert len(asked) == 6


def test_what_is_remembered_ends_with_the_block(monkeypatch):
    assert chosen("swiglu") == "cpu"
    refuses = dispatch.Backend(lambda *call, **traits: "out of order", {})
    with monkeypatch.context() as patched:
        patched.setitem(dispatch._registry["swiglu"], "cpu", refuses)
        with lf.use_backend("cpu"), pytest.raises(lf.BackendError, match="cpu: out of order"):
            chosen("swiglu")
    with lf.use_backend("cpu"):
        assert chosen("swiglu") == "cpu"
    assert chosen("swiglu") == "cpu"


def test_a_backend_that_is_registered_later_is_seen(monkeypatch):
    monkeypatch.setattr(dispatch, "_registry", {name: dict(known) for name, known in dispatch._registry.items()})
    with lf.use_backend("varlen", "reference"):
        assert chosen("swiglu") == "reference"
        dispatch.register_backend("swiglu", "varlen", refuse=dispatch.serves_any)
        assert chosen("swiglu") == "varlen"


def test_symbolic_shapes_outside_of_the_compiler():
    q, bounds = torch.randn(6, 2, 8), torch.tensor([0, 6], dtype=torch.int32)
    traced = make_fx(lambda q, bounds: lf.ops.attention(q, q, q, bounds), tracing_mode="symbolic")(q, bounds)
    assert torch.equal(traced(q, bounds), lf.ops.attention(q, q, q, bounds))


def test_explain_names_every_op_its_backend_and_the_reasons(capsys):
    lf.explain("cpu")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "lemur_fast ops on cpu in torch.bfloat16 (order of backends: shipped with lemur_fast)"
    for op in lf.ops.__all__:
        if op != "LossStats":
            (line,) = [line for line in lines if line.split()[0] == op]
            assert "-> cpu" in line
            assert re.search(r"not written for this op: .*cuda|cuda: ", line)
    with lf.use_backend("triton"):
        lf.explain("cpu")
    assert "none: a call raises" in capsys.readouterr().out


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_environment_variable_gives_the_order():
    code = "import lemur_fast as lf; lf.explain('cpu')"
    result = run(code, LEMUR_FAST_BACKEND="reference,cpu")
    assert "order asked for: reference, cpu" in result.stdout
    result = run(code, LEMUR_FAST_BACKEND="cpu,gpu")
    assert result.returncode != 0
    assert "LEMUR_FAST_BACKEND: got 'gpu'; takes cuda, triton, varlen, flash_attn, cpu, reference" in result.stderr


@pytest.mark.parametrize(
    ("installed", "reason"),
    [
        ({"triton": "3.5.1"}, r"triton 3\.5\.1 is too old; needs triton >= 3\.6"),
        ({"triton-rocm": "3.4.0"}, r"triton 3\.4\.0 is too old; needs triton >= 3\.6"),
        ({}, r"triton is not installed; needs triton >= 3\.6"),
        ({"triton": "3.6.0"}, None),
        ({"pytorch-triton-rocm": "3.10.0"}, None),
    ],
)
def test_triton_says_what_version_it_needs(installed, reason, monkeypatch):
    def version(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(_triton, "version", version)
    why = _triton._why_missing()
    assert why is None if reason is None else re.fullmatch(reason, why)


@pytest.mark.skipif(_triton.INTERPRETING, reason="tests what is refused outside of the interpreter")
def test_triton_refuses_by_name(monkeypatch):
    assert "needs CUDA or ROCm tensors" in _triton.refuses(CPU, torch.bfloat16)
    assert "needs CUDA or ROCm tensors" in _triton.refuses(torch.device("mps"), torch.bfloat16)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_triton, "capability", lambda device: [(8, 0), (7, 5)][device.index])
    ampere, turing = torch.device("cuda:0"), torch.device("cuda:1")
    assert _triton.refuses(ampere, torch.bfloat16, head_dim=256) is None
    assert _triton.refuses(ampere, torch.float64) == "takes float32, bfloat16 and float16, not torch.float64"
    refusal = _triton.refuses(ampere, torch.bfloat16, weight_dtype=torch.float64)
    assert refusal == "takes float32, bfloat16 and float16, not torch.float64"
    assert _triton.refuses(turing, torch.bfloat16) == "needs compute capability 8.0 or newer"
    monkeypatch.setattr(_triton, "missing", "triton is not installed")
    assert _triton.refuses(ampere, torch.bfloat16) == "triton is not installed"
    x = torch.zeros(2, 3)
    with pytest.raises(lf.BackendError, match="triton: triton is not installed"), lf.use_backend("triton"):
        lf.ops.swiglu(x, x)
    assert "triton: triton is not installed" in dispatch.explanation("cpu")
