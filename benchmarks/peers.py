"""Whom the ops are measured against, each used as its own documentation says, and why some cannot take part.

    python -m benchmarks.peers                      # what can run here, and why the others cannot
    python -m benchmarks.peers --device cuda

==================== ==================================================================================================
eager                the formula as stock Hugging Face LLaMA runs it, in plain torch
compile              ``torch.compile`` of that, for the very shapes
torch                torch's own function for the op: ``rms_norm``, ``linear_cross_entropy`` in chunks; for attention
                     ``scaled_dot_product_attention``, a document at a time, or with a mask of the whole row
varlen               ``torch.nn.attention.varlen``
flex                 ``torch.nn.attention.flex_attention``, compiled, with a block mask
Liger                Liger-Kernel's functions
FlashAttention       the flash-attn package (2), and flash-attn-3's interface (3)
xformers             ``memory_efficient_attention`` with a block-diagonal bias
CCE                  Apple's cut-cross-entropy; on a CPU what it has for machines without a GPU
==================== ==================================================================================================

Hugging Face as a whole is measured by `benchmarks.train_step`, TRL by `benchmarks.packing` and `benchmarks.chat`. What
a peer prepares once a batch for all layers (a mask, the longest length) is not timed; what it does in every layer is.
Some peers overwrite their inputs or the incoming gradient, so each gets tensors of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import lemur_fast as lf
from benchmarks.harness import command_line, machine

EPS = 1e-5

# ---- what stock Hugging Face runs ------------------------------------------------------------------------------------


def stock_rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
    """LlamaRMSNorm's forward, after the residual addition where there is one."""
    h = x if residual is None else x + residual
    y = LlamaRMSNorm.forward(SimpleNamespace(weight=weight, variance_epsilon=EPS), h)
    return y if residual is None else (y, h)


def stock_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """apply_rotary_pos_emb on the layout that the model gives it, [1, heads, T, D]."""
    return apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])


def stock_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """LlamaMLP's activation."""
    return functional.silu(gate) * up


def stock_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of Hugging Face's models: float32 logits."""
    return functional.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels)


def stock_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The output layer and that loss."""
    return stock_cross_entropy(functional.linear(hidden, weight), labels)


# ---- the peers -------------------------------------------------------------------------------------------------------


class Unavailable(Exception):
    """Why a peer cannot take part."""


def needs(package: str, device: torch.device | None = None) -> Any:
    """The package, imported, where it is installed; on a GPU, where a device is named."""
    if device is not None and device.type != "cuda":
        raise Unavailable(f"{package} needs a GPU")
    try:
        return importlib.import_module(package)
    except ImportError as error:
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            raise Unavailable(f"{package.partition('.')[0]} is not installed") from None
        raise Unavailable(f"{package} does not load: {error}") from None


def _compiled(stock: Callable) -> Callable[[torch.device], Callable]:
    return lambda device: torch.compile(stock, dynamic=False)


def _torch_rms_norm(device: torch.device) -> Callable:
    def rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        h = x if residual is None else x + residual
        y = functional.rms_norm(h, weight.shape, weight, EPS)
        return y if residual is None else (y, h)

    return rms_norm


def _torch_linear_cross_entropy(device: torch.device) -> Callable:
    if not hasattr(functional, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, labels: functional.linear_cross_entropy(hidden, weight, labels, options=options)


def _liger(name: str) -> Callable[[torch.device], Callable]:
    def load(device: torch.device) -> Callable:
        liger = needs("liger_kernel.transformers.functional", device)
        function = getattr(liger, name)
        if name == "liger_rms_norm":
            return lambda x, weight: function(x, weight, EPS)
        if name == "liger_fused_add_rms_norm":
            return lambda x, weight, residual: function(x, residual, weight, EPS)
        if name == "liger_rope":
            # As its own apply_rotary_pos_emb stands in for Hugging Face's: [1, heads, T, D], and tables [1, T, D].
            return lambda q, k, cos, sin: function(
                q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None]
            )
        return function

    return load


def _cce(device: torch.device) -> Callable:
    linear_cross_entropy = needs("cut_cross_entropy").linear_cross_entropy
    # Its own kernels are for GPUs; for other machines its documentation names torch_compile.
    impl = "cce" if device.type == "cuda" else "torch_compile"
    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, impl=impl)


OPS: dict[str, dict[str, Callable[[torch.device], Callable]]] = {
    "rms_norm": {
        "lemur_fast": lambda device: lambda x, weight: lf.ops.rms_norm(x, weight),
        "eager": lambda device: stock_rms_norm,
        "compile": _compiled(stock_rms_norm),
        "torch": _torch_rms_norm,
        "Liger": _liger("liger_rms_norm"),
    },
    "rms_norm + residual": {
        "lemur_fast": lambda device: lambda x, weight, residual: lf.ops.rms_norm(x, weight, residual=residual),
        "eager": lambda device: stock_rms_norm,
        "compile": _compiled(stock_rms_norm),
        "torch": _torch_rms_norm,
        "Liger": _liger("liger_fused_add_rms_norm"),
    },
    "rotary": {
        "lemur_fast": lambda device: lf.ops.rotary,
        "eager": lambda device: stock_rotary,
        "compile": _compiled(stock_rotary),
        "Liger": _liger("liger_rope"),
    },
    "swiglu": {
        "lemur_fast": lambda device: lf.ops.swiglu,
        "eager": lambda device: stock_swiglu,
        "compile": _compiled(stock_swiglu),
        "Liger": _liger("liger_swiglu"),
    },
    "cross_entropy": {
        "lemur_fast": lambda device: lf.ops.cross_entropy,
        "eager": lambda device: stock_cross_entropy,
        "compile": _compiled(stock_cross_entropy),
        "Liger": _liger("liger_cross_entropy"),
    },
    "linear_cross_entropy": {
        "lemur_fast": lambda device: lf.ops.linear_cross_entropy,
        "eager": lambda device: stock_linear_cross_entropy,
        "compile": _compiled(stock_linear_cross_entropy),
        "torch": _torch_linear_cross_entropy,
        "Liger": _liger("liger_fused_linear_cross_entropy"),
        "CCE": _cce,
    },
}
"""op -> rival -> of a device, the function, which takes the inputs of `benchmarks.ops`."""


# ---- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Documents:
    """The documents of a packed row, as a peer may ask for them.

    Attributes:
        lengths: tokens of each.
        cu_seqlens: [num_docs + 1] int32, on the device.
    """

    lengths: list[int]
    cu_seqlens: Tensor

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> Documents:
        """Of these lengths."""
        return cls(lengths, torch.tensor([0, *lengths]).cumsum(0).int().to(device))

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees: causal, and inside its document."""
        return sum(n * (n + 1) // 2 for n in self.lengths)


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _ours(documents: Documents) -> Attention:
    return lambda q, k, v: lf.ops.attention(q, k, v, documents.cu_seqlens)


def a_document_at_a_time(documents: Documents) -> Attention:
    """Runs torch's causal attention over each document, and puts the results together."""
    bounds = list(pairwise([0, *torch.tensor(documents.lengths).cumsum(0).tolist()]))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for first, last in bounds:
            heads_first = [x[None, first:last].transpose(1, 2) for x in (q, k, v)]
            out = functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    return attention


def _document_of(documents: Documents) -> Tensor:
    """[T] the document of each token."""
    device = documents.cu_seqlens.device
    return torch.repeat_interleave(torch.arange(len(documents.lengths)), torch.tensor(documents.lengths)).to(device)


def whole_row_masked(documents: Documents) -> Attention:
    """Runs torch's attention over the whole row with a block-diagonal mask."""
    document = _document_of(documents)
    place = torch.arange(len(document), device=document.device)
    mask = (document[:, None] == document[None]) & (place[:, None] >= place[None])

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = [x[None].transpose(1, 2) for x in (q, k, v)]
        out = functional.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return attention


def _varlen(documents: Documents) -> Attention:
    if documents.cu_seqlens.device.type != "cuda":
        raise Unavailable("torch.nn.attention.varlen needs a GPU")
    varlen_attn = needs("torch.nn.attention.varlen").varlen_attn
    known = inspect.signature(varlen_attn).parameters
    # Before 2.11 there was is_causal; since then a window of (-1, 0) says it. Grouped heads had not to be named.
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    options |= {"enable_gqa": True} if "enable_gqa" in known else {}
    cu, longest = documents.cu_seqlens, documents.longest
    return lambda q, k, v: varlen_attn(q, k, v, cu, cu, longest, longest, **options)


_flex: list[Callable] = []  # compiled once, as its documentation says


def _flex_attention(documents: Documents) -> Attention:
    flex = needs("torch.nn.attention.flex_attention")
    document = _document_of(documents)
    tokens, device = len(document), document.device

    def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[query] == document[key])

    block_mask = flex.create_block_mask(mask, None, None, tokens, tokens, device=device.type)
    if not _flex:
        _flex.append(torch.compile(flex.flex_attention))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = [x[None].transpose(1, 2) for x in (q, k, v)]
        return _flex[0](*heads_first, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)

    return attention


def _flash_attention(module: str) -> Callable[[Documents], Attention]:
    def load(documents: Documents) -> Attention:
        function = needs(module, documents.cu_seqlens.device).flash_attn_varlen_func
        cu, longest = documents.cu_seqlens, documents.longest

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = function(q, k, v, cu, cu, longest, longest, causal=True)
            return out[0] if isinstance(out, tuple) else out  # earlier versions of 3 return the lse, too

        return attention

    return load


def _xformers(documents: Documents) -> Attention:
    xops = needs("xformers.ops", documents.cu_seqlens.device)
    bias = xops.fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(documents.lengths)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[1] == k.shape[1]:
            return xops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]
        # Its documentation has no backward for grouped heads: they are repeated.
        wide = [x.repeat_interleave(q.shape[1] // k.shape[1], 1)[None] for x in (k, v)]
        return xops.memory_efficient_attention(q[None], *wide, attn_bias=bias)[0]

    return attention


ATTENTION: dict[str, Callable[[Documents], Attention]] = {
    "lemur_fast": _ours,
    "a document at a time": a_document_at_a_time,
    "whole row, masked": whole_row_masked,
    "varlen": _varlen,
    "flex": _flex_attention,
    "FlashAttention 2": _flash_attention("flash_attn"),
    "FlashAttention 3": _flash_attention("flash_attn_interface"),
    "xformers": _xformers,
}
"""rival -> of the documents, what runs a layer of attention over them."""


def forward_only(rival: str, device: torch.device) -> str:
    """Why a rival of attention has no gradients on a device; nothing where it has."""
    return "flex attention has no backward on a CPU" if rival == "flex" and device.type == "cpu" else ""


# ---- who can run -----------------------------------------------------------------------------------------------------


def functions(op: str, device: torch.device) -> tuple[dict[str, Callable], dict[str, str]]:
    """(rival -> function, rival -> why it cannot take part) of an op of `OPS` on a device."""
    return _loaded(OPS[op], device)


def attentions(documents: Documents) -> tuple[dict[str, Callable], dict[str, str]]:
    """(rival -> attention over these documents, rival -> why it cannot take part)."""
    return _loaded(ATTENTION, documents)


def _loaded(rivals: dict[str, Callable], argument: Any) -> tuple[dict[str, Callable], dict[str, str]]:
    found, missing = {}, {}
    for name, load in rivals.items():
        try:
            found[name] = load(argument)
        except Unavailable as reason:
            missing[name] = str(reason)
    return found, missing


def failure(error: BaseException) -> str:
    """An error of a peer, in a line."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


@dataclass
class Arguments:
    """Prints who can take part here, and why others cannot."""

    device: str = "cpu"
    """Where the ops would run: cpu or cuda."""


def main(arguments: Arguments) -> None:
    """Prints a line for each op and rival."""
    device = torch.device(arguments.device)
    print(machine(device))
    everything = {op: functions(op, device) for op in OPS} | {"attention": attentions(Documents.of([3, 5], device))}
    for op, (found, missing) in everything.items():
        for name in found:
            why = forward_only(name, device) if op == "attention" else ""
            print(f"{op:<22} {name:<22} {f'forward alone: {why}' if why else 'yes'}")
        for name, why in missing.items():
            print(f"{op:<22} {name:<22} no: {why}")


if __name__ == "__main__":
    main(command_line(Arguments, __doc__))
