"""Activation checkpointing: which results of the forward pass are kept for the backward pass, and which made again."""

import functools
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

import lemur_fast.ops  # noqa: F401 - defines the operators named below

Mode = Literal["none", "full", "selective"]

# What is dear to compute and cheap to keep. Every second matrix product is kept besides; the memory-bound rest (norms,
# rotary embeddings, SwiGLU) is computed again.
KEPT_OPS = frozenset({torch.ops.lemur_fast.attention.default})
MATRIX_PRODUCTS = frozenset(
    {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.lemur_fast.linear.default}
)


def _selective() -> Any:
    """Contexts of one layer's forward and of its recomputation, each with a count of its own."""
    products = {False: 0, True: 0}

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op in KEPT_OPS
        if op in MATRIX_PRODUCTS:
            products[ctx.is_recompute] += 1
            keep = products[ctx.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def checkpoint_activations(model: PreTrainedModel, mode: Mode) -> None:
    """Checkpoint the layers of an accelerated model, in place; before `shard`.

    Args:
        model: its layers keep nothing but their input ("full"), or that, attention and every second matrix product
            ("selective").
        mode: "none" leaves the model alone.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(_selective)
    # Called `gradient_checkpointing_enable` before transformers 5.24.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
