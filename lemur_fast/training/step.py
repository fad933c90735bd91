"""One step's forward and backward passes, and the held-out loss: the code that says what a loss is an average of."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lemur_fast.data.loader import HeldOut
from lemur_fast.packing import PackedBatch


def accumulate(model: nn.Module, batches: Sequence[PackedBatch]) -> Tensor:
    """Forward and backward over micro-batches: gradients of the mean loss over all their trained tokens.

    Every micro-batch's loss is its sum divided by the count of trained tokens in all of them, so how the tokens are
    spread over micro-batches does not matter (a mean of means would weigh the tokens of a short one more).

    Args:
        model: takes `PackedBatch.model_inputs()` and returns an output with `loss`.
        batches: at least one; on the model's device.

    Returns:
        The mean loss, a detached fp32 scalar on the device; no host sync.
    """
    num_items = torch.stack([batch.num_items for batch in batches]).sum()
    total = torch.zeros((), device=num_items.device)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        if isinstance(model, FSDPModule):  # gradients are reduced once, after the last micro-batch
            model.set_requires_gradient_sync(last)
            model.set_is_last_backward(last)
            model.set_reshard_after_backward(last)  # until then the gathered weights stay as they are
        loss = model(**{**batch.model_inputs(), "num_items_in_batch": num_items}).loss
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[PackedBatch]) -> Tensor:
    """Mean loss over all trained tokens of some batches, without gradients; an fp32 scalar, no host sync.

    The model stays in train mode: there it returns no logits, half a gigabyte for a row of 4,096 tokens. It therefore
    must not use dropout; LLaMA does not.
    """
    num_items = torch.stack([batch.num_items for batch in batches]).sum()
    losses = [model(**{**batch.model_inputs(), "num_items_in_batch": num_items}).loss for batch in batches]
    for module in model.modules():
        if isinstance(module, FSDPModule):  # no backward pass came to drop the weights gathered for the forward pass
            module.reshard()
    return torch.stack(losses).sum()


def held_out_losses(model: nn.Module, parts: Sequence[HeldOut]) -> dict[str, float]:
    """`held_out/KIND/loss`, in nats per token, and `held_out/KIND/bits_per_byte` of every part.

    Bits per byte is what the model needs to encode the held-out text, document ends included, per byte of UTF-8; unlike
    the loss it compares models with different tokenizers.
    """
    device = next(model.parameters()).device
    values = {}
    for part in parts:
        loss = mean_loss(model, [batch.to(device) for batch in part.batches]).item()
        values[f"held_out/{part.kind}/loss"] = loss
        values[f"held_out/{part.kind}/bits_per_byte"] = loss * part.tokens / math.log(2) / part.bytes
    return values
