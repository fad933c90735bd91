"""AdamW whose weight decay falls on matrices alone, told by the type of the module that owns them; clipping."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

# The modules whose `weight` is a matrix. Norms, biases and whatever else a model brings are not decayed.
DECAYED_MODULES = (nn.Linear, nn.Embedding)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: weights of linear layers and embeddings decay, all other parameters do not.

    Names say nothing here: Lemur's own trainer looked for "layer_norm" in them and decayed every `input_layernorm`.
    Parameters that need no gradient are left out; shared ones (tied embeddings) come once.
    """
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, DECAYED_MODULES)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW over `decay_groups`."""
    return torch.optim.AdamW(decay_groups(model, weight_decay), lr=lr, betas=betas, fused=True)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], longest: float, mesh: DeviceMesh | None = None) -> Tensor:
    """Scale the gradients of all parameters together down to a norm of `longest`, in place; no host sync.

    What `torch.nn.utils.clip_grad_norm_` does, but rows are summed one by one, then in float64: torch's sum of a
    large matrix on a CPU is off by a thousandth, and by another amount when the matrix is split over processes.

    Args:
        parameters: plain, or sharded over the last dimension of `mesh`.
        longest: norm to keep to.
        mesh: of `shard`; None where nothing is sharded.

    Returns:
        The norm before, [] float32 on the device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    rows = [torch.linalg.vector_norm(gradient, dim=-1).double().square().sum() for gradient in local]
    square = torch.stack(rows).sum()
    if mesh is not None and mesh.size(mesh.ndim - 1) > 1:
        dist.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))
    norm = square.sqrt().float()
    torch._foreach_mul_(local, (longest / (norm + 1e-6)).clamp(max=1.0))
    return norm
