"""Hooks and recorded outputs see what a stock model shows."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

from lemur_fast.llama import accelerate, forwards
from tests.llama.tiny import (
    VOCAB,
    assert_near,
    assert_same,
    documents,
    gradients,
    packed,
    padded,
    pair,
    separate_documents,
    tiny_llama,
)


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Records for every layer that runs whether both its residual additions are fused."""
    seen: list[bool] = []
    run = forwards._run_layer
    monkeypatch.setattr(forwards, "_run_layer", lambda *a, **k: (seen.append(k["hands_on"]), run(*a, **k))[1])
    return seen


def test_additions_are_fused_when_nobody_watches(layouts: list[bool]) -> None:
    ours, _ = pair()
    ids = torch.randint(1, VOCAB, (2, 9))
    ours(ids, labels=ids)
    ours.eval()(ids)  # over a KV cache too
    assert layouts == [True] * 4


def test_hooks_that_recorded_outputs_left_behind_do_not_watch(layouts: list[bool]) -> None:
    """Hugging Face's own hooks stay on the layers once outputs were recorded, and look away from then on."""
    model = tiny_llama()
    ids = torch.randint(1, VOCAB, (2, 9))
    model(ids, output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks
    accelerate(model)
    model(ids, labels=ids)
    assert layouts == [True, True]


PLACES = (
    "model",
    "model.embed_tokens",
    "model.layers.1",
    "model.layers.0.self_attn",
    "model.layers.1.self_attn.q_proj",
    "model.layers.0.mlp",
    "model.layers.1.mlp.act_fn",
    "model.layers.0.mlp.down_proj",
    "model.layers.0.post_attention_layernorm",
    "model.norm",
)


def comparable(value: Any) -> list[torch.Tensor]:
    """The tensors in arguments and outputs of a hook."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in comparable(item)] if isinstance(value, (tuple, list)) else []


@pytest.mark.parametrize("batch", ["rows", "packed", "padded left", "padded right"])
@pytest.mark.parametrize("place", PLACES)
def test_hooks_see_what_stock_shows(place: str, batch: str) -> None:
    ours, stock = pair()
    inputs = {"input_ids": torch.randint(1, VOCAB, (2, 9))}
    mask = torch.ones(2, 9, dtype=torch.bool)
    if batch == "packed":
        # Hugging Face tells documents by positions where there is no cache
        inputs = {k: v for k, v in packed(documents()).items() if k in ("input_ids", "position_ids")} | {
            "use_cache": False
        }
        mask = torch.ones(1, 25, dtype=torch.bool)
    elif batch != "rows":
        inputs = {k: v for k, v in padded(documents(), batch.split()[1]).items() if k != "labels"}
        mask = inputs["attention_mask"].bool()
    shown = []
    for model in (ours, stock):
        seen: list[Any] = []
        module = model.get_submodule(place)
        handle = module.register_forward_hook(lambda m, args, out, seen=seen: seen.extend((args, out)))
        model(**inputs)
        handle.remove()
        shown.append(comparable(seen))
    assert len(shown[0]) == len(shown[1]) > 0
    for a, b in zip(*shown, strict=True):
        assert a.shape == b.shape
        if a.is_floating_point():
            assert_near(a[mask], b[mask])


def test_a_hook_that_changes_a_layers_output_counts() -> None:
    ours, stock = pair()
    ids = torch.randint(1, VOCAB, (2, 9))
    for model in (ours, stock):
        model.model.layers[0].register_forward_hook(lambda m, args, out: out * 2)
        model.model.layers[1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    results = []
    for model in (ours, stock):
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    assert_same(*results)


@pytest.mark.parametrize("place", ["model.layers.0", "model.layers.1.mlp.down_proj"])
def test_backward_hooks_see_what_stock_shows(place: str) -> None:
    ours, stock = pair()
    ids = torch.randint(1, VOCAB, (2, 9))
    shown = []
    for model in (ours, stock):
        seen: list[torch.Tensor] = []
        model.get_submodule(place).register_full_backward_hook(lambda m, gi, go, seen=seen: seen.extend((gi[0], go[0])))
        model(ids, labels=ids).loss.backward()
        shown.append(seen)
    for a, b in zip(*shown, strict=True):
        assert_near(a, b)


def test_a_hook_on_the_output_layer_sees_logits() -> None:
    ours, stock = pair()
    ids = torch.randint(1, VOCAB, (2, 9))
    seen: list[torch.Tensor] = []
    ours.lm_head.register_forward_hook(lambda m, args, out: seen.append(out))
    forwards._announced.clear()
    with pytest.warns(UserWarning, match=r"lm_head has an adapter, a hook or .* \(torch\.nn\..*Linear\)"):
        result = ours(ids, labels=ids)
    expected = stock(ids, labels=ids)
    assert result.logits is None
    assert_near(seen[0], expected.logits)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-5, atol=0)
    batch = padded(documents(), "left")
    ours(**batch)
    assert seen[1].shape == (*batch["input_ids"].shape, VOCAB)


@pytest.mark.parametrize("place", [*PLACES, "lm_head"])
def test_a_forward_that_someone_wraps_later_sees_what_stock_shows(place: str) -> None:
    """As accelerate's hooks for offloading do, and anyone who changes what a module computes."""
    ours, stock = pair()
    ids = torch.randint(1, VOCAB, (2, 9))
    results, shown = [], []
    for model in (ours, stock):
        module, seen = model.get_submodule(place), []

        def wrapped(*args: Any, inner: Any = module.forward, seen: list = seen, **kwargs: Any) -> Any:
            out = inner(*args, **kwargs)
            seen.extend(x.shape for x in comparable(out))
            if isinstance(out, torch.Tensor):
                return out * 0.5
            if isinstance(out, tuple):
                return (out[0] * 0.5, *out[1:])
            out.last_hidden_state = out.last_hidden_state * 0.5
            return out

        module.forward = wrapped
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), gradients(model)))
        shown.append(seen)
    assert_same(*results)
    assert shown[0] == shown[1]


@pytest.mark.parametrize("what", ["layer", "forward"])
def test_a_layer_that_was_compiled_alone_is_not_watched(what: str) -> None:
    """But who wraps what torch.compile put there is, though functools.wraps copies its attributes."""
    ours, _ = pair()
    layers = ours.model.layers
    if what == "layer":
        layers[0] = torch.compile(layers[0], backend="eager")
    else:
        layers[0].forward = torch.compile(layers[0].forward, backend="eager")
    ids = torch.randint(1, VOCAB, (2, 9))
    ours(ids, labels=ids)
    assert not forwards._is_watched_inside(ours.model)
    inner, shapes = layers[0].forward, []

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        shapes.extend(x.shape for x in comparable(out))
        return out

    layers[0].forward = wrapped
    ours(ids, labels=ids)
    assert shapes == [(2, 9, 64)]


def test_global_hooks_see_what_stock_shows(layouts: list[bool]) -> None:
    ours, _ = pair()
    ids = torch.randint(1, VOCAB, (2, 9))
    shapes = set()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda m, args, out: shapes.add(out.shape) if type(m).__name__ == "LlamaDecoderLayer" else None
    )
    try:
        ours(ids)
    finally:
        handle.remove()
    assert shapes == {(2, 9, 64)}
    assert layouts == [False, False]


@pytest.mark.parametrize("which", ["mlp.down_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.o_proj"])
@pytest.mark.parametrize("how", ["global hook", "hook", "instance", "class", "weight"])
def test_a_linear_layer_is_called_where_someone_replaced_or_watches_it(
    how: str, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its product is taken without it: that of MLPs keeps less, and layers of one input share its gradient."""
    ours, _ = pair()
    ids = torch.randint(1, VOCAB, (2, 9))
    layer = ours.model.layers[1].get_submodule(which)
    called = []
    stock = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        called.append(self)
        return stock(self, x)

    class Own(torch.nn.Parameter):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.extend([layer] if function is torch.nn.functional.linear else [])
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))

    handle = None
    if how == "global hook":
        handle = torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: called.append(m))
    elif how == "hook":
        handle = layer.register_forward_hook(lambda m, args, out: called.append(m))
    elif how == "instance":
        layer.forward = forward.__get__(layer)
    elif how == "class":
        layer.__dict__.pop("forward", None)
        monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    else:
        layer.weight = Own(layer.weight.detach())
    fused = []
    original = forwards.swiglu_linear
    monkeypatch.setattr(forwards, "swiglu_linear", lambda g, u, w, b: (fused.append(w), original(g, u, w, b))[1])
    linears = forwards._products.linears
    monkeypatch.setattr(
        forwards._products, "linears", lambda x, ws, normed: (fused.extend(ws), linears(x, ws, normed))[1]
    )
    try:
        ours(ids, labels=ids)
    finally:
        if handle:
            handle.remove()
    assert layer in called
    assert not any(weight is layer.weight for weight in fused)


@pytest.mark.parametrize("which", [True, -1, [0, 1], [1, -1]], ids=str)
@pytest.mark.parametrize("batch", ["rows", "padded left", "cached"])
def test_output_hidden_states(batch: str, which: Any) -> None:
    ours, stock = pair()
    inputs = {"input_ids": torch.randint(1, VOCAB, (2, 9))}
    mask = torch.ones(2, 9, dtype=torch.bool)
    if batch == "padded left":
        inputs = {k: v for k, v in padded(documents(), "left").items() if k != "labels"}
        mask = inputs["attention_mask"].bool()
    if batch == "cached":
        inputs["use_cache"] = True
    for of in (lambda m: m, lambda m: m.model):
        states = of(ours)(**inputs, output_hidden_states=which).hidden_states
        expected = of(stock)(**inputs, output_hidden_states=True).hidden_states
        assert len(states) == len(expected) == 3
        wanted = (
            [0, 1, 2] if which is True else [index % 3 for index in (which if isinstance(which, list) else [which])]
        )
        assert [i for i, state in enumerate(states) if state is not None] == sorted(wanted)
        for i in wanted:
            assert_near(states[i][mask], expected[i][mask])
    assert ours(**inputs).hidden_states is None


def test_the_configuration_can_ask_for_hidden_states() -> None:
    model = tiny_llama()
    model.config.output_hidden_states = True
    accelerate(model)
    assert len(model(torch.ones(1, 4).long()).hidden_states) == 3


@pytest.mark.parametrize("batch", ["rows", "packed", "padded left", "cached"])
def test_output_attentions(batch: str) -> None:
    stock = tiny_llama()
    stock.set_attn_implementation("eager")
    ours = copy.deepcopy(stock)
    accelerate(ours)
    inputs = {"input_ids": torch.randint(1, VOCAB, (2, 9)), "use_cache": batch == "cached"}
    mask = torch.ones(2, 9, dtype=torch.bool)
    if batch == "packed":
        inputs |= {k: v for k, v in packed(documents()).items() if k in ("input_ids", "position_ids")}
        mask = torch.ones(1, 25, dtype=torch.bool)
    elif batch == "padded left":
        inputs |= {k: v for k, v in padded(documents(), "left").items() if k != "labels"}
        mask = inputs["attention_mask"].bool()
    out, expected = (m(**inputs, output_attentions=True) for m in (ours, stock))
    assert len(out.attentions) == len(expected.attentions) == 2
    for a, b in zip(out.attentions, expected.attentions, strict=True):
        assert_near(a.transpose(1, 2)[mask], b.transpose(1, 2)[mask])
    assert_near(out.logits[mask], expected.logits[mask])


def test_output_attentions_beside_a_loss() -> None:
    stock = tiny_llama(attn_implementation="eager")
    ours = tiny_llama(attn_implementation="eager")
    accelerate(ours)
    batch = packed(documents())
    out = ours(**batch, output_attentions=True)
    torch.testing.assert_close(out.loss, separate_documents(stock, documents())[0], rtol=1e-5, atol=0)
    assert out.attentions[0].shape == (1, 4, 25, 25)


def test_output_attentions_are_refused_where_they_would_mix_documents() -> None:
    ours, _ = pair()
    batch = {
        "input_ids": torch.ones(1, 6).long(),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 0, 1, 2, 0, 1]]),
    }
    with pytest.raises(ValueError, match="position_ids: they restart beside an attention_mask"):
        ours(**batch, output_attentions=True)


def test_a_four_dimensional_mask_is_honoured() -> None:
    ours, stock = pair()
    ids = torch.randint(1, VOCAB, (2, 9))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[5:, :3] = False
    mask = mask.expand(2, 1, 9, 9)
    assert_near(ours(ids, attention_mask=mask).logits, stock(ids, attention_mask=mask).logits)


def test_a_layer_can_be_called_on_its_own() -> None:
    """As calibration tools do, with Hugging Face's arguments."""
    ours, stock = pair()
    hidden = torch.randn(2, 9, 64)
    cos, sin = stock.model.rotary_emb(hidden, torch.arange(9)[None])
    out, expected = (m.model.layers[0](hidden, position_embeddings=(cos, sin)) for m in (ours, stock))
    assert_near(out, expected)
    with pytest.raises(TypeError, match="every argument but hidden_states by its name"):
        ours.model.layers[0](hidden, torch.ones(2, 1, 9, 9))
