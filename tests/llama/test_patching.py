"""What `accelerate` takes, changes, reports and gives back."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.big_modeling import _attach_context_parallel_hooks
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import lemur_fast
from lemur_fast.llama import Accelerated, accelerate, forwards, patching
from lemur_fast.llama.binding import CACHE
from lemur_fast.ops import _products
from tests.llama.tiny import VOCAB, assert_same, documents, loss_and_gradients, packed, pair, tiny_llama


def states(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Every module's own attributes, in order."""
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


def assert_untouched(before: dict[str, dict[str, Any]], model: torch.nn.Module) -> None:
    after = states(model)
    assert before.keys() == after.keys()
    for name, attributes in before.items():
        assert list(attributes) == list(after[name]), name
        assert all(attributes[key] is after[name][key] for key in attributes if key != "training"), name


def test_restore_leaves_nothing_behind() -> None:
    model = tiny_llama().eval()
    ids = torch.randint(1, VOCAB, (2, 9))
    expected = model(ids).logits
    before = states(model)
    accelerated = accelerate(model)
    model(ids, labels=ids, output_hidden_states=True)
    model.train()(**packed(documents())).loss.backward()
    model.zero_grad()
    model.eval()
    accelerated.restore()
    assert_untouched(before, model)
    assert torch.equal(model(ids).logits, expected)


def test_only_this_instance_changes() -> None:
    classes = [getattr(modeling_llama, name) for name in dir(modeling_llama) if name.startswith("Llama")]
    before = [dict(vars(cls)) for cls in classes], dict(vars(modeling_llama))
    other = tiny_llama()
    attributes = states(other)
    accelerate(tiny_llama())
    assert before == ([dict(vars(cls)) for cls in classes], dict(vars(modeling_llama)))
    assert_untouched(attributes, other)


def test_context_manager() -> None:
    model = tiny_llama()
    ids = torch.randint(1, VOCAB, (2, 9))
    with accelerate(model) as accelerated:
        assert model.lemur_fast is accelerated
        assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids).logits is not None
    with pytest.raises(ZeroDivisionError), accelerate(model):
        1 / 0  # noqa: B018
    assert not hasattr(model, "lemur_fast")


def test_accelerating_twice() -> None:
    model = tiny_llama()
    accelerated = accelerate(model)
    with pytest.raises(RuntimeError, match="accelerated already"):
        accelerate(model)
    accelerated.restore()
    with pytest.raises(RuntimeError, match="restored before"):
        accelerated.restore()
    accelerate(model)


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_products, "float32_is_faster", lambda: False)
    assert str(accelerate(tiny_llama())) == (
        "Accelerated LlamaForCausalLM: 5 norms (rms_norm, residual additions inside), "
        "2 attentions (rotary, attention), 2 MLPs (swiglu), the loss (linear_cross_entropy); restore() undoes it"
    )
    assert str(accelerate(tiny_llama(num_hidden_layers=1), ops=["swiglu", "attention"])) == (
        "Accelerated LlamaForCausalLM: 1 attention (attention), 1 MLP (swiglu); restore() undoes it"
    )
    assert "the loss (cross_entropy, of logits that stay);" in str(accelerate(tiny_llama(), return_logits=True))
    monkeypatch.setattr(_products, "float32_is_faster", lambda: True)
    told = "{} linear layers (on this CPU, products of bfloat16 in float32), "
    assert told.format(14) in str(accelerate(tiny_llama()))
    assert told.format(15) in str(accelerate(tiny_llama(), ops=["cross_entropy"])), "with the output layer"


def test_linear_layers_where_float32_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of the layers is ours then, and the model's own again once it is restored."""
    monkeypatch.setattr(_products, "float32_is_faster", lambda: True)
    served = []
    project = _products.project
    monkeypatch.setattr(_products, "project", lambda x, *a, **k: (served.append(x.shape), project(x, *a, **k))[1])
    model = tiny_llama().bfloat16()
    ids = torch.randint(0, model.config.vocab_size, (1, 80))
    with accelerate(model):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert len(served) == 15, "7 of each layer, and the output layer"
        model(input_ids=ids[:, :20])
        assert len(served) == 15, "few rows are torch's"
        with lemur_fast.use_backend("reference"):
            model(input_ids=ids)
        assert len(served) == 15, "as is the reference"
    model(input_ids=ids)
    assert len(served) == 15


def test_ops_that_were_not_asked_for_stay_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    import lemur_fast.ops as ops

    called = set()
    for name in ("rms_norm", "rotary", "swiglu", "attention", "cross_entropy", "linear_cross_entropy"):
        place = (forwards, "swiglu_linear") if name == "swiglu" else (ops, name)
        function = getattr(*place)
        monkeypatch.setattr(*place, lambda *a, _n=name, _f=function, **k: (called.add(_n), _f(*a, **k))[1])
    for asked in ({"rms_norm"}, {"rotary", "swiglu"}, {"attention", "linear_cross_entropy"}, {"cross_entropy"}):
        called.clear()
        model = tiny_llama()
        accelerate(model, ops=asked)
        loss_and_gradients(model, **packed(documents()))
        assert called == asked


@pytest.mark.parametrize("ops", ["rms_norm", ["rmsnorm"], [], ["all"]])
def test_unknown_ops(ops: Any) -> None:
    with pytest.raises(ValueError, match=r"ops: got .*; takes .*rms_norm, rotary, swiglu, attention, cross_entropy"):
        accelerate(tiny_llama(), ops=ops)


def test_restore_refuses_while_something_wraps_the_model() -> None:
    model = tiny_llama()
    accelerated = accelerate(model)
    inner = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: inner(x)
    before = states(model)
    with pytest.raises(RuntimeError, match=r"forward of model\.layers\.1\.mlp was replaced after accelerate"):
        accelerated.restore()
    assert_untouched(before, model)
    model.model.layers[1].mlp.forward = inner
    accelerated.restore()
    assert "forward" not in model.model.layers[1].mlp.__dict__


def test_mixed_precision_of_accelerator_wraps_and_unwraps() -> None:
    model = tiny_llama()
    accelerated = accelerate(model)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    ids = torch.randint(1, VOCAB, (2, 9))
    loss = prepared(ids, labels=ids).loss
    assert loss.dtype == torch.float32
    with pytest.raises(RuntimeError, match="the model was replaced after accelerate"):
        accelerated.restore()
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert plain(ids, labels=ids).logits is None
    torch.testing.assert_close(plain(ids, labels=ids).loss, loss, rtol=0.01, atol=0)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_independent_and_accelerated(how: str) -> None:
    model = tiny_llama()
    accelerate(model, return_logits=True)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    own = set(map(id, other.modules()))
    replaced = 2 + 2 * 3 + 5 + 1 + (14 if _products.float32_is_faster() else 0)
    bound = [m.__dict__["forward"] for m in other.modules() if "forward" in m.__dict__]
    assert len(bound) == len([m for m in model.modules() if "forward" in m.__dict__]) == replaced
    assert all(id(forward.module) in own for forward in bound)

    batch = packed(documents())
    expected = loss_and_gradients(model, **batch)
    ours = loss_and_gradients(other, **batch)
    assert torch.equal(ours[0], expected[0])
    assert all(torch.equal(ours[1][name], expected[1][name]) for name in expected[1])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(loss_and_gradients(model, **batch)[0], expected[0])

    assert isinstance(other.lemur_fast, Accelerated)
    assert other.lemur_fast.model is other
    other.lemur_fast.restore()
    assert not any("forward" in m.__dict__ for m in other.modules())
    assert torch.equal(loss_and_gradients(model, **batch)[0], expected[0])


def test_saved_weights_are_those_of_stock(tmp_path: Path) -> None:
    ours, stock = pair()
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(1, VOCAB, (2, 9))
    assert torch.equal(again(ids).logits, stock.eval()(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [VOCAB + 7, VOCAB - 7])
def test_resized_embeddings(size: int, tied: bool) -> None:
    """The output layer may be another module afterwards: it takes the loss without logits all the same."""
    ours, stock = pair(tie_word_embeddings=tied)
    for model in (ours, stock):
        torch.manual_seed(2)
        model.resize_token_embeddings(size, mean_resizing=False)
    ids = torch.randint(1, size, (2, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forwards._announced.clear()
        assert_same(
            loss_and_gradients(ours, input_ids=ids, labels=ids), loss_and_gradients(stock, input_ids=ids, labels=ids)
        )
    ours.lemur_fast.restore()
    assert torch.equal(ours(ids).logits, stock(ids).logits)


def test_signature_names_hugging_faces_parameters() -> None:
    model = tiny_llama()
    stock = list(inspect.signature(model.forward).parameters)
    stock_base = list(inspect.signature(model.model.forward).parameters)
    accelerate(model)
    ours = inspect.signature(model.forward).parameters
    assert [name for name in ours if name in stock] == stock
    assert {"cu_seqlens", "shift_labels", "num_items_in_batch", "trained_rows"} < set(ours)
    assert ours["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
    assert "options" not in ours
    assert [name for name in inspect.signature(model.model.forward).parameters if name in stock_base] == stock_base


# ---- refusals --------------------------------------------------------------------------------------------------------


def small(kind: type, **overrides: Any) -> dict[str, Any]:
    return kind(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, **overrides
    )


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: MistralForCausalLM(small(MistralConfig)), "MistralForCausalLM"),
        (lambda: LlamaModel(small(LlamaConfig)), "LlamaModel"),
        (lambda: LlamaForSequenceClassification(small(LlamaConfig)), "LlamaForSequenceClassification"),
        (lambda: torch.nn.Linear(2, 2), "Linear"),
        (lambda: torch.compile(tiny_llama()), r"OptimizedModule.*_orig_mod"),
        (lambda: torch.nn.DataParallel(tiny_llama()), r"DataParallel.*module"),
    ],
)
def test_other_models_are_refused_by_name(build: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"model: got a {name}"):
        accelerate(build())


def test_a_subclass_with_its_own_forward_is_refused() -> None:
    class Custom(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    with pytest.raises(TypeError, match="got a Custom; takes a stock LlamaForCausalLM"):
        accelerate(Custom(small(LlamaConfig)))


def test_a_module_that_is_not_stock_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[1].self_attn = torch.nn.Identity()
    with pytest.raises(TypeError, match=r"model\.layers\.1\.self_attn: got a Identity; takes a stock LlamaAttention"):
        accelerate(model)
    assert "forward" not in model.__dict__


def test_a_forward_that_was_replaced_before_is_refused() -> None:
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare(tiny_llama())
    with pytest.raises(TypeError, match=r"model\.forward: was replaced by .*accelerate.*takes a stock model"):
        accelerate(model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_act": "gelu"}, r"config\.hidden_act: got 'gelu'; swiglu takes \"silu\""),
        ({"head_dim": 512}, r"config\.head_dim: got 512; attention takes at most 256"),
    ],
)
def test_configurations_that_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accelerate(tiny_llama(**overrides))


def test_another_activation_works_without_swiglu() -> None:
    stock, ours = tiny_llama(hidden_act="gelu"), tiny_llama(hidden_act="gelu")
    accelerate(ours, ops=["rms_norm", "rotary", "attention", "linear_cross_entropy"])
    ids = torch.randint(1, VOCAB, (2, 9))
    torch.testing.assert_close(ours(ids, labels=ids).loss, stock(ids, labels=ids).loss, rtol=1e-5, atol=0)


def test_an_activation_that_was_replaced() -> None:
    """Before, it is refused; later, it is called."""
    model, ours, stock = tiny_llama(), tiny_llama(), tiny_llama()
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.act_fn: got a ReLU; swiglu takes SiLU"):
        accelerate(model)
    accelerate(ours)
    for changed in (ours, stock):
        changed.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    ids = torch.randint(1, VOCAB, (2, 9))
    torch.testing.assert_close(ours(ids, labels=ids).loss, stock(ids, labels=ids).loss, rtol=1e-5, atol=0)


def test_bidirectional_models_are_refused() -> None:
    model = tiny_llama()
    model.config.is_causal = False
    with pytest.raises(ValueError, match=r"config\.is_causal: got False"):
        accelerate(model)
    model = tiny_llama()
    accelerate(model)
    with pytest.raises(ValueError, match="is_causal: got False"):
        model(torch.ones(1, 3, dtype=torch.long), is_causal=False)


def test_attention_dropout_is_refused_in_training() -> None:
    model = tiny_llama(attention_dropout=0.1)
    ids = torch.randint(1, VOCAB, (2, 9))
    expected = model.eval()(ids).logits
    accelerated = accelerate(model)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"config\.attention_dropout: got 0\.1; .*has no dropout"):
        model.train()(ids, labels=ids)
    accelerated.restore()
    accelerate(model, ops=["rms_norm", "swiglu", "linear_cross_entropy"])
    assert model(ids, labels=ids).loss != model(ids, labels=ids).loss, "dropout was dropped"


def test_a_custom_loss_is_refused_unless_it_can_run() -> None:
    model = tiny_llama()
    model.loss_function = lambda logits, **kwargs: logits.sum()
    with pytest.raises(ValueError, match=r"model\.loss_function: got .*<lambda>.*Leave both out"):
        accelerate(model)
    later = tiny_llama()
    accelerate(later)
    later.loss_function = model.loss_function
    with pytest.raises(ValueError, match=r"model\.loss_function: got .*<lambda>.*Leave both out"):
        later(torch.ones(1, 3).long(), labels=torch.ones(1, 3).long())
    accelerate(model, ops=["rms_norm"])
    ids = torch.randint(1, VOCAB, (2, 9))
    torch.testing.assert_close(model(ids, labels=ids).loss, model(ids).logits.sum(), rtol=1e-4, atol=1e-3)


def test_quantized_layers_are_refused_by_name() -> None:
    fake = type("Linear4bit", (torch.nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = fake(64, 112, bias=False)
    with pytest.raises(TypeError, match=r"model\.layers\.0\.mlp\.up_proj: got a bitsandbytes Linear4bit \(QLoRA\)"):
        accelerate(model)
    model = tiny_llama()
    model.hf_quantizer = type("GptqHfQuantizer", (), {})()
    with pytest.raises(TypeError, match=r"quantized model \(GptqHfQuantizer\)"):
        accelerate(model)


def test_zero3_parameters_are_refused_by_name() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.ds_id = 3
    with pytest.raises(TypeError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: got a DeepSpeed ZeRO-3 parameter"):
        accelerate(model)
    model = tiny_llama()
    accelerate(model)
    model.lm_head.weight.ds_id = 3  # sharded later, as deepspeed.initialize does
    ids = torch.randint(1, VOCAB, (2, 9))
    with pytest.raises(TypeError, match=r"Linear\.weight: got a DeepSpeed ZeRO-3 share"):
        model(ids, labels=ids)


def test_context_and_sequence_parallelism_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both swap the attention under the model's feet, where ours would see one rank's share of the tokens."""
    ids = torch.randint(1, VOCAB, (2, 9))
    model, _ = pair()
    _attach_context_parallel_hooks(model)
    with pytest.raises(TypeError, match="context parallelism: lemur_fast's attention sees one rank's tokens only"):
        model(ids, labels=ids)
    model, _ = pair()
    ulysses = type("attention", (), {"__module__": "deepspeed.runtime.sequence_parallel.ulysses_sp"})()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", ulysses)
    with pytest.raises(TypeError, match="DeepSpeed's sequence parallelism"):
        model(ids, labels=ids)


# ---- bad arguments of a call -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cu_seqlen": torch.tensor([0, 9])}, TypeError, "unexpected argument cu_seqlen; .*it takes cu_seq_lens_k"),
        ({"token_type_ids": torch.zeros(1, 9)}, TypeError, "unexpected argument token_type_ids"),
        ({"output_router_logits": True}, ValueError, "output_router_logits: got True"),
        ({"cu_seqlens": [0, 9]}, TypeError, "cu_seqlens: got list; takes an int32 tensor"),
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, TypeError, "cu_seqlens: got dtype torch.float32; takes int32"),
        ({"cu_seqlens": torch.tensor([[0, 9]])}, ValueError, r"cu_seqlens: got shape \[1, 2\]; takes \[N \+ 1\]"),
        ({"cu_seqlens": torch.tensor([0, 9]), "attention_mask": torch.ones(1, 9)}, ValueError, "attention_mask: got a"),
        ({"cu_seqlens": torch.tensor([0, 9]), "use_cache": True}, ValueError, "cu_seqlens: got documents beside a KV"),
        ({"cu_seq_lens_k": torch.tensor([0, 9])}, ValueError, "cu_seq_lens_k: got a tensor without cu_seq_lens_q"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 9]), "cu_seq_lens_k": torch.tensor([0, 4, 9])},
            ValueError,
            "cu_seq_lens_k: differs from cu_seq_lens_q",
        ),
        ({"attention_mask": torch.ones(1, 8)}, ValueError, r"attention_mask: got shape \[1, 8\]; takes \[1, 9\]"),
        ({"position_ids": torch.arange(9)}, ValueError, r"position_ids: got shape \[9\]; takes \[1, 9\]"),
        (
            {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]]), "use_cache": True},
            ValueError,
            "position_ids: they restart",
        ),
        ({"seq_idx": torch.zeros(2, 9)}, ValueError, r"seq_idx: got shape \[2, 9\]"),
        ({"labels": torch.zeros(1, 8).long()}, ValueError, r"labels: got shape \[1, 8\]; takes \[1, 9\]"),
        ({"shift_labels": torch.zeros(9).long()}, ValueError, r"shift_labels: got shape \[9\]; takes \[1, 9\]"),
        ({"trained_rows": torch.tensor([1])}, ValueError, "trained_rows: got a value without labels"),
        ({"record_stats": print}, ValueError, "record_stats: got a value without labels"),
        (
            {
                "trained_rows": torch.tensor([1]),
                "labels": torch.zeros(1, 9).long(),
                "attention_mask": torch.tensor([[0] + [1] * 8]),
            },
            ValueError,
            "trained_rows: got it beside padding",
        ),
        ({"inputs_embeds": torch.zeros(1, 9, 64)}, ValueError, "input_ids, inputs_embeds: takes exactly one"),
        ({"input_ids": torch.ones(9).long()}, ValueError, r"input_ids: got shape \[9\]; takes \[B, T\]"),
        ({"labels": torch.full((1, 9), VOCAB)}, ValueError, "labels"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = tiny_llama()
    accelerate(model)
    with pytest.raises(error, match=message):
        model(**({"input_ids": torch.ones(1, 9).long()} | arguments))


@pytest.mark.skipif(CACHE == "past_key_values", reason="this transformers has one name for the cache")
def test_either_name_of_the_cache() -> None:
    model, ids = tiny_llama().eval(), torch.randint(1, VOCAB, (1, 5))
    accelerate(model)
    for names in ((CACHE, "past_key_values"), ("past_key_values", CACHE)):
        cache = DynamicCache(config=model.config)
        model(ids, **{names[0]: cache, names[1]: None})
        assert cache.get_seq_length() == 5
    with pytest.raises(ValueError, match=f"past_key_values: got it beside {CACHE}, its newer name"):
        model(ids, **dict.fromkeys(names, cache))


def test_two_rows_beside_cu_seqlens_are_refused() -> None:
    ours, _ = pair()
    with pytest.raises(ValueError, match=r"cu_seqlens: got it beside an input of shape \[2, 9\]; takes an input of"):
        ours(torch.ones(2, 9).long(), cu_seqlens=torch.tensor([0, 9]))


@pytest.mark.parametrize("bounds", [[0, 5, 3, 9], [0, 12], [2, 9]])
def test_debug_mode_looks_at_the_bounds(bounds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lemur_fast.dispatch._debug", True)
    ours, _ = pair()
    with pytest.raises(ValueError, match=r"cu_seqlens: got \[.*never decrease"):
        ours(torch.ones(1, 9).long(), cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"trained_rows": torch.ones(25, dtype=torch.bool)}, TypeError, "trained_rows: got dtype torch.bool"),
        ({"trained_rows": torch.ones(3)}, TypeError, "trained_rows: got dtype torch.float32"),
        ({"trained_rows": torch.ones(1, 3, dtype=torch.int32)}, ValueError, r"trained_rows: got shape \[1, 3\]"),
        ({"trained_rows": [1, 2]}, TypeError, "trained_rows: got list"),
        ({"labels": [1, 2]}, TypeError, "labels: got list"),
        ({"input_ids": [1, 2]}, TypeError, "input_ids: got list"),
        ({"attention_mask": {"full": None}, "cu_seqlens": None}, TypeError, "attention_mask: got dict"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(training: bool, change: dict, error: type, words: str) -> None:
    model = tiny_llama().train(training)
    accelerate(model)
    with pytest.raises(error, match=words):
        model(**(packed(documents()) | change))


@pytest.mark.parametrize("ops", ["all", ["rms_norm", "linear_cross_entropy"]])
@pytest.mark.parametrize("bounds", [[0, 8, 30], [0, 12, 8, 25], [3, 12, 25]])
def test_bounds_are_looked_at_on_a_cpu_whatever_attends(ops: Any, bounds: list[int]) -> None:
    model = tiny_llama()
    accelerate(model, ops=ops)
    with pytest.raises(ValueError, match="cu_seqlens: got"):
        model(**(packed(documents()) | {"cu_seqlens": torch.tensor(bounds).int()}))


def test_other_bounds_for_the_keys_are_refused() -> None:
    model = tiny_llama()
    accelerate(model)
    batch = packed(documents())
    bounds = batch.pop("cu_seqlens")
    other = bounds.clone()
    other[1] += 1
    with pytest.raises(ValueError, match="cu_seq_lens_k: differs"):
        model(**batch, cu_seq_lens_q=bounds, cu_seq_lens_k=other)


def test_ops_must_be_names() -> None:
    with pytest.raises(TypeError, match="ops: got NoneType"):
        accelerate(tiny_llama(), ops=None)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_malloc_is_set_for_a_model_on_a_cpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(patching._malloc, "keep_freed_memory", lambda: calls.append(True))
    accelerate(tiny_llama().to(device))
    assert len(calls) == (device == "cpu")
