"""AdamW whose weight decay falls on matrices alone, told by the type of the module that owns them."""

from typing import Any

import torch
from torch import nn

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
