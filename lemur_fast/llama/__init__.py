"""`accelerate(model)`: lemur_fast's ops inside a Hugging Face LLaMA, and out of it again.

=============  ===========================================================================
binding.py     replacing ``forward`` on one module; who watches a module
documents.py   where the documents of a call lie: packed, padded, restarting positions
forwards.py    the replacement forwards, from the norm to the language model
patching.py    `accelerate`, what it refuses, and `Accelerated.restore`
interface.py   ``attn_implementation="lemur_fast"``, for those who want the attention alone
=============  ===========================================================================

No class and no module global of transformers is touched: only ``forward`` of the modules of one model, and the public
registry of attention implementations, where a name is added.
"""

from lemur_fast.llama import interface as interface
from lemur_fast.llama.patching import Accelerated, accelerate

__all__ = ["Accelerated", "accelerate"]
