"""Steps that would do harm are not taken: a loss or gradient that is not finite, a gradient far above its usual norm.

The decision is made on the device, and the optimizer reads it there (`found_inf`, which AdamW's fused kernel takes for
mixed-precision training): the host learns of it a step later, when nothing has to wait for it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VERDICTS = ("taken", "not finite", "a spike")
"""What a step's verdict means, by its number."""
DECAY = 0.95
"""Of the running mean of the gradient norm."""
KNOWN_AFTER = 20
"""Steps until that mean says enough to judge by."""


@dataclass
class Guard:
    """Judges every step, and lets the optimizer take it or leave it."""

    optimizer: torch.optim.Optimizer
    """Fused, because only fused kernels look at `found_inf`."""
    spike: float
    """A gradient norm above this many times its running mean is a spike; 0 lets all pass that are finite."""
    state: Tensor
    """[3] float32 on the device: running mean of the norm, steps taken, steps refused in a row."""

    @classmethod
    def new(cls, optimizer: torch.optim.Optimizer, spike: float, device: torch.device) -> "Guard":
        """A guard that has seen nothing."""
        return cls(optimizer, spike, torch.zeros(3, device=device))

    def step(self, loss: Tensor, norm: Tensor) -> Tensor:
        """`optimizer.step()`, unless the step is bad; then parameters and optimizer stay as they are, bit for bit.

        Args:
            loss: [] of the whole step, the same in every process.
            norm: [] of the gradient over all parameters, before clipping, the same in every process.

        Returns:
            The verdict, an index into `VERDICTS`, and the steps refused in a row: [2] float32 on the device.
        """
        mean, taken, refused = self.state.unbind()
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        known = taken >= KNOWN_AFTER
        spiked = finite & known & (norm > self.spike * mean) if self.spike else torch.zeros_like(finite)
        bad = ~finite | spiked
        # The mean of the first steps is a plain one: a decaying mean would start from nothing.
        weight = torch.maximum(1 / (taken + 1), torch.full_like(taken, 1 - DECAY))
        updated = torch.stack([mean + weight * (norm - mean), taken + 1, torch.zeros_like(refused)])
        self.state = torch.where(bad, torch.stack([mean, taken, refused + 1]), updated)
        optimizer: Any = self.optimizer
        optimizer.found_inf, optimizer.grad_scale = bad.float(), None
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf, optimizer.grad_scale
        return torch.stack([torch.where(spiked, 2.0, (~finite).float()), self.state[2]])
