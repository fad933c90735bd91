"""Two flash attentions of others, as backends of `attention`: torch's (`varlen`) and the flash-attn package's.

Both know documents by cu_seqlens, as here, and differ in what they ask for and leave behind:

- The longest document's length, which only the device knows: the number of tokens, an upper bound, costs programs that
  end at once.
- Rows past cu_seqlens[-1] are left as they were allocated: they are overwritten afterwards, on the device.
- A row that sees nothing has lse +inf, which is -inf here.
- cu_seqlens is believed: it is brought within the tensors first.
- A gradient of lse is not taken.
- dq is summed by atomics unless asked otherwise.

Source: Dao, "FlashAttention-2", 2023, arXiv 2307.08691.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lemur_fast._devices import capability
from lemur_fast.ops._checks import unit_stride

if TYPE_CHECKING:
    from lemur_fast.ops.attention import AttentionOptions

# ---- what they cannot serve ------------------------------------------------------------------------------------------


def _refuses_either(
    device: torch.device, dtype: torch.dtype, wants_grad: bool, head_dim: int, return_lse: bool
) -> str | None:
    """Why neither can serve a call; None when one may."""
    if device.type != "cuda":
        return "needs CUDA tensors"
    if torch.version.hip:
        return "not tried on ROCm"
    major, minor = capability(device)
    if major < 8:
        return "needs compute capability 8.0 or newer"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    if head_dim % 8:
        return f"takes head dimensions that 8 divides, not {head_dim}"
    if wants_grad and head_dim > 192 and (major, minor) not in ((8, 0), (9, 0), (10, 0)):
        return f"has no backward for head dimension {head_dim} on compute capability {major}.{minor}"
    if wants_grad and return_lse:
        return "has no gradient of the log-sum-exp"
    return None


def _why_no_varlen() -> str | None:
    """Why this torch's varlen attention cannot serve at all; None when it can."""
    try:
        function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    wanted = {"return_aux", "scale", "window_size"} - set(inspect.signature(function).parameters)
    return f"varlen_attn of torch {torch.__version__} has no {', '.join(sorted(wanted))}" if wanted else None


_BACKWARD = (
    "grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,"
    " unused, scale, window_size_left, window_size_right"
)


def _why_no_varlen_backward() -> str | None:
    """Why there is none: varlen_attn differentiates itself alone, so its backward is reached below it."""
    try:
        schema = torch.ops.aten._flash_attention_backward.default._schema
    except AttributeError:
        return f"torch {torch.__version__} has no aten::_flash_attention_backward"
    found = ", ".join(argument.name for argument in schema.arguments)
    return None if found == _BACKWARD else f"aten::_flash_attention_backward of torch {torch.__version__} is another"


def _why_no_flash_attn() -> str | None:
    """Why there is no usable flash-attn; None when there is."""
    try:
        installed = version("flash-attn")
    except PackageNotFoundError:
        return "the flash-attn package is not installed"
    if (2, 8) <= tuple(int(part) for part in installed.split(".")[:2]) < (3, 0):
        return None
    return f"flash-attn {installed} is installed; takes 2.8 and newer, below 3"


# Looked up once, at import, so that torch.compile can go through the functions below.
_varlen_missing = _why_no_varlen()
_varlen_backward_missing = _why_no_varlen_backward()
_flash_attn_missing = _why_no_flash_attn()


def refuses_varlen(
    device: torch.device,
    dtype: torch.dtype,
    *,
    wants_grad: bool,
    head_dim: int,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> str | None:
    """Why torch's varlen attention cannot serve a call; None when it can."""
    if _varlen_missing is not None:
        return _varlen_missing
    reason = _refuses_either(device, dtype, wants_grad, head_dim, return_lse)
    if reason is not None:
        return reason
    if softcap:
        return "takes no softcap"
    if not causal:
        return "takes causal=True: torch may serve the other with cuDNN, which keeps another log-sum-exp"
    if wants_grad and _varlen_backward_missing is not None:
        return _varlen_backward_missing
    if wants_grad and not torch.are_deterministic_algorithms_enabled():
        return "its gradients differ from run to run unless torch.use_deterministic_algorithms(True)"
    return None


def refuses_flash_attn(
    device: torch.device,
    dtype: torch.dtype,
    *,
    wants_grad: bool,
    head_dim: int,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> str | None:
    """Why the flash-attn package cannot serve a call; None when it can."""
    if _flash_attn_missing is not None:
        return _flash_attn_missing
    return _refuses_either(device, dtype, wants_grad, head_dim, return_lse)


# ---- before and after ------------------------------------------------------------------------------------------------


def _inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(unit_stride(x) for x in tensors)


def _within(cu_seqlens: Tensor, tokens: int) -> Tensor:
    return cu_seqlens.clamp(0, tokens)


def _inside(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[tokens], True where a token belongs to a document."""
    return torch.arange(tokens, device=cu_seqlens.device) < cu_seqlens[-1]


def _without_tail(x: Tensor, inside: Tensor) -> Tensor:
    """`x` [tokens, heads, D] with zeros past the last document: not a product, for what stands there may be NaN."""
    return torch.where(inside[:, None, None], x, 0.0).contiguous()


def _nothing_to_see(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> bool:
    return q.numel() == 0 or k.numel() == 0 or cu_seqlens.numel() < 2


def _outputs(out: Tensor, lse: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """What a kernel left, with the tail and the rows that see nothing as `attention` promises them."""
    inside = _inside(cu_seqlens, out.shape[0])
    blind = ~inside[None, :] | (lse == torch.inf)
    return _without_tail(out, inside), lse.masked_fill(blind, -torch.inf)


def _blind_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_zeros(q.shape), q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)


def _window(options: AttentionOptions, keys: int) -> tuple[int, int]:
    """(left, right): how many keys before and after its own a query sees; -1 for all.

    With the length of all keys instead of -1 a causal call means the same, and torch cannot take it for one that cuDNN
    may serve: the backward is the flash kernel's, and must meet the flash kernel's log-sum-exp.
    """
    return (min(options.window - 1, keys) if options.window else keys, 0)


# ---- torch.nn.attention.varlen ---------------------------------------------------------------------------------------


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """(out, lse) by ``varlen_attn``."""
    if _nothing_to_see(q, k, cu_seqlens):
        return _blind_outputs(q)
    varlen = importlib.import_module("torch.nn.attention.varlen")
    cu_seqlens, cu_seqlens_k = _within(cu_seqlens, q.shape[0]), _within(cu_seqlens_k, k.shape[0])
    grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if _takes_enable_gqa() else {}
    out, lse = varlen.varlen_attn(
        *_inputs(q, k, v),
        cu_seqlens,
        cu_seqlens_k,
        q.shape[0],
        k.shape[0],
        return_aux=varlen.AuxRequest(lse=True),
        scale=options.scale,
        window_size=_window(options, k.shape[0]),
        **grouped,
    )
    return _outputs(out, lse, cu_seqlens)


@functools.cache
def _takes_enable_gqa() -> bool:
    """Whether varlen_attn has to be told of grouped heads; before it had to be, it took them."""
    varlen = importlib.import_module("torch.nn.attention.varlen")
    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def varlen_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by the backward that varlen_attn itself calls."""
    if _nothing_to_see(q, k, cu_seqlens):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    cu_seqlens, cu_seqlens_k = _within(cu_seqlens, q.shape[0]), _within(cu_seqlens_k, k.shape[0])
    dout, q, k, v, out = _inputs(dout, q, k, v, out)
    left, right = _window(options, k.shape[0])
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        _with_infinities(lse),
        cu_seqlens,
        cu_seqlens_k,
        q.shape[0],
        k.shape[0],
        0.0,
        False,
        torch.zeros(2, dtype=torch.uint64, device=q.device),  # the state of a dropout that there is not
        q.new_empty(0),
        scale=options.scale,
        window_size_left=left,
        window_size_right=right,
    )
    return _gradients(dq, dk, dv, cu_seqlens, cu_seqlens_k)


def _with_infinities(lse: Tensor) -> Tensor:
    """The lse with +inf for rows that see nothing, which makes every probability of theirs 0."""
    return lse.masked_fill(lse == -torch.inf, torch.inf).contiguous()


def _gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    of_keys = _inside(cu_seqlens_k, dk.shape[0])
    return (
        _without_tail(dq, _inside(cu_seqlens, dq.shape[0])),
        _without_tail(dk, of_keys),
        _without_tail(dv, of_keys),
    )


# ---- flash-attn ------------------------------------------------------------------------------------------------------


def _shared(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, options: AttentionOptions
) -> dict[str, Any]:
    """The arguments that forward and backward share."""
    left, right = _window(options, k.shape[0]) if options.causal else (-1, -1)
    return {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": q.shape[0],
        "max_seqlen_k": k.shape[0],
        "dropout_p": 0.0,
        "softmax_scale": options.scale,
        "causal": options.causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": options.softcap,
        "alibi_slopes": None,
    }


def flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """(out, lse) by flash-attn."""
    if _nothing_to_see(q, k, cu_seqlens):
        return _blind_outputs(q)
    flash_attn = importlib.import_module("flash_attn.flash_attn_interface")
    cu_seqlens, cu_seqlens_k = _within(cu_seqlens, q.shape[0]), _within(cu_seqlens_k, k.shape[0])
    out, lse, *_ = flash_attn._flash_attn_varlen_forward(
        *_inputs(q, k, v), **_shared(q, k, cu_seqlens, cu_seqlens_k, options), return_softmax=False
    )
    return _outputs(out, lse, cu_seqlens)


def flash_attn_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by flash-attn, the same bits at every run."""
    if _nothing_to_see(q, k, cu_seqlens):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    flash_attn = importlib.import_module("flash_attn.flash_attn_interface")
    cu_seqlens, cu_seqlens_k = _within(cu_seqlens, q.shape[0]), _within(cu_seqlens_k, k.shape[0])
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dout, q, k, v, out = _inputs(dout, q, k, v, out)
    flash_attn._flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        _with_infinities(lse),
        dq,
        dk,
        dv,
        **_shared(q, k, cu_seqlens, cu_seqlens_k, options),
        deterministic=True,
    )
    return _gradients(dq, dk, dv, cu_seqlens, cu_seqlens_k)
