"""Attention by torch's varlen and by flash-attn: what they are handed, what is made of what they leave, refusals.

No GPU is at hand to run them: stand-ins compute the reference from the arguments handed over, and leave behind what the
real ones do: NaN past the last document, +inf as the lse of a row that sees nothing.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lemur_fast as lf
from lemur_fast import dispatch
from lemur_fast.ops import _flash
from lemur_fast.ops.attention import AttentionOptions, attention_backward_reference, attention_reference

TOKENS, KEYS = 13, 17
BOUNDS = torch.tensor([0, 3, 3, 9, 11], dtype=torch.int32)  # an empty document, and a tail
KEY_BOUNDS = torch.tensor([0, 2, 4, 12, 12], dtype=torch.int32)  # rows that see nothing, a document without keys

CALLS: list[str] = []


def options_of(causal: bool, window: tuple[int, int], softcap: float, scale: float) -> AttentionOptions:
    """What the arguments of a flash attention mean."""
    left, right = window
    if right == 0:
        causal = True
    assert (left >= 0) == (right == 0)
    return AttentionOptions(causal, left + 1 if left >= 0 else 0, softcap, scale)


def leave_forward(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, cu_k: Tensor, max_q: int, max_k: int, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    check_inputs(q, k, v, cu, cu_k, max_q, max_k)
    out, lse = attention_reference(q, k, v, cu, cu_k, options)
    out[int(cu[-1]) :] = torch.nan
    lse[lse == -torch.inf] = torch.inf
    lse[:, int(cu[-1]) :] = torch.nan
    return out, lse


def leave_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, options: AttentionOptions,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_inputs(q, k, v, cu, cu_k, max_q, max_k)
    assert not torch.isinf(lse).logical_and(lse < 0).any()
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    gradients = attention_backward_reference(dout, None, q, k, v, out, lse, cu, cu_k, options)
    for gradient, bounds in zip(gradients, (cu, cu_k, cu_k), strict=True):
        gradient[int(bounds[-1]) :] = torch.nan
    return gradients


def check_inputs(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert cu.dtype == cu_k.dtype == torch.int32
    assert cu.is_contiguous()
    assert cu_k.is_contiguous()
    assert max_q >= int(cu.diff().max())
    assert max_k >= int(cu_k.diff().max())
    assert int(cu.max()) <= q.shape[0]
    assert int(cu_k.max()) <= k.shape[0]


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    CALLS.append("forward")
    assert return_aux.lse
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size not in ((-1, -1), (-1, 0))  # those may go to cuDNN
    options = options_of(False, window_size, 0.0, scale)
    return leave_forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, options)


def flash_attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cum_seq_q: Tensor,
    cum_seq_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *,
    scale: float, window_size_left: int, window_size_right: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    CALLS.append("backward")
    assert dropout_p == 0.0
    options = options_of(is_causal, (window_size_left, window_size_right), 0.0, scale)
    return leave_backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, options
    )  # fmt: skip


def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
    CALLS.append("forward")
    assert dropout_p == 0.0
    assert alibi_slopes is None
    assert not return_softmax
    options = options_of(causal, (window_size_left, window_size_right), softcap, softmax_scale)
    assert options.causal == causal
    return *leave_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options), None, None


def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    alibi_slopes: Tensor | None, deterministic: bool, rng_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    CALLS.append("backward")
    assert deterministic
    assert dropout_p == 0.0
    assert all(x.is_contiguous() for x in (dq, dk, dv))
    options = options_of(causal, (window_size_left, window_size_right), softcap, softmax_scale)
    gradients = leave_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options
    )
    for target, gradient in zip((dq, dk, dv), gradients, strict=True):
        target.copy_(gradient)
    return torch.zeros(())


@pytest.fixture(params=["varlen", "flash_attn"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend with its stand-in, made to serve CPU tensors."""
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward  # type: ignore[attr-defined]
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash_attention_backward)
    served = dispatch.Backend(dispatch.serves_any, dispatch._registry["attention"][request.param].functions)
    monkeypatch.setitem(dispatch._registry["attention"], request.param, served)
    CALLS.clear()
    return request.param


def tensors(heads: int = 4, kv_heads: int = 2, keys: int = KEYS) -> list[Tensor]:
    shapes = ((TOKENS, heads, 8), (keys, kv_heads, 8), (keys, kv_heads, 8))
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def results(backend: str, inputs: list[Tensor], *bounds: Tensor, **options: Any) -> list[Tensor]:
    with lf.use_backend(backend):
        out = lf.ops.attention(*inputs, *bounds, **options)
    generator = torch.Generator().manual_seed(1)
    return [out, *torch.autograd.grad(out, inputs, torch.randn(out.shape, generator=generator))]


CASES = [{}, {"window": 3}, {"window": 1}, {"window": 2**40}, {"scale": 0.3}]
ONLY_FLASH_ATTN = [{"causal": False}, {"softcap": 2.0}, {"softcap": 2.0, "window": 4}]


@pytest.mark.parametrize("options", CASES + ONLY_FLASH_ATTN, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_results_and_gradients_are_the_references(name, options, kv_heads):
    if name == "varlen" and options in ONLY_FLASH_ATTN:
        pytest.skip("varlen refuses it")
    inputs = tensors(kv_heads=kv_heads)
    ours = results(name, inputs, BOUNDS, KEY_BOUNDS, **options)
    exact = results("reference", inputs, BOUNDS, KEY_BOUNDS, **options)
    assert CALLS == ["forward", "backward"]
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b)
    assert not ours[0][11:].any()
    assert not ours[1][11:].any()
    assert not ours[2][12:].any()
    assert not ours[3][12:].any()


def test_the_lse_is_minus_infinity_where_nothing_is_seen(name):
    q, k, v = (x.detach() for x in tensors())
    with lf.use_backend(name):
        _, lse = lf.ops.attention(q, k, v, BOUNDS, KEY_BOUNDS, return_lse=True)
    with lf.use_backend("reference"):
        _, exact = lf.ops.attention(q, k, v, BOUNDS, KEY_BOUNDS, return_lse=True)
    assert (exact == -torch.inf).any()
    torch.testing.assert_close(lse, exact)


def test_strided_inputs_and_nothing_at_all(name):
    q, k, v = (x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_() for x in tensors())
    assert q.stride(-1) != 1
    for a, b in zip(*(results(b, [q, k, v], BOUNDS, KEY_BOUNDS) for b in (name, "reference")), strict=True):
        torch.testing.assert_close(a, b)
    CALLS.clear()
    no_documents = torch.zeros(1, dtype=torch.int32)
    for inputs, bounds in (
        (tensors(keys=0), (BOUNDS, torch.zeros_like(BOUNDS))),
        ([torch.zeros(0, 2, 8, requires_grad=True) for _ in range(3)], (torch.zeros_like(BOUNDS),)),
        (tensors(keys=TOKENS), (no_documents,)),
    ):
        for a in results(name, inputs, *bounds):
            assert not a.any()
    assert CALLS == []


def test_boundaries_past_the_end_stay_within_the_tensors(name):
    """On a GPU nobody looks at them before a kernel does; the stand-in fails if they pass the end."""
    q, k, v = (x.detach() for x in tensors(keys=TOKENS))
    wild = torch.tensor([0, 5, 2**31 - 1], dtype=torch.int32)
    forward, backward = (dispatch.implementation("attention", name, role) for role in ("forward", "backward"))
    options = AttentionOptions(True, 0, 0.0, 1.0)
    out, lse = forward(q, k, v, wild, wild, options)
    backward(torch.ones_like(out), None, q, k, v, out, lse, wild, wild, options)
    assert CALLS == ["forward", "backward"]


@pytest.mark.skipif(_flash._varlen_missing is not None, reason=str(_flash._varlen_missing))
def test_torch_takes_the_arguments_of_varlen():
    """Through the real functions, on tensors that have a device and no memory."""
    with FakeTensorMode():
        q = torch.empty(64, 8, 128, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(96, 2, 128, device="cuda", dtype=torch.bfloat16)
        bounds = torch.empty(4, device="cuda", dtype=torch.int32)
        options = AttentionOptions(True, 16, 0.0, 0.1)
        out, lse = _flash.varlen_forward(q, k, k, bounds, bounds, options)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (8, 64), torch.float32)
        gradients = _flash.varlen_backward(out, None, q, k, k, out, lse, bounds, bounds, options)
        assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape]
        assert all(x.device.type == "cuda" and x.dtype == torch.bfloat16 for x in (out, *gradients))


@pytest.mark.skipif(torch.__version__ < (2, 14), reason="older varlen_attn may lack what is needed: 2.10's does")
def test_this_torch_has_what_varlen_needs():
    assert _flash._varlen_missing is None
    assert _flash._varlen_backward_missing is None


GPU = torch.device("cuda:0")
CALL = {"wants_grad": False, "head_dim": 128, "causal": True, "window": 0, "softcap": 0.0, "return_lse": False}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"wants_grad": True}, None),
        ({"return_lse": True, "window": 8}, None),
        ({"device": torch.device("cpu")}, "needs CUDA tensors"),
        ({"hip": "7.0"}, "not tried on ROCm"),
        ({"capability": (7, 5)}, "needs compute capability 8.0 or newer"),
        ({"dtype": torch.float32}, "takes bfloat16 and float16, not torch.float32"),
        ({"head_dim": 100}, "takes head dimensions that 8 divides, not 100"),
        ({"head_dim": 256, "wants_grad": True}, None),
        (
            {"head_dim": 256, "wants_grad": True, "capability": (8, 9)},
            "has no backward for head dimension 256 on compute capability 8.9",
        ),
        ({"head_dim": 256, "capability": (8, 9)}, None),
        ({"return_lse": True, "wants_grad": True}, "has no gradient of the log-sum-exp"),
    ],
    ids=str,
)
def test_both_refuse_by_name(change, reason, monkeypatch):
    change = dict(change)
    capability = change.pop("capability", (8, 0))
    monkeypatch.setattr(_flash, "capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", change.pop("hip", None))
    monkeypatch.setattr(_flash, "_flash_attn_missing", None)
    monkeypatch.setattr(_flash, "_varlen_missing", None)
    device, dtype = change.pop("device", GPU), change.pop("dtype", torch.bfloat16)
    for refuses in (_flash.refuses_varlen, _flash.refuses_flash_attn):
        assert refuses(device, dtype, **CALL | change) == reason


def test_varlen_alone_refuses(monkeypatch):
    monkeypatch.setattr(_flash, "capability", lambda device: (9, 0))
    monkeypatch.setattr(_flash, "_varlen_missing", None)
    monkeypatch.setattr(_flash, "_varlen_backward_missing", None)

    def refusal(**change: Any) -> str | None:
        return _flash.refuses_varlen(GPU, torch.bfloat16, **CALL | change)

    assert refusal(softcap=30.0) == "takes no softcap"
    assert "takes causal=True" in refusal(causal=False)
    torch.use_deterministic_algorithms(False)
    assert "differ from run to run" in refusal(wants_grad=True)
    assert refusal() is None
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(_flash, "_varlen_backward_missing", "is another")
    assert refusal(wants_grad=True) == "is another"
    monkeypatch.setattr(_flash, "_varlen_missing", "is not there")
    assert refusal() == "is not there"


def test_an_older_varlen_is_refused_by_what_it_lacks(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, key, is_causal, return_aux: None)
    assert _flash._why_no_varlen() == f"varlen_attn of torch {torch.__version__} has no scale, window_size"
    monkeypatch.delattr("torch.nn.attention.varlen.varlen_attn")
    assert "has no torch.nn.attention.varlen" in _flash._why_no_varlen()
    monkeypatch.setattr(_flash, "_BACKWARD", "grad_out, query")
    assert "is another" in _flash._why_no_varlen_backward()


@pytest.mark.parametrize(
    ("version", "reason"), [("2.8.3.post1", None), ("2.7.4", "flash-attn 2.7.4 is installed"), ("3.0.0", "takes 2.8")]
)
def test_flash_attn_says_what_version_it_needs(version, reason, monkeypatch):
    assert _flash._flash_attn_missing == "the flash-attn package is not installed"
    monkeypatch.setattr(_flash, "version", lambda package: version)
    why = _flash._why_no_flash_attn()
    assert why is None if reason is None else reason in why
