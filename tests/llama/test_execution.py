"""Gradient checkpointing, torch.compile, generation and FSDP2."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lemur_fast as lf
from lemur_fast import dispatch
from lemur_fast.llama import accelerate, forwards
from tests.llama.tiny import (
    VOCAB,
    assert_near,
    assert_same,
    documents,
    gradients,
    loss_and_gradients,
    packed,
    padded,
    pair,
    separate_documents,
    tiny_llama,
)

# ---- what is kept for backward ---------------------------------------------------------------------------------------


def kept_bytes(model: nn.Module, **inputs: Any) -> int:
    """Bytes of the storages that a forward keeps for its backward."""
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = model(**inputs).loss
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("frozen", ["", "q_proj", "norm"])
def test_results_of_norms_are_not_kept(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in name)
    batch = packed(documents())
    kept, found = kept_bytes(ours, **batch), gradients(ours)
    ours.zero_grad()
    monkeypatch.setattr(forwards, "_made_of", lambda *_: {})
    more = kept_bytes(ours, **batch) - kept
    assert more == 4 * batch["input_ids"].numel() * 64 * 4, "two layers of two norms"
    assert found.keys() == gradients(ours).keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients(ours).items())


@pytest.mark.parametrize("name", ["self_attn", "mlp"])
def test_a_module_that_someone_replaced_gets_stock_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, stock = pair()
    module = getattr(ours.model.layers[0], name)
    replaced = module.forward
    given: set[str] = set()
    module.forward = lambda *args, **kwargs: (given.update(kwargs), replaced(*args, **kwargs))[1]
    assert_same(loss_and_gradients(ours, **packed(documents())), separate_documents(stock, documents()))
    assert "normed" not in given


# ---- gradient checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing(use_reentrant: bool, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = tiny_llama()
    ours = copy.deepcopy(stock)
    if when == "before":
        accelerate(ours)
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if when == "after":
        accelerate(ours)
    if use_reentrant:
        ours.enable_input_require_grads()
    runs = []
    run = forwards._run_layer
    monkeypatch.setattr(
        forwards,
        "_run_layer",
        lambda *a, **k: (runs.append((a[2] is None, k["fused"], k["hands_on"])), run(*a, **k))[1],
    )
    assert_same(loss_and_gradients(ours, **packed(documents())), separate_documents(stock, documents()))
    assert runs == [(True, True, False)] * 4, "two layers forward, two again in the backward, one tensor kept for each"
    runs.clear()
    ours.eval()(**packed(documents()))
    assert len(runs) == 2


def test_checkpointing_fills_no_cache() -> None:
    ours, _ = pair()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(1, VOCAB, (2, 9))
    forwards._announced.clear()
    with pytest.warns(UserWarning, match="use_cache=True while gradient checkpointing"):
        assert ours(ids, use_cache=True).past_key_values is None
    cache = ours.eval()(ids, use_cache=True).past_key_values
    assert cache.get_seq_length() == 9
    with pytest.raises(ValueError, match="past_key_values: got a cache while gradient checkpointing"):
        ours.train()(ids, past_key_values=cache)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def compiled_batches() -> dict[str, dict[str, Tensor]]:
    batch = packed(documents())
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    rows = torch.nonzero(shifted[0] != -100).flatten().int()
    whole = {k: v for k, v in batch.items() if k != "labels"} | {"shift_labels": shifted, "trained_rows": rows}
    positions = {k: v for k, v in batch.items() if k != "cu_seqlens"}
    return {
        "PackedBatch": whole | {"num_items_in_batch": torch.tensor(len(rows))},
        "cu_seqlens": {k: v for k, v in batch.items() if k != "position_ids"},
        "positions": positions,
        "padded": padded(documents(), "left"),
        "padded with positions": padded(documents(), "right") | {"position_ids": torch.arange(12).repeat(4, 1)},
    }


@pytest.mark.parametrize("way", compiled_batches())
def test_compiled_without_graph_breaks(way: str) -> None:
    ours, stock = pair()
    torch.compiler.reset()
    step = torch.compile(ours, fullgraph=True, backend="aot_eager")
    truth = separate_documents(stock, documents())
    batch = compiled_batches()[way]
    if "num_items_in_batch" in batch:  # counts the target of each document's first token, too: none of them is in rows
        batch["num_items_in_batch"] = torch.tensor(sum(len(doc) - 1 for doc in documents()))
    result = loss_and_gradients(step, **batch)
    plain = {name.removeprefix("_orig_mod."): gradient for name, gradient in result[1].items()}
    assert_same((result[0], plain), truth)


def test_compiled_in_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing looks at values while it is traced; the operators look when they run."""
    monkeypatch.setattr(dispatch, "_debug", True)
    ours, stock = pair()
    torch.compiler.reset()
    step = torch.compile(ours, fullgraph=True, backend="aot_eager")
    batch = compiled_batches()["cu_seqlens"]
    assert_near(step(**batch).loss, separate_documents(stock, documents())[0])
    batch["cu_seqlens"] = batch["cu_seqlens"].flip(0)
    with pytest.raises(ValueError, match="cu_seqlens: got"):
        step(**batch)


def test_compiled_base_model_has_zeros_at_padding() -> None:
    ours, stock = pair()
    torch.compiler.reset()
    batch = {k: v for k, v in padded(documents(), "left").items() if k != "labels"}
    hidden = torch.compile(ours.model, fullgraph=True, backend="aot_eager")(**batch).last_hidden_state
    mask = batch["attention_mask"].bool()
    assert_near(hidden[mask], stock.model(**batch).last_hidden_state[mask])
    assert not hidden[~mask].any()


def test_compiled_by_inductor_in_training_and_evaluation() -> None:
    ours, stock = pair(num_hidden_layers=1)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True)
    batch = packed(documents())
    loss, found = loss_and_gradients(compiled, **batch)
    assert_same(
        (loss, {name.removeprefix("_orig_mod."): g for name, g in found.items()}),
        separate_documents(stock, documents()),
    )
    with torch.no_grad():
        ids = batch["input_ids"]
        assert_near(compiled.eval()(ids, use_cache=False).logits, stock.eval()(ids, use_cache=False).logits)


# ---- no waiting for the device ---------------------------------------------------------------------------------------


def count_waits(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """How often a step would wait for the device: where Python asks for a value or for a shape that hangs on values."""
    waits = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
                waits.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        model(**batch).loss.backward()
    return len(waits)


def test_a_packed_step_never_waits_for_the_device() -> None:
    """Operators of lemur_fast are opaque here: what they do inside is judged by their own tests."""
    ours, _ = pair()
    batches = compiled_batches()
    assert count_waits(ours, batches["PackedBatch"]) == 0
    assert count_waits(ours, batches["cu_seqlens"]) == 0
    flash = batches["cu_seqlens"].copy()
    flash["cu_seq_lens_q"] = flash["cu_seq_lens_k"] = flash.pop("cu_seqlens")
    assert count_waits(ours, flash) == 0
    assert count_waits(ours, {"input_ids": torch.ones(2, 9).long(), "labels": torch.ones(2, 9).long()}) == 0


def test_other_batches_wait_once_at_the_entry() -> None:
    ours, _ = pair()
    batches = compiled_batches()
    assert count_waits(ours, batches["positions"]) == 1
    assert count_waits(ours, batches["padded"]) == 1
    assert count_waits(ours, batches["padded with positions"]) == 2


# ---- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
@pytest.mark.parametrize("training", [False, True])
def test_generation_gives_the_tokens_of_stock(options: dict[str, Any], training: bool) -> None:
    ours, stock = pair()
    batch = padded(documents((7, 3, 12, 5)), "left")
    del batch["labels"]
    results = []
    for model in (ours, stock):
        model.train(training)
        results.append(model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None, **options))
    assert torch.equal(*results)
    assert results[0].shape == (4, 20)


def test_generation_uses_our_norms_rotary_and_swiglu(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    called = []
    for name in ("rms_norm", "rotary", "swiglu", "attention"):
        place = (forwards, "swiglu_linear") if name == "swiglu" else (lf.ops, name)
        function = getattr(*place)
        monkeypatch.setattr(*place, lambda *a, _n=name, _f=function, **k: (called.append(_n), _f(*a, **k))[1])
    ours.eval().generate(torch.ones(1, 4).long(), max_new_tokens=2, do_sample=False)
    assert set(called) == {"rms_norm", "rotary", "swiglu"}


def test_decoding_by_hand() -> None:
    """In eval mode the default is Hugging Face's: a call returns its cache, and the next one goes on from it."""
    ours, stock = (model.eval() for model in pair())
    ids = torch.randint(1, VOCAB, (2, 9))
    expected = stock(ids, use_cache=False).logits
    cache = ours(ids[:, :5]).past_key_values
    assert_near(ours(ids[:, 5:], past_key_values=cache).logits, expected[:, 5:])
    positions = torch.arange(9)[None]
    cache = ours(ids[:, :5], position_ids=positions[:, :5]).past_key_values
    assert_near(ours(ids[:, 5:], past_key_values=cache, position_ids=positions[:, 5:]).logits, expected[:, 5:])


def test_training_and_packed_calls_fill_no_cache() -> None:
    ours, _ = pair()
    ids = torch.randint(1, VOCAB, (1, 9))
    restarting = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    assert ours(ids).past_key_values is None
    assert ours.eval()(ids).past_key_values is not None
    assert ours(ids, labels=ids).past_key_values is None
    assert ours(ids, position_ids=restarting).past_key_values is None
    assert ours(ids, cu_seqlens=torch.tensor([0, 4, 9])).past_key_values is None


def test_scoring_on_top_of_a_cache() -> None:
    ours, stock = (model.eval() for model in pair())
    ids = torch.randint(1, VOCAB, (2, 9))
    losses = []
    for model in (ours, stock):
        cache = model(ids[:, :5], use_cache=True).past_key_values
        losses.append(model(ids[:, 5:], labels=ids[:, 5:], past_key_values=cache).loss)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A process group of one, without network or files."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard(model: nn.Module, mesh: DeviceMesh, head: str, policy: MixedPrecisionPolicy) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if head == "own":
        fully_shard(model.lm_head, mesh=mesh, mp_policy=policy)
    elif head == "with the norm":
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


@pytest.mark.parametrize("apart", ["norms", "mlp", "self_attn"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_fsdp2_of_norms_or_what_follows_them_alone(mesh: DeviceMesh, apart: str, checkpointed: bool) -> None:
    """Their results are kept: FSDP2 would cast what they are made again of, and frees a norm's weight in between."""
    ours, stock = pair()
    if checkpointed:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in ours.model.layers:
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        for module in norms if apart == "norms" else [getattr(layer, apart)]:
            fully_shard(module, mesh=mesh, reshard_after_forward=checkpointed)
        fully_shard(layer, mesh=mesh)
    fully_shard(ours, mesh=mesh)
    batch = packed(documents())
    losses = [ours(**batch).loss for _ in range(2)]
    for loss in losses:
        loss.backward()
    expected = separate_documents(stock, documents())
    found = {name: gradient.full_tensor() / 2 for name, gradient in gradients(ours).items()}
    assert_same((losses[0].detach(), found), expected)


@pytest.mark.parametrize("first", ["accelerate", "shard"])
@pytest.mark.parametrize("head", ["in the root", "own", "with the norm", "tied"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_fsdp2_equals_unsharded(mesh: DeviceMesh, head: str, first: str, bf16: bool, monkeypatch: Any) -> None:
    unsharded = tiny_llama(tie_word_embeddings=head == "tied")
    ours = copy.deepcopy(unsharded)
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    )
    if bf16:  # the parameters alone: the rotary frequencies stay float32 under FSDP2
        for parameter in unsharded.parameters():
            parameter.data = parameter.data.bfloat16()
    accelerate(unsharded)
    if first == "accelerate":
        accelerate(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shard(ours, mesh, head, policy)
        if first == "shard":
            accelerate(ours)
        fused = []
        run = forwards._run_layer
        monkeypatch.setattr(forwards, "_run_layer", lambda *a, **k: (fused.append(k["hands_on"]), run(*a, **k))[1])
        batch = packed(documents()) | {"num_items_in_batch": torch.tensor(3001)}
        for _ in range(2):  # the second step starts from what the first left sharded
            expected = loss_and_gradients(unsharded, **batch)
            loss, found = loss_and_gradients(ours, **batch)
    assert all(fused), "FSDP2's own hooks count as observers"
    assert isinstance(ours.lm_head.weight, DTensor)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    for name, gradient in expected[1].items():
        assert found[name].dtype == torch.float32, "gradients are those of the sharded master weights"
        torch.testing.assert_close(found[name].full_tensor().to(gradient.dtype), gradient, rtol=1e-6, atol=1e-9)
    assert str(ours.lemur_fast).startswith("Accelerated LlamaForCausalLM: 5 norms")
    ours.lemur_fast.restore()
    assert ours(**packed(documents())).logits is not None


def test_distributed_data_parallel_equals_plain(mesh: DeviceMesh) -> None:
    ours, stock = pair()
    loss, found = loss_and_gradients(nn.parallel.DistributedDataParallel(ours), **packed(documents()))
    plain = {name.removeprefix("module."): gradient for name, gradient in found.items()}
    assert_same((loss, plain), separate_documents(stock, documents()))


def test_fsdp2_with_gradient_checkpointing(mesh: DeviceMesh) -> None:
    ours, stock = pair()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    shard(ours, mesh, "own", MixedPrecisionPolicy())
    loss, found = loss_and_gradients(ours, **packed(documents()))
    assert_same((loss, {k: v.full_tensor() for k, v in found.items()}), separate_documents(stock, documents()))


def test_a_count_that_fsdp2_rounded_is_announced(mesh: DeviceMesh) -> None:
    ours, _ = pair()
    shard(ours, mesh, "own", MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    forwards._announced.clear()
    with pytest.warns(UserWarning, match="num_items_in_batch: got torch.bfloat16, which rounds counts above 256"):
        ours(**packed(documents()), num_items_in_batch=torch.tensor(3001.0))


def test_tensor_parallel_weights_are_refused_by_name(mesh: DeviceMesh) -> None:
    model = tiny_llama()
    head = model.lm_head
    head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match=r"lm_head\.weight: got a tensor parallel DTensor, which is not supported"):
        accelerate(model)
    model = tiny_llama()
    accelerate(model)
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match=r"Linear\.weight: got a DTensor; takes a whole tensor"):
        model(**packed(documents()))


def test_gradients_of_an_accumulated_step(mesh: DeviceMesh) -> None:
    """As a training loop does it: counts over the whole step, gradients kept whole until the last micro-batch."""
    ours, stock = pair()
    shard(ours, mesh, "in the root", MixedPrecisionPolicy())
    docs = documents()
    count = torch.tensor(sum(len(doc) - 1 for doc in docs))
    for i, doc in enumerate(docs):
        ours.set_requires_gradient_sync(i == len(docs) - 1)
        ours(**packed([doc]), num_items_in_batch=count).loss.backward()
    expected = separate_documents(stock, docs)
    assert_same((expected[0], {k: v.full_tensor() for k, v in gradients(ours).items()}), expected)


def test_compiled_positions_beside_a_cache() -> None:
    """The compiler cannot see whether they restart: a cache that was asked for is refused, a default one left out."""
    ours, stock = pair()
    ours.eval(), stock.eval()
    docs = documents()
    batch = {name: packed(docs)[name] for name in ("input_ids", "position_ids")}
    with pytest.raises(ValueError, match="position_ids: they restart"):
        ours(**batch, use_cache=True)
    compiled = torch.compile(ours, backend="aot_eager")
    with pytest.raises(ValueError, match=r"position_ids: they (may )?restart"):
        compiled(**batch, use_cache=True)
    apart = torch.cat([stock(input_ids=doc[None]).logits for doc in docs], 1)
    assert_near(compiled(**batch).logits, apart)
    assert_near(ours(**batch).logits, apart)
