"""`accelerate`: what it takes, what it refuses, how it is undone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType

from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
)

from lemur_fast import _malloc
from lemur_fast.llama import forwards
from lemur_fast.llama.binding import DTensor, Forward, FSDPModule, describe, is_replaced_by, own_forward
from lemur_fast.ops import _products

OPS = ("rms_norm", "rotary", "swiglu", "attention", "cross_entropy", "linear_cross_entropy")
_MAX_HEAD_DIM = 256


class Accelerated:
    """An accelerated model: what was done to it, and the way back. Also found as ``model.lemur_fast``.

    As a context manager it restores the model at the end of the block.

    Attributes:
        model: the LlamaForCausalLM.
        ops: names of the ops in use.
        return_logits: whether a training call with labels returns logits too.
    """

    def __init__(self, model: LlamaForCausalLM, ops: tuple[str, ...], return_logits: bool) -> None:
        self.model = model
        self.ops = ops
        self.return_logits = return_logits
        self._replaced: list[tuple[str, nn.Module]] = []

    def __str__(self) -> str:
        kinds = [type(module) for _, module in self._replaced]

        def count(kind: type, singular: str) -> str:
            number = sum(issubclass(k, kind) for k in kinds)
            return f"{number} {singular}{'' if number == 1 else 's'}"

        used = frozenset(self.ops)
        parts = []
        if "rms_norm" in used:
            parts.append(f"{count(LlamaRMSNorm, 'norm')} (rms_norm, residual additions inside)")
        if used & {"attention", "rotary"}:
            how = ", ".join(op for op in ("rotary", "attention") if op in used)
            parts.append(f"{count(LlamaAttention, 'attention')} ({how})")
        if "swiglu" in used:
            parts.append(f"{count(LlamaMLP, 'MLP')} (swiglu)")
        linear = sum(is_replaced_by(module, forwards.linear_forward) for _, module in self._replaced)
        if linear:
            parts.append(f"{linear} linear layers (on this CPU, products of bfloat16 in float32)")
        if used & forwards.LOSSES:
            from_hidden = "linear_cross_entropy" in used and not self.return_logits
            parts.append(
                f"the loss ({'linear_cross_entropy' if from_hidden else 'cross_entropy, of logits that stay'})"
            )
        return f"Accelerated {_plain_name(self.model)}: {', '.join(parts)}; restore() undoes it"

    __repr__ = __str__

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Gives the model back its own forwards, exactly as they were.

        Raises:
            RuntimeError: it was restored before, or something (Accelerator.prepare, a trainer) wrapped one of the
                forwards after `accelerate`: undo that first. Nothing is changed then.
        """
        if self.model.__dict__.get("lemur_fast") is not self:
            raise RuntimeError("restore: this model was restored before")
        for name, module in self._replaced:
            forward = own_forward(module)
            if not (isinstance(forward, Forward) and forward.module is module):
                raise RuntimeError(
                    f"restore: the forward of {name or 'the model'} was replaced after accelerate, by "
                    f"{describe(forward)}; undo that first"
                )
        # PEFT deep-copies modules that it trains fully, with the forwards they have: those copies are restored too.
        for module in [*(module for _, module in self._replaced), *self.model.modules()]:
            if isinstance(own_forward(module), Forward):
                del module.forward
        del self.model.lemur_fast

    def _replace(self, name: str, module: nn.Module, function: Callable) -> None:
        module.forward = Forward(module, function)
        self._replaced.append((name, module))


def accelerate(model: nn.Module, ops: str | Iterable[str] = "all", return_logits: bool = False) -> Accelerated:
    """Puts lemur_fast's ops into a Hugging Face LLaMA, on this instance only.

    On a CPU that multiplies float32 faster than bfloat16 it changes the linear layers, too, whatever `ops` says: they
    take products of bfloat16 in float32 (`lemur_fast.ops._products`), unless `use_backend` leaves out "cpu".

    For a model that is on a CPU now, glibc's malloc is told to keep the memory of freed tensors for the next ones, for
    good: to have every page of them cleared anew takes a tenth of a small model's step. Settings for malloc in the
    environment (``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES``) are left as they are.

    Call it on the stock model, or after PEFT or `fully_shard`; but before anything that wraps `forward`
    (`Accelerator.prepare`, TRL's trainers, DistributedDataParallel, `torch.compile`).

    Args:
        model: a ``LlamaForCausalLM``, or a ``PeftModel`` around one.
        ops: "all", or names of the ops to use, of those in `lemur_fast.ops`.
        return_logits: let a training call with labels return logits too. They take the memory that
            `linear_cross_entropy` saves; calls in eval mode return them in any case.

    Returns:
        A handle that says what was done and undoes it.

    Raises:
        TypeError: the model is of another class, or holds a module that is not supported; the message names it.
        ValueError: `ops` or the model's configuration asks for something that is not supported; the message names it.
        RuntimeError: the model is accelerated already.

    Example:
        >>> model = LlamaForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")
        >>> print(lemur_fast.accelerate(model))
        >>> loss = model(**batch.model_inputs()).loss
    """
    names = _check_ops(ops)
    model = _unwrap(model)
    if "lemur_fast" in model.__dict__:
        raise RuntimeError("accelerate: this model is accelerated already; model.lemur_fast.restore() undoes it")
    _check_configuration(model, names)
    targets = list(_targets(model, names, forwards.Options(frozenset(names), return_logits)))
    for name, module, _ in targets:
        if own_forward(module) is not None:
            raise TypeError(
                f"{name or 'model'}.forward: was replaced by {describe(own_forward(module))}; takes a stock model. "
                "Call accelerate before whatever wraps forward (Accelerator.prepare, device_map, use_kernels)"
            )
    _check_modules(model)
    if all(parameter.device.type == "cpu" for parameter in model.parameters()):
        _malloc.keep_freed_memory()
    accelerated = Accelerated(model, names, return_logits)
    for name, module, function in targets:
        accelerated._replace(name, module, function)
    model.lemur_fast = accelerated  # type: ignore[assignment]
    return accelerated


def _targets(
    model: LlamaForCausalLM, ops: tuple[str, ...], options: forwards.Options
) -> Iterator[tuple[str, nn.Module, Callable]]:
    """Every module whose forward is replaced: (name, module, replacement)."""
    names = {module: name for name, module in model.named_modules()}

    def expect(module: nn.Module, base: type[nn.Module]) -> nn.Module:
        if not isinstance(module, base) or _overrides_forward(module, base):
            raise TypeError(f"{names[module]}: got a {_plain_name(module)}; takes a stock {base.__name__}")
        return module

    yield "", expect(model, LlamaForCausalLM), functools.partial(forwards.causal_lm_forward, options=options)
    yield "model", expect(model.model, LlamaModel), functools.partial(forwards.model_forward, options=options)
    for layer in model.model.layers:
        yield names[layer], expect(layer, LlamaDecoderLayer), forwards.layer_forward
        attention = expect(layer.self_attn, LlamaAttention)
        yield names[attention], attention, functools.partial(forwards.attention_forward, options=options)
        if "swiglu" in ops:
            mlp = expect(layer.mlp, LlamaMLP)
            if type(mlp.act_fn) not in forwards.SILU:
                raise ValueError(
                    f"{names[mlp]}.act_fn: got a {type(mlp.act_fn).__name__}; swiglu takes SiLU. Leave it out of ops"
                )
            yield names[mlp], mlp, forwards.mlp_forward
    for module, name in names.items():
        # By class, not by place: PEFT may keep a norm or the output layer twice, its own copy and the original.
        if "rms_norm" in ops and isinstance(module, LlamaRMSNorm) and not _overrides_forward(module, LlamaRMSNorm):
            yield name, module, forwards.norm_forward
        is_head = name.split(".")[0] == "lm_head"
        if is_head and "linear_cross_entropy" in ops and _is_plain_linear(module):
            yield name, module, forwards.head_forward
        elif (
            _products.float32_is_faster()
            and (is_head or name.startswith("model.layers."))
            and _is_plain_linear(module)
            and module.weight.device.type != "cuda"
            and own_forward(module) is None  # whoever wrapped it computes what they want: this changes no result
        ):
            yield name, module, forwards.linear_forward


# ---- what is refused -------------------------------------------------------------------------------------------------


def _check_ops(ops: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(ops, str):
        if ops != "all":
            raise ValueError(f'ops: got {ops!r}; takes "all" or a list of names of {", ".join(OPS)}')
        return OPS
    if not isinstance(ops, Iterable):
        raise TypeError(f'ops: got {type(ops).__name__}; takes "all" or names of {", ".join(OPS)}')
    asked = list(ops)
    unknown = [name for name in asked if name not in OPS]
    if unknown or not asked:
        got = ", ".join(map(repr, unknown)) or "no name"
        raise ValueError(f'ops: got {got}; takes "all" or names of {", ".join(OPS)}')
    return tuple(name for name in OPS if name in asked)


def _unwrap(model: nn.Module) -> LlamaForCausalLM:
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        model = model.get_base_model() if isinstance(model, peft.PeftModel) else model.base_model.model
    if not isinstance(model, LlamaForCausalLM):
        inner = next((name for name in ("_orig_mod", "module") if hasattr(model, name)), None)
        hint = f"; it wraps another model: call accelerate on that ({inner}) first" if inner else ""
        raise TypeError(f"model: got a {type(model).__name__}; takes a LlamaForCausalLM, or a PeftModel of one{hint}")
    return model


def _check_configuration(model: LlamaForCausalLM, ops: tuple[str, ...]) -> None:
    config = model.config
    if "swiglu" in ops and config.hidden_act not in ("silu", "swish"):
        raise ValueError(f'config.hidden_act: got {config.hidden_act!r}; swiglu takes "silu". Leave it out of ops')
    if "attention" in ops and (config.head_dim or 0) > _MAX_HEAD_DIM:
        raise ValueError(f"config.head_dim: got {config.head_dim}; attention takes at most {_MAX_HEAD_DIM}")
    if not getattr(config, "is_causal", True):
        raise ValueError("config.is_causal: got False; takes a causal model")
    if not forwards.LOSSES.isdisjoint(ops):
        forwards.check_loss_function(model)


def _check_modules(model: PreTrainedModel) -> None:
    if getattr(model, "hf_quantizer", None) is not None:
        raise TypeError(f"model: got a quantized model ({type(model.hf_quantizer).__name__}), which is not supported")
    sharded_by_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    for name, module in model.named_modules():
        if any(cls.__module__.split(".")[0] == "bitsandbytes" for cls in type(module).__mro__):
            raise TypeError(f"{name}: got a bitsandbytes {type(module).__name__} (QLoRA), which is not supported")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise TypeError(f"{name}: got a DeepSpeed ZeRO-3 parameter, which is not supported; FSDP2 is")
        if isinstance(parameter, DTensor) and not sharded_by_fsdp:
            raise TypeError(f"{name}: got a tensor parallel DTensor, which is not supported; FSDP2 is")


def _overrides_forward(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a subclass of `base` brings a forward of its own. FSDP2's subclasses do not change it."""
    for cls in type(module).__mro__:
        if cls is base:
            return False
        if "forward" in vars(cls) and not issubclass(cls, FSDPModule):
            return True
    return True


def _is_plain_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not _overrides_forward(module, nn.Linear)


def _plain_name(module: nn.Module) -> str:
    """The name of the module's class, before FSDP2 renamed it."""
    for cls in type(module).__mro__:
        if not issubclass(cls, FSDPModule):
            return cls.__name__
    return type(module).__name__
