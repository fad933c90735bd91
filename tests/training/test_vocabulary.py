"""Embeddings that fit a tokenizer, up and down."""

import pytest
import torch

from lemur_fast.training.vocabulary import resized


@pytest.mark.parametrize("rows", [28, 30, 32, 40])
def test_rows_fit_the_tokenizer(rows):
    """28 tokens and 4 new ones: from rows for the old ones alone, for some, for all, and for more than all."""
    weight = torch.randn(rows, 8)
    fitted = resized(weight, 32, [28, 29, 30, 31])
    assert torch.equal(fitted[:28], weight[:28])
    torch.testing.assert_close(fitted[28:], weight[:28].mean(0).expand(4, 8))


def test_new_tokens_may_lie_between_others():
    weight = torch.randn(6, 8)
    fitted = resized(weight, 6, [2])
    kept = [0, 1, 3, 4, 5]
    assert torch.equal(fitted[kept], weight[kept])
    torch.testing.assert_close(fitted[2], weight[kept].mean(0))


def test_without_new_tokens_superfluous_rows_go():
    weight = torch.randn(40, 8)
    assert torch.equal(resized(weight, 32, []), weight[:32])


def test_another_models_tokenizer_is_refused():
    with pytest.raises(ValueError, match="has 50 tokens without the new ones, the model only 40 embedding rows"):
        resized(torch.randn(40, 8), 52, [50, 51])
