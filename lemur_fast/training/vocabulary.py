"""Embeddings that fit a tokenizer to which tokens were added."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM


@torch.no_grad()
def resize_embeddings(model: LlamaForCausalLM, num_tokens: int, new_tokens: Sequence[int]) -> None:
    """Give a model one embedding row and one output row for every token of a tokenizer, no more and no less.

    Rows of new tokens become the mean of the rows of the others, whether such rows were there or not: a checkpoint may
    have more rows than its tokenizer has tokens (Lemur's has 32,024 for 32,000), and those were never trained.

    Args:
        model: changed in place, its configuration too; before it is accelerated or sharded.
        num_tokens: of the tokenizer.
        new_tokens: their ids.

    Raises:
        ValueError: a token that is not new has no row: the tokenizer is another model's.
    """
    rows = _weight(model.get_input_embeddings()).shape[0]
    fresh = set(new_tokens)
    old = [token for token in range(num_tokens) if token not in fresh]
    if old and old[-1] >= rows:
        raise ValueError(
            f"the tokenizer has {len(old)} tokens without the new ones, the model only {rows} embedding rows: this is "
            "not its tokenizer"
        )
    if rows != num_tokens:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    if fresh:
        embedding, head = _weight(model.get_input_embeddings()), _weight(model.lm_head)
        for weight in (embedding,) if head is embedding else (embedding, head):
            weight[sorted(fresh)] = weight[old].double().mean(0).to(weight.dtype)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight
