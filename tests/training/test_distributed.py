import contextlib

import pytest
import torch
import torch.distributed as dist

from lemur_fast.training.distributed import compute_dtype, full_state_dict, process_group, shard


def test_master_weights_are_fp32_and_whole(make_model, mesh):
    model = make_model()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append((module.weight.dtype, output.dtype)))
    shard(model, list(model.model.layers), mesh, torch.bfloat16)
    model(input_ids=torch.arange(8)[None]).logits.float().sum().backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    state = full_state_dict(model)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_the_group_is_taken_down_even_after_an_error():
    for _ in range(2):
        with contextlib.suppress(KeyError), process_group(torch.device("cpu")):
            assert dist.get_world_size() == 1
            raise KeyError
        assert not dist.is_initialized()


def test_shards_must_divide_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="shard_size: got 3; must divide the number of processes, 4"):
        process_group("cpu", 3).__enter__()


def test_a_world_of_one_needs_no_one_else(world):
    assert world.sum(3, 4) == [3, 4]
    assert world.everyone("a") == ["a"]
    assert world.first(lambda: 5) == 5
    assert world.add_(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_only_where_the_processor_has_it(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert compute_dtype(torch.device("cpu")) == expected
