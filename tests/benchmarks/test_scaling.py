"""The curves: what is counted at each of their points, and that a wrong rival has no time."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import ops, peers, scaling

CPU = torch.device("cpu")
BY_TOKENS = {op: point for op, axis, _, point in scaling.CURVES if axis == "tokens" and "attention" not in op}


@pytest.mark.parametrize("op", ["rms_norm", "rotary", "swiglu", "cross_entropy"])
def test_the_bytes_of_a_point_are_those_of_its_own_tensors(op):
    """Each large tensor once: inputs and outputs forward; incoming gradients, what is saved, and gradients backward."""
    inputs, wanted, found, _, elements, flops = BY_TOKENS[op](80, CPU, torch.float32)
    outputs = ops._list(found["lemur_fast"](*inputs))
    large = sum(x.numel() for x in inputs if x.is_floating_point() and x.requires_grad and x.dim() > 1)
    produced = sum(x.numel() for x in outputs if x.dim() > 1)
    gradients = sum(inputs[i].numel() for i in wanted if inputs[i].dim() > 1)
    saved = 0 if op == "rotary" else large
    assert elements == large + produced + produced + saved + gradients
    assert flops == 0


def test_the_flops_of_attention_are_those_of_its_pairs():
    (point,) = [point for op, _, _, point in scaling.CURVES if op == "attention, documents of 8"]
    *_, elements, flops = point(3, CPU, torch.float32)
    pairs = sum(1 for document in range(3) for query in range(8) for key in range(query + 1))
    assert flops == 3.5 * 4 * 64 * 8 * pairs
    assert elements == 0


def test_rows_tell_what_was_counted_and_its_share_and_a_wrong_rival_has_no_time(monkeypatch, tmp_path):
    known = {name: peers.OPS["swiglu"][name] for name in ("lemur_fast", "eager")}
    monkeypatch.setitem(peers.OPS, "swiglu", known | {"torch": lambda device: lambda gate, up: gate * up})
    few = scaling.Arguments(points=2, smaller=16, rounds=2, only=("swiglu",), json=tmp_path / "rows.jsonl")
    scaling.main(few)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    ours = [line for line in lines if line["rival"] == "lemur_fast" and "tokens" in line["at"]]
    assert [line["bytes"] for line in ours] == [8 * tokens * 2816 * 4 for tokens in (16, 32)]
    assert all(line["share_of_copy"] > 0 and line["spread"] is not None for line in ours)
    others = [line for line in lines if line["rival"] == "torch"]
    assert others
    assert all(line["error"].startswith("wrong") and line["median"] is None for line in others)


def test_the_packer_is_no_part_of_a_gpu(monkeypatch):
    monkeypatch.setattr(scaling, "machine", lambda device: "a GPU")
    with pytest.raises(SystemExit, match="takes parts of") as refusal:
        scaling.main(scaling.Arguments(device="cuda", only=("packing",)))
    assert "packing.plan" not in str(refusal.value)
