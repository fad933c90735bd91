"""Embedding rows that fit a tokenizer to which tokens were added."""

from collections.abc import Sequence

import torch
from torch import Tensor


def resized(weight: Tensor, num_tokens: int, new_tokens: Sequence[int]) -> Tensor:
    """One row for every token of a tokenizer, no more and no less; those of new tokens are the mean of the others.

    New tokens get the mean whether rows were there for them or not: a checkpoint may have more rows than its tokenizer
    has tokens (Lemur's has 32,024 for 32,000), and those were never trained.

    Args:
        weight: [R, H], of the embedding or of the output layer.
        num_tokens: of the tokenizer.
        new_tokens: their ids.

    Returns:
        [num_tokens, H], new memory.

    Raises:
        ValueError: a token that is not new has no row: the tokenizer is another model's.
    """
    old = torch.ones(num_tokens, dtype=torch.bool)
    old[list(new_tokens)] = False
    rows, places = weight.shape[0], old.nonzero().flatten()
    if len(places) and places[-1] >= rows:
        raise ValueError(
            f"the tokenizer has {len(places)} tokens without the new ones, the model only {rows} embedding rows: this "
            "is not its tokenizer"
        )
    fitted = weight.new_empty(num_tokens, weight.shape[1])
    fitted[places] = weight[places]
    if len(new_tokens):
        fitted[list(new_tokens)] = weight[places].double().mean(0).to(weight.dtype)
    return fitted
