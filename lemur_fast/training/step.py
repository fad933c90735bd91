"""One step's forward and backward passes, and the held-out loss: the code that says what a loss is an average of."""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lemur_fast.data.loader import HeldOut
from lemur_fast.packing import IGNORE_INDEX, PackedBatch

if TYPE_CHECKING:
    from lemur_fast.training.distributed import World


class SourceLosses:
    """Sums of the losses of each source's tokens, on the device: what the mean loss hides."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.totals = torch.zeros(2, count, device=device)
        """Sum of losses and number of trained tokens, by source."""

    def add(self, tags: Tensor, labels: Tensor, stats: Any) -> None:
        """Take in a micro-batch: source [T] int64 and label [T] of every token, and the `LossStats` of the loss."""
        trained = labels != IGNORE_INDEX
        self.totals.index_add_(1, tags, torch.stack([-stats.log_prob, trained.float()]))


def accumulate(
    model: nn.Module,
    batches: Sequence[PackedBatch],
    *,
    num_items: int | None = None,
    sources: SourceLosses | None = None,
    tags: Sequence[Tensor] = (),
    sync_every: bool = False,
) -> Tensor:
    """Forward and backward over micro-batches: gradients of the mean loss over all their trained tokens.

    Every micro-batch's loss is its sum divided by the count of trained tokens in all of them, so how the tokens are
    spread over micro-batches and processes does not matter (a mean of means would weigh the tokens of a short one
    more).

    Args:
        model: takes `PackedBatch.model_inputs()` and returns an output with `loss`; an accelerated one for `sources`.
        batches: at least one; on the model's device. As many in every process.
        num_items: trained tokens of the step in all processes; default: in these batches.
        sources: takes the losses apart by source.
        tags: for each batch the source of every token, [T] int64; for `sources`.
        sync_every: reduce gradients over the processes after every micro-batch, so that none holds whole ones: slower,
            for models whose gathered weights and gradients do not fit a process. Default: after the last one.

    Returns:
        This process's part of the mean loss, a detached fp32 scalar on the device: the parts of all processes add up to
        it. No host sync.
    """
    items = torch.stack([batch.num_items for batch in batches]).sum() if num_items is None else num_items
    total = torch.zeros((), device=batches[0].input_ids.device)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last or sync_every)
            model.set_is_last_backward(last)
            model.set_reshard_after_backward(last or sync_every)  # else the gathered weights stay as they are
        inputs: dict[str, Any] = {**batch.model_inputs(), "num_items_in_batch": items}
        if sources is not None:
            inputs["record_stats"] = functools.partial(sources.add, tags[index], batch.labels)
        loss = model(**inputs).loss
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[PackedBatch], num_items: int | None = None) -> Tensor:
    """Mean loss over all trained tokens of some batches, without gradients; an fp32 scalar, no host sync.

    The model stays in train mode: there it returns no logits, half a gigabyte for a row of 4,096 tokens. It therefore
    must not use dropout; LLaMA does not. With `num_items`, the sum is divided by that.
    """
    items = torch.stack([batch.num_items for batch in batches]).sum() if num_items is None else num_items
    losses = [model(**{**batch.model_inputs(), "num_items_in_batch": items}).loss for batch in batches]
    for module in model.modules():
        if isinstance(module, FSDPModule):  # no backward pass came to drop the weights gathered for the forward pass
            module.reshard()
    return torch.stack(losses).sum()


def held_out_losses(model: nn.Module, parts: Sequence[HeldOut], world: "World | None" = None) -> dict[str, float]:
    """`held_out/KIND/loss`, in nats per token, and `held_out/KIND/bits_per_byte` of every part.

    Bits per byte is what the model needs to encode the held-out text, document ends included, per byte of UTF-8; unlike
    the loss it compares models with different tokenizers. The processes of `world` share the batches.
    """
    device = next(model.parameters()).device
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    values = {}
    for part in parts:
        mine = part.batches[rank::size]
        if len(mine) < -(-len(part.batches) // size):  # every process takes part in every gathering of weights
            mine = [*mine, PackedBatch.from_documents([], pad_to=part.batches[0].num_tokens)]
        total = mean_loss(model, [batch.to(device) for batch in mine], part.tokens)
        loss = (total if world is None else world.add_(total)).item()
        values[f"held_out/{part.kind}/loss"] = loss
        values[f"held_out/{part.kind}/bits_per_byte"] = loss * part.tokens / math.log(2) / part.bytes
    return values
