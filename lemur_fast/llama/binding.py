"""Replacing ``forward`` on one module, and telling who is watching it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.models.llama.modeling_llama import LlamaModel

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
else:  # nothing is an instance of these

    class FSDPModule:  # type: ignore[no-redef]
        """Stands for the class that torch was built without."""

    class DTensor:  # type: ignore[no-redef]
        """Stands for the class that torch was built without."""


CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""What transformers calls the KV cache, as an argument and in outputs: ``past_key_values`` before 5.24."""

# Hooks that do not look at what passes through, or not unless a call asks for it: they take any layout.
_BLIND_HOOKS = ("torch.distributed.", "transformers.utils.output_capturing")

_TORCH_COMPILE = str(Path(torch.__file__).parent / "_dynamo")


class Forward:
    """A replacement ``forward`` bound to one module: a bound method that deep-copies and pickles along with it.

    A plain bound method would pickle as ``getattr(module, "forward")`` and come back as the class's own.

    Attributes:
        module: the module it serves.
        function: called with the module and the arguments; a module-level function or a partial of one.
    """

    __slots__ = ("function", "module")

    def __init__(self, module: nn.Module, function: Callable) -> None:
        self.module = module
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward. Our functions call the cache by its first name, which callers may use, too."""
        if CACHE != "past_key_values" and CACHE in kwargs:
            cache = kwargs.pop(CACHE)
            if kwargs.get("past_key_values") is None:
                kwargs["past_key_values"] = cache
            elif cache is not None:
                raise ValueError(
                    f"past_key_values: got it beside {CACHE}, its newer name (PEFT's prefix tuning and transformers' "
                    "generate may use one each)"
                )
        return self.function(self.module, *args, **kwargs)

    def __reduce__(self) -> tuple:
        return Forward, (self.module, self.function)

    # accelerate's mixed precision wraps, and unwraps, whatever has the two attributes of a bound method.
    @property
    def __func__(self) -> Callable:
        return self.function

    @property
    def __self__(self) -> nn.Module:
        return self.module

    @property
    def __signature__(self) -> inspect.Signature:
        """The function's parameters without the module and what a partial has bound: Trainer picks columns by it."""
        bound = getattr(self.function, "keywords", {})
        _, *parameters = inspect.signature(getattr(self.function, "func", self.function)).parameters.values()
        kept = [parameter for parameter in parameters if parameter.name not in bound]
        return inspect.Signature([p.replace(name=CACHE) if p.name == "past_key_values" else p for p in kept])


def own_forward(module: nn.Module) -> Any:
    """The ``forward`` that was put on this very module, or None when its class's serves it."""
    return module.__dict__.get("forward")


def is_replaced_by(module: nn.Module, function: Callable) -> bool:
    """Whether `module` runs `function`, or a partial of it, as its forward."""
    forward = own_forward(module)
    return isinstance(forward, Forward) and getattr(forward.function, "func", forward.function) is function


def is_watched(module: nn.Module) -> bool:
    """Whether a hook, or a forward around ours, sees what enters or leaves `module`, forward or backward."""
    hook_dicts = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return _is_wrapped(module) or any(not _is_blind(hook) for hooks in hook_dicts for hook in hooks.values())


def every_module_is_watched() -> bool:
    """Whether a global hook sees every module."""
    return torch_module._has_any_global_hook()


def _is_blind(hook: Callable) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(_BLIND_HOOKS)


def _is_wrapped(module: nn.Module) -> bool:
    """Whether someone else's ``forward`` was put on `module`, such as one that calls ours."""
    forward = own_forward(module)
    if forward is None or isinstance(forward, Forward):
        return False
    # What torch.compile puts there changes nothing for who looks from outside. Its attributes do not tell it: wrappers
    # around it copy them.
    code = getattr(forward, "__code__", None)
    return code is None or not code.co_filename.startswith(_TORCH_COMPILE)


def describe(thing: Any) -> str:
    """The full name of a class or function."""
    if thing is None:
        return "nothing (it was deleted)"
    named = thing if hasattr(thing, "__qualname__") else type(thing)  # a partial has the module of what it wraps
    return f"{named.__module__}.{named.__qualname__}"
