"""The six ops. Each file reads in the same order: reference, backends, registration, autograd, public function."""

from lemur_fast.ops._loss import LossStats
from lemur_fast.ops.attention import attention
from lemur_fast.ops.cross_entropy import cross_entropy
from lemur_fast.ops.linear_cross_entropy import linear_cross_entropy
from lemur_fast.ops.rms_norm import rms_norm
from lemur_fast.ops.rotary import rotary
from lemur_fast.ops.swiglu import swiglu

__all__ = ["LossStats", "attention", "cross_entropy", "linear_cross_entropy", "rms_norm", "rotary", "swiglu"]
