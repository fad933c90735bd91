"""The benchmark of attention: its exact result, its rivals, and that a wrong one prints no time."""

from __future__ import annotations

import pytest
import torch

import lemur_fast as lf
from benchmarks import attention, peers
from tests.dense import bounds, dense

CPU = torch.device("cpu")


def inputs(tokens, heads=4, kv_heads=2, dtype=torch.float64):
    shapes = [(tokens, h, 8) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def test_exact_is_the_dense_softmax():
    q, k, v = inputs(12)
    lengths = [5, 1, 6]
    out, _ = dense(q, k, v, bounds(*lengths), bounds(*lengths))
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    for a, b in zip(attention.exact(q, k, v, lengths), (out, *gradients), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pattern", attention.PATTERNS)
def test_patterns_fill_the_row(pattern):
    generator = torch.Generator().manual_seed(0)
    lengths = pattern(1024, generator)
    assert sum(lengths) == 1024
    assert min(lengths) > 0


def test_every_rival_that_runs_here_passes_the_check():
    given = inputs(96, dtype=torch.float32)
    lengths = [40, 1, 55]
    found, missing = peers.attentions(peers.Documents.of(lengths, CPU))
    assert set(found) | set(missing) == set(peers.ATTENTION)
    assert set(missing) == {"varlen", "FlashAttention 2", "FlashAttention 3", "xformers"}
    right = attention.exact(*given, lengths)
    for name in ("lemur_fast", "a document at a time", "whole row, masked"):
        assert attention.check(found[name], given, right, "float32") == "", name


def test_pairs_are_what_the_mask_leaves():
    documents = peers.Documents.of([3, 1, 4], CPU)
    out = torch.ones(8, 8).tril()
    seen = sum(int(out[:n, :n].sum()) for n in documents.lengths)
    assert documents.pairs == seen
    assert documents.longest == 4


def test_a_wrong_rival_prints_no_time(monkeypatch):
    across = lambda documents: lambda q, k, v: lf.ops.attention(q, k, v, bounds(len(q)))  # noqa: E731
    forgets = lambda documents: lambda q, k, v: lf.ops.attention(q, k.detach(), v, documents.cu_seqlens) + 0 * k.sum()  # noqa: E731
    rivals = {
        "lemur_fast": across,
        "forgetful": forgets,
        "a document at a time": peers.a_document_at_a_time,
    }
    monkeypatch.setattr(peers, "ATTENTION", rivals)
    arguments = attention.Arguments(tokens=128, heads=2, kv_heads=1, head_dim=16, dtype="float32", steps=3)
    rows = attention.measure(attention.many_tiny, True, arguments, 1e9, 1e9)
    by_name = {(row.rival, row.direction): row for row in rows}
    assert by_name["lemur_fast", "both"].error.startswith("wrong: relative error of out")
    assert by_name["lemur_fast", "both"].median is None
    assert by_name["forgetful", "both"].error.startswith("wrong: relative error of dk")
    right = by_name["a document at a time", "both"]
    assert len(right.seconds) == 3
    assert right.flops == 3.5 * by_name["a document at a time", "forward"].flops
    assert right.share_of_peak == right.flops / right.median / 1e9
    assert "2 + 1" in right.shape
    assert right.share_of_copy is None
    size = 128 * 16 * 4
    slow_copy = attention.measure(attention.many_tiny, True, arguments, 1e15, 1e6)
    bound = {(row.rival, row.direction): row for row in slow_copy}["a document at a time", "both"]
    assert bound.bytes == size * (2 * 2 + 2 * 1 + 4 * 2 + 4 * 1)
    assert bound.share_of_copy == bound.bytes / 1e6 / bound.median
    assert bound.share_of_peak is None
