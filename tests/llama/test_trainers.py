"""Hugging Face's Trainer, TRL and PEFT around an accelerated model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    EvalPrediction,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from lemur_fast.llama import accelerate, forwards
from lemur_fast.llama.binding import Forward
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
    tiny_llama,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB)}
    backend = Tokenizer(WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", unk_token="w1", eos_token="w2")


def token_dataset(with_labels: bool) -> Dataset:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, VOCAB, (int(n),), generator=generator).tolist() for n in (5, 9, 7, 12, 6, 8, 11, 4)]
    columns: dict[str, Any] = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    if with_labels:
        columns["labels"] = rows
    return Dataset.from_dict(columns)


def train(model: LlamaForCausalLM, folder: Path, collator: Any, **arguments: Any) -> tuple[Trainer, list[float]]:
    options = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 1,
    }
    compute_metrics = arguments.pop("compute_metrics", None)
    dataset = token_dataset(with_labels=isinstance(collator, DataCollatorWithFlattening))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**(options | arguments)),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=collator,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- Trainer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_trainer_learns_what_it_learns_with_stock(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, bf16: bool
) -> None:
    """Padded batches, gradient accumulation by count, evaluation with metrics from logits."""
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        hits = (prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:])[
            prediction.label_ids[:, 1:] != -100
        ]
        return {"accuracy": float(np.mean(hits)), "tokens": hits.size}

    results = []
    for name, model in zip(("ours", "stock"), pair(), strict=True):
        trainer, losses = train(model, tmp_path / name, collator, bf16=bf16, compute_metrics=accuracy)
        metrics = trainer.evaluate()
        results.append((losses, metrics, model))
    (ours, our_metrics, our_model), (stock, stock_metrics, stock_model) = results
    assert ours[-1] < ours[0]
    tolerance = 0.02 if bf16 else 1e-4
    assert ours == pytest.approx(stock, rel=tolerance)
    assert our_metrics["eval_loss"] == pytest.approx(stock_metrics["eval_loss"], rel=tolerance)
    assert our_metrics["eval_tokens"] == stock_metrics["eval_tokens"] == 54
    if not bf16:
        assert our_metrics["eval_accuracy"] == stock_metrics["eval_accuracy"]
        for (key, a), b in zip(our_model.named_parameters(), stock_model.parameters(), strict=True):
            torch.testing.assert_close(
                a, b, rtol=0, atol=2e-3, msg=lambda m, key=key: f"{key}: {m}"
            )  # Adam's first steps


def test_trainer_with_torch_compile(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    losses = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        model = tiny_llama()
        accelerate(model)
        losses.append(train(model, tmp_path / str(len(losses)), collator, **options)[1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_trainer_with_the_flattening_collator(tmp_path: Path) -> None:
    """Packed by Hugging Face's own collator equals padded."""
    losses = []
    for name, flash in (("positions", False), ("flash", True)):
        model = tiny_llama()
        accelerate(model)
        losses.append(train(model, tmp_path / name, DataCollatorWithFlattening(return_flash_attn_kwargs=flash))[1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_trainer_keeps_the_columns_of_a_packed_batch(tmp_path: Path) -> None:
    """`remove_unused_columns` is on: what survives is what the forward's signature names."""
    docs = documents()
    batch = packed(docs)
    shifted = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    rows = torch.nonzero(shifted[0] != -100).flatten().int()
    features = batch | {"shift_labels": shifted, "labels": shifted, "trained_rows": rows, "name": torch.zeros(1)}
    dataset = Dataset.from_dict({key: [value.tolist()] * 2 for key, value in features.items()})
    model = tiny_llama()
    accelerate(model)
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
        ),
        train_dataset=dataset,
        data_collator=lambda features: {key: torch.tensor(value) for key, value in features[0].items()},
    )
    trainer.train()
    assert set(seen[0]) == {*features, "num_items_in_batch"} - {"name"}
    assert float(seen[0]["num_items_in_batch"]) == 2 * int((shifted != -100).sum())


# ---- TRL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["padding_free", "packing", "padded"])
def test_sft_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    """TRL calls the base model and projects by itself: it must get hidden states of documents kept apart."""
    options = {
        "padding_free": {"padding_free": True, "max_length": None},
        "packing": {"packing": True, "max_length": 16},
        "padded": {},
    }[kind]
    losses = []
    for name in ("ours", "stock"):
        model = tiny_llama()
        if name == "ours":
            accelerate(model)
        arguments = options if name == "ours" or kind == "packing" else {}  # stock: padded, where documents are rows
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(tmp_path / name),
                max_steps=2,
                per_device_train_batch_size=3,
                learning_rate=1e-2,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                eos_token="w2",
                **arguments,
            ),
            train_dataset=token_dataset(with_labels=False).remove_columns("attention_mask"),
            processing_class=tokenizer,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ---- PEFT ------------------------------------------------------------------------------------------------------------

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(model: LlamaForCausalLM, **options: Any) -> peft.PeftModel:
    """`model` with adapters that differ from zero."""
    torch.manual_seed(7)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    torch.manual_seed(8)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped


PEFT_KINDS = {
    "every linear": {"target_modules": LINEARS},
    "output layer": {"target_modules": [*LINEARS, "lm_head"]},
    "output layer with dropout": {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.3},
    "dora": {"target_modules": LINEARS, "use_dora": True},
    "output layer trained fully": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "norms trained fully": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("first", ["accelerate", "peft"])
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_lora(kind: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, stock = tiny_llama(), lora(tiny_llama(), **copy.deepcopy(PEFT_KINDS[kind]))
    if first == "accelerate":
        accelerate(ours)
    ours = lora(ours, **copy.deepcopy(PEFT_KINDS[kind]))
    if first == "peft":
        accelerate(ours)
    fused = []
    run = forwards.ops.linear_cross_entropy
    monkeypatch.setattr(forwards.ops, "linear_cross_entropy", lambda *a, **k: (fused.append(True), run(*a, **k))[1])
    dropout = "lora_dropout" in PEFT_KINDS[kind]
    for batch in (padded(documents(), "right"), {"input_ids": torch.randint(1, VOCAB, (2, 9))}):
        results = []
        if "labels" not in batch:
            batch["labels"] = batch["input_ids"]
        clean = batch | {"labels": batch["labels"].masked_fill(batch.get("attention_mask", torch.ones(1)) == 0, -100)}
        if "attention_mask" in batch and dropout:
            continue  # dropout draws other numbers for other layouts
        for model in (ours, stock):
            torch.manual_seed(11)
            results.append(loss_and_gradients(model, **clean))
        if dropout:  # the layers draw over [P, H] where stock draws over [B, T, H]: the same numbers in the same order
            torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
        else:
            assert_same(*results)
    whole_head = "lm_head" not in PEFT_KINDS[kind]["target_modules"]
    assert bool(fused) == whole_head, "a plain output layer takes the loss itself, an adapted one goes by logits"
    with ours.disable_adapter(), stock.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(ours(**clean).loss, stock(**clean).loss, rtol=1e-5, atol=0)
    assert_near(ours.eval()(**clean).logits, stock.eval()(**clean).logits)
    base = ours.get_base_model()
    base.lemur_fast.restore()
    assert not any(isinstance(m.__dict__.get("forward"), Forward) for m in ours.modules())
    assert torch.equal(ours(**clean).logits, stock(**clean).logits)


def test_compiled_with_an_adapter_on_every_layer() -> None:
    """The announcement that logits are held must not break the graph."""
    ours, stock = tiny_llama(), lora(tiny_llama(), target_modules=[*LINEARS, "lm_head"])
    accelerate(ours)
    ours = lora(ours, target_modules=[*LINEARS, "lm_head"])
    ids = torch.randint(1, VOCAB, (2, 9))
    torch.compiler.reset()
    forwards._announced.clear()
    with pytest.warns(UserWarning, match="lm_head has an adapter, a hook"):
        loss = torch.compile(ours, fullgraph=True, backend="aot_eager")(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, stock(input_ids=ids, labels=ids).loss, rtol=1e-5, atol=0)


def test_adapters_of_other_layers_are_called_not_read(tmp_path: Path) -> None:
    """Adapters that are merged, unloaded, saved and loaded keep counting."""
    ours, stock = lora(tiny_llama(), target_modules=LINEARS), lora(tiny_llama(), target_modules=LINEARS)
    accelerate(ours)
    ids = torch.randint(1, VOCAB, (2, 9))
    for model in (ours, stock):
        model.merge_adapter()
    torch.testing.assert_close(ours(ids, labels=ids).loss, stock(ids, labels=ids).loss, rtol=1e-5, atol=0)
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    accelerate(again)
    merged, expected = again.merge_and_unload(), stock.merge_and_unload()
    torch.testing.assert_close(merged(ids, labels=ids).loss, expected(ids, labels=ids).loss, rtol=1e-5, atol=0)


def test_prompt_tuning_and_prefix_tuning() -> None:
    for config in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        results = []
        batch = padded(documents(), "right")
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
        for model in pair():
            torch.manual_seed(4)
            results.append(loss_and_gradients(peft.get_peft_model(model, config), **batch))
        assert_same(*results)


def test_adapter_names_of_a_mixed_batch() -> None:
    """PEFT chooses adapters by row, by hooks on its layers: rows must still be rows there."""
    results = []
    for name in ("ours", "stock"):
        model = lora(tiny_llama(), target_modules=LINEARS)
        model.add_adapter("other", peft.LoraConfig(r=4, target_modules=LINEARS))
        if name == "ours":
            accelerate(model)
        batch = {k: v for k, v in padded(documents(), "right").items() if k != "labels"}
        with torch.no_grad():
            out = model.eval()(**batch, adapter_names=["default", "__base__", "other", "default"], use_cache=False)
        results.append(out.logits[batch["attention_mask"].bool()])
    assert_near(*results)


def test_peft_checkpointing_and_generation() -> None:
    ours, stock = (lora(model, target_modules=LINEARS) for model in pair())
    batch = {"input_ids": torch.randint(1, VOCAB, (2, 9))}
    batch["labels"] = batch["input_ids"]
    expected = loss_and_gradients(stock, **batch)
    for use_reentrant in (False, True):
        ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        ours.enable_input_require_grads()
        assert_same(loss_and_gradients(ours, **batch), expected)
    tokens = [
        model.eval().generate(input_ids=batch["input_ids"], max_new_tokens=5, do_sample=False, eos_token_id=None)
        for model in (ours, stock)
    ]
    assert torch.equal(*tokens)
    assert gradients(ours)
