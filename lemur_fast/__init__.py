"""lemur_fast: LLaMA training without the wasted memory traffic, padding and host time.

- `accelerate` puts the fused ops into a Hugging Face LLaMA, and takes them out again.
- `PackedBatch` and `pack` put whole documents into batches without padding.
- `ops` holds the six ops themselves.
- `use_backend` and `explain` say which implementation serves an op.
"""

from lemur_fast import _compiled, ops
from lemur_fast.dispatch import BackendError, explain, use_backend
from lemur_fast.llama import Accelerated, accelerate
from lemur_fast.packing import PackedBatch, PackReport, pack

__version__ = "0.1.0"
__all__ = [
    "Accelerated",
    "BackendError",
    "PackReport",
    "PackedBatch",
    "__version__",
    "accelerate",
    "explain",
    "ops",
    "pack",
    "use_backend",
]

_compiled.warn_if_missing()
