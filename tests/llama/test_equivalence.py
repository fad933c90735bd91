"""Packed, padded and stock runs of one model give the same loss, logits and gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

import lemur_fast as lf
from lemur_fast.llama import accelerate
from lemur_fast.packing import PackedBatch
from tests.llama.tiny import (
    LENGTHS,
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


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch fills what it allocates without values with NaN: an element that nothing writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def ways() -> dict[str, dict[str, Any]]:
    """The ways to say where documents end."""
    batch = packed(documents())
    ids, labels, positions, bounds = (batch[k] for k in ("input_ids", "labels", "position_ids", "cu_seqlens"))
    index = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None].int()
    common = {"input_ids": ids, "labels": labels}
    flash = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds.clone(), "max_length_q": 12, "max_length_k": 12}
    return {
        "cu_seqlens": common | {"cu_seqlens": bounds},
        "cu_seqlens and positions": common | {"cu_seqlens": bounds, "position_ids": positions},
        "cu_seqlens with empty documents": common
        | {"cu_seqlens": torch.cat([bounds[:1], bounds, bounds[-1:], bounds[-1:]])},
        "flash kwargs": common | flash,
        "flash kwargs of DataCollatorWithFlattening": dict(
            DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": d.tolist()} for d in documents()])
        ),
        "restarting positions": common | {"position_ids": positions},
        "restarting positions, no cache": common | {"position_ids": positions, "use_cache": False},
        "seq_idx": common | {"seq_idx": index},
        "what TRL sends": common | flash | {"position_ids": positions, "seq_idx": index, "use_cache": False},
        "PackedBatch": PackedBatch.from_documents(documents()).model_inputs(),
        "PackedBatch with static shapes": PackedBatch.from_documents(documents())
        .padded(tokens=32, documents=9, trained_rows=30)
        .model_inputs(),
        "padded left": padded(documents(), "left"),
        "padded right": padded(documents(), "right"),
        "padded with positions": padded(documents(), "right")
        | {"position_ids": torch.arange(max(LENGTHS)).repeat(len(LENGTHS), 1)},
    }


@pytest.mark.parametrize("way", ways())
def test_every_way_equals_separate_documents(way: str) -> None:
    ours, stock = pair()
    assert_same(loss_and_gradients(ours, **ways()[way]), separate_documents(stock, documents()))


@pytest.mark.parametrize("ops", ["all", ["rms_norm", "rotary", "swiglu", "cross_entropy"], ["attention"], ["rms_norm"]])
@pytest.mark.parametrize("way", ["cu_seqlens", "restarting positions", "padded left"])
def test_any_choice_of_ops_keeps_documents_apart(way: str, ops: Any) -> None:
    ours, stock = tiny_llama(), tiny_llama()
    accelerate(ours, ops=ops)
    assert_same(loss_and_gradients(ours, **ways()[way]), separate_documents(stock, documents()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_that_hold_several_documents_beside_padding(side: str) -> None:
    """A padded row whose positions restart holds more than one document."""
    ours, stock = pair()
    first, second, third, fourth = documents()
    batch = padded([torch.cat([first, second, third]), fourth], side)
    batch["position_ids"] = torch.zeros_like(batch["input_ids"])
    starts = [torch.arange(len(d)) for d in (first, second, third)]
    batch["position_ids"][0] = torch.cat(starts)
    batch["position_ids"][1][batch["attention_mask"][1].bool()] = torch.arange(len(fourth))
    assert_same(loss_and_gradients(ours, **batch), separate_documents(stock, documents()))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["accelerate", "attention alone"])
def test_numbers_of_documents_beside_padding(how: str, side: str) -> None:
    docs = documents((7, 3, 5, 4))
    rows = padded([torch.cat(docs[:2]), torch.cat(docs[2:]), docs[0]], side)
    numbers = torch.zeros_like(rows["input_ids"])
    for row, lengths in zip(numbers, ((7, 3), (5, 4), (7,)), strict=True):
        start = 0 if side == "right" else len(row) - sum(lengths)
        for number, length in enumerate(lengths):
            row[start : start + length] = number
            start += length
    labels = rows["labels"].masked_fill(rows["attention_mask"] == 0, -100)
    labels[:, 1:].masked_fill_(numbers.diff() != 0, -100)
    labels[:, 0] = -100
    if side == "left":  # stock trains on a row's first token
        labels[:, 1:].masked_fill_(rows["attention_mask"].diff() > 0, -100)
    if how == "accelerate":
        model, _ = pair()
    else:
        model = tiny_llama(attn_implementation="lemur_fast")
    batch = rows | {"labels": labels, "seq_idx": numbers, "use_cache": False}
    assert_same(loss_and_gradients(model, **batch), separate_documents(tiny_llama(), [*docs, docs[0]]))


def test_tokens_past_the_last_bound_are_a_tail() -> None:
    ours, stock = pair()
    docs = documents()
    batch = packed(docs)
    tail = torch.full((1, 6), 7)
    batch = {
        "input_ids": torch.cat([batch["input_ids"], tail], 1),
        "labels": torch.cat([batch["labels"], tail], 1),
        "cu_seqlens": batch["cu_seqlens"],
    }
    assert_same(loss_and_gradients(ours, **batch), separate_documents(stock, docs))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4, "head_dim": 32},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=["plain", "tied", "biases", "no GQA", "linear rope", "yarn", "dynamic rope", "llama3 rope"],
)
def test_stock_equals_accelerated(overrides: dict[str, Any]) -> None:
    ours, stock = pair(**overrides)
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        if p.dim() == 1 and not p.any():  # biases start at zero
            torch.nn.init.normal_(q)
            p.data.copy_(q)
    ids = torch.randint(1, VOCAB, (3, 17))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    assert_same(
        loss_and_gradients(ours, input_ids=ids, labels=labels), loss_and_gradients(stock, input_ids=ids, labels=labels)
    )
    for model in (ours, stock):
        model.eval()
    with torch.no_grad():
        expected = stock(ids, labels=labels)
        for use_cache in (None, False, True):
            out = ours(ids, labels=labels, use_cache=use_cache)
            assert_near(out.logits, expected.logits)
            torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=0)


def test_an_output_layer_with_a_bias() -> None:
    stock = tiny_llama()
    stock.lm_head = torch.nn.Linear(64, VOCAB)
    ours = copy.deepcopy(stock)
    accelerate(ours)
    ids = torch.randint(1, VOCAB, (3, 17))
    assert_same(
        loss_and_gradients(ours, input_ids=ids, labels=ids), loss_and_gradients(stock, input_ids=ids, labels=ids)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_good_as_stock(dtype: torch.dtype) -> None:
    """Judged by the error against float64, per tensor over six batches: single elements of a deep model are chance."""
    exact = tiny_llama().to(dtype).double()  # the very weights of the 16-bit models
    stock = copy.deepcopy(exact).to(dtype)
    ours = copy.deepcopy(stock)
    accelerate(ours, return_logits=True)
    squares: dict[str, list[float]] = {}
    for _ in range(6):
        ids = torch.randint(1, VOCAB, (4, 24))
        results = []
        for model in (ours, stock, exact):
            model.zero_grad()
            out = model(input_ids=ids, labels=ids)
            out.loss.backward()
            results.append({"logits": out.logits.detach()} | gradients(model))
        for name, truth in results[2].items():
            pair = [float((result[name].double() - truth).square().sum()) for result in results[:2]]
            squares[name] = [a + b for a, b in zip(squares.get(name, (0.0, 0.0)), pair, strict=True)]
    for name, (error, allowed) in squares.items():
        assert error**0.5 <= 1.05 * allowed**0.5, f"{name}: error {error**0.5:.3g}, stock's {allowed**0.5:.3g}"


def test_the_norms_round_as_hugging_face_does() -> None:
    """Bit for bit, but where a sum in another order moves a tie: without its inner rounding a quarter would differ."""
    ours, stock = pair()
    x = torch.randn(300, 64).bfloat16()
    same = ours.bfloat16().model.norm(x) == stock.bfloat16().model.norm(x)
    assert same.double().mean() > 0.999


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_restarting_positions_beside_a_mask_in_eval(side: str) -> None:
    """Without labels and with the default cache, as a user looks at logits: documents still stay apart."""
    ours, stock = pair()
    ours.eval(), stock.eval()
    docs = documents()
    batch = {name: packed(docs)[name] for name in ("input_ids", "position_ids")}
    pads = 0 if side == "none" else 3
    pad = (pads, 0) if side == "left" else (0, pads)
    mask = torch.nn.functional.pad(torch.ones_like(batch["input_ids"]), pad)
    batch = {name: torch.nn.functional.pad(x, pad, value=1) for name, x in batch.items()}
    logits = ours(**batch, attention_mask=mask).logits[mask.bool()]
    assert_near(logits, torch.cat([stock(input_ids=doc[None]).logits[0] for doc in docs]))
    with pytest.raises(ValueError, match="position_ids: they restart"):
        ours(**batch, attention_mask=mask, use_cache=True)


def test_a_mask_with_positions_that_do_not_restart_keeps_the_cache() -> None:
    """What generate() sends for a prompt padded on the left, without a cache yet."""
    ours, stock = pair()
    ours.eval(), stock.eval()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    ids = torch.randint(1, VOCAB, (2, 6))
    out = ours(input_ids=ids, attention_mask=mask, position_ids=positions)
    assert out.past_key_values.get_seq_length() == 6
    want = stock(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert_near(out.logits[mask.bool()], want[mask.bool()])


def test_training_calls_the_fused_loss_on_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    seen = []
    fused = lf.ops.linear_cross_entropy
    monkeypatch.setattr(lf.ops, "linear_cross_entropy", lambda h, *a, **k: (seen.append(h.shape), fused(h, *a, **k))[1])
    monkeypatch.setattr(lf.ops, "cross_entropy", None)
    batch = packed(documents())
    assert ours(**batch).logits is None
    assert seen == [(25, 64)]


def test_autocast_equals_stock_under_autocast() -> None:
    ours, stock = pair()
    ids = torch.randint(1, VOCAB, (3, 17))
    results = []
    for model in (ours, stock):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        results.append((out.loss.detach(), gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-3, atol=0)
    for name, gradient in results[1][1].items():
        assert results[0][1][name].dtype == gradient.dtype == torch.float32
        close = torch.nn.functional.cosine_similarity(results[0][1][name].flatten(), gradient.flatten(), dim=0)
        assert close > 0.999, name


def test_a_second_backward_gives_the_same_gradients() -> None:
    ours, _ = pair()
    loss = ours(**ways()["cu_seqlens"]).loss
    loss.backward(retain_graph=True)
    first = gradients(ours)
    ours.zero_grad()
    loss.backward()
    for name, gradient in gradients(ours).items():
        assert torch.equal(gradient, first[name]), name


def test_two_runs_give_the_same_bits() -> None:
    ours, _ = pair()
    first, second = (loss_and_gradients(ours, **ways()["cu_seqlens"]) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_inputs_embeds() -> None:
    ours, stock = pair()
    for batch in (packed(documents()), padded(documents(), "left")):
        batch.pop("position_ids", None)
        embeds = stock.model.embed_tokens(batch.pop("input_ids")).detach().requires_grad_()
        ours.zero_grad()
        loss = ours(inputs_embeds=embeds, **batch).loss
        loss.backward()
        torch.testing.assert_close(loss, separate_documents(stock, documents())[0], rtol=1e-5, atol=0)
        if "attention_mask" in batch:
            assert not embeds.grad[batch["attention_mask"] == 0].any(), "padding got a gradient"
        assert embeds.grad.abs().sum() > 0


# ---- labels and loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["cu_seqlens", "flash kwargs", "restarting positions", "seq_idx"])
def test_no_target_crosses_a_document_end(way: str) -> None:
    """Labels that point across an end change nothing, in either way to give labels."""
    ours, stock = pair()
    batch = ways()[way]
    truth = separate_documents(stock, documents())
    labels = batch.pop("labels")
    shifted = torch.cat([labels[:, 1:], labels[:, :1]], 1)  # every token has a target, ends too
    assert_same(loss_and_gradients(ours, **batch, shift_labels=shifted), truth)
    assert_same(loss_and_gradients(ours, **batch, labels=labels), truth)


def test_padding_is_no_target() -> None:
    ours, stock = pair()
    batch = padded(documents(), "right")
    shifted = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=5)
    assert_same(loss_and_gradients(ours, **batch, shift_labels=shifted), separate_documents(stock, documents()))


def test_shift_labels_win_over_labels() -> None:
    ours, stock = pair()
    ids = torch.randint(1, VOCAB, (2, 9))
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    arguments = {"input_ids": ids, "labels": torch.zeros_like(ids), "shift_labels": shifted}
    assert_same(loss_and_gradients(ours, **arguments), loss_and_gradients(stock, **arguments))


@pytest.mark.parametrize("items", [7, 7.0, torch.tensor(7), torch.tensor(7.0)], ids=repr)
def test_num_items_in_batch(items: Any) -> None:
    ours, stock = pair()
    ids = torch.randint(1, VOCAB, (2, 9))
    arguments = {"input_ids": ids, "labels": ids, "num_items_in_batch": items}
    assert_same(loss_and_gradients(ours, **arguments), loss_and_gradients(stock, **arguments))
    for model in (ours, stock):
        model.eval()
    torch.testing.assert_close(ours(**arguments).loss, stock(**arguments).loss, rtol=1e-5, atol=0)


def test_ignore_index() -> None:
    ours, stock = pair()
    ids = torch.randint(1, VOCAB, (2, 9))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, 3)
    arguments = {"input_ids": ids, "labels": labels, "ignore_index": 3}
    assert_same(loss_and_gradients(ours, **arguments), loss_and_gradients(stock, **arguments))


def test_accumulating_by_count_equals_one_batch() -> None:
    ours, _ = pair()
    docs = documents()
    whole = loss_and_gradients(ours, **packed(docs))
    count = sum(len(doc) - 1 for doc in docs)
    ours.zero_grad()
    total = torch.zeros(())
    for doc in docs:
        loss = ours(**packed([doc]), num_items_in_batch=count).loss
        loss.backward()
        total += loss.detach()
    assert_same((total, gradients(ours)), whole)


def test_trained_rows_are_the_only_ones_that_train() -> None:
    ours, _ = pair()
    batch = packed(documents())
    labels = batch.pop("labels")
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    rows = torch.tensor([1, 2, 9, 14, 25, 25, 99], dtype=torch.int32)  # 25 tokens: the last three are padding
    only = torch.full_like(shifted, -100)
    only[:, rows[:4].long()] = shifted[:, rows[:4].long()]
    expected = loss_and_gradients(ours, **batch, shift_labels=only)
    assert_same(loss_and_gradients(ours, **batch, shift_labels=shifted, trained_rows=rows), expected)
    ours.eval()
    torch.testing.assert_close(ours(**batch, shift_labels=shifted, trained_rows=rows).loss, expected[0])


def test_nothing_to_train_on() -> None:
    ours, _ = pair()
    batch = packed(documents())
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = ours(**batch).loss
    loss.backward()
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients(ours).values())


def test_no_tokens_at_all() -> None:
    ours, _ = pair()
    ids = torch.empty(1, 0, dtype=torch.long)
    out = ours(ids, labels=ids, cu_seqlens=torch.tensor([0], dtype=torch.int32))
    out.loss.backward()
    assert out.loss == 0


# ---- outputs ---------------------------------------------------------------------------------------------------------


def test_logits_are_left_out_only_in_training_with_labels() -> None:
    ours, stock = pair()
    ids = torch.randint(1, VOCAB, (2, 9))
    assert ours(ids, labels=ids).logits is None
    assert ours(ids).logits.shape == (2, 9, VOCAB)
    assert ours(ids).loss is None
    assert ours.eval()(ids, labels=ids).logits.shape == (2, 9, VOCAB)
    kept = tiny_llama()
    accelerate(kept, return_logits=True)
    out, expected = kept(ids, labels=ids), stock(ids, labels=ids)
    assert_near(out.logits, expected.logits)
    out.loss.backward()
    expected.loss.backward()
    assert_same((out.loss.detach(), gradients(kept)), (expected.loss.detach(), gradients(stock)))


KEEP: dict[str, tuple[Any, Any]] = {
    "all": (0, lambda logits: logits),
    "last": (1, lambda logits: logits[:, 8:]),
    "last three": (3, lambda logits: logits[:, 6:]),
    "positions": (torch.tensor([1, 4]), lambda logits: logits[:, [1, 4]]),
    "positions by row": (
        torch.tensor([[0, 2], [1, 3]]),
        lambda logits: torch.stack([logits[0, [0, 2]], logits[1, [1, 3]]]),
    ),
    "mask": (torch.arange(18).view(2, 9) % 4 == 1, lambda logits: logits.flatten(0, 1)[1::4]),
}


@pytest.mark.parametrize("which", KEEP)
def test_logits_to_keep(which: str) -> None:
    ours, stock = pair()
    ids = torch.randint(1, VOCAB, (2, 9))
    keep, select = KEEP[which]
    assert_near(ours(ids, logits_to_keep=keep).logits, select(stock(ids).logits))


def test_base_model_returns_hugging_faces_shape_with_zeros_at_padding() -> None:
    """Trainers call the base model directly."""
    ours, stock = pair()
    batch = padded(documents(), "left")
    del batch["labels"]
    mask = batch["attention_mask"].bool()
    hidden = ours.base_model(**batch).last_hidden_state
    expected = stock.base_model(**batch).last_hidden_state
    assert hidden.shape == expected.shape
    assert_near(hidden[mask], expected[mask])
    assert not hidden[~mask].any()
    batch = packed(documents())
    del batch["labels"]
    assert ours.base_model(**batch).last_hidden_state.shape == (1, sum(LENGTHS), 64)


def test_return_dict_false_gives_a_tuple() -> None:
    ours, _ = pair()
    ids = torch.randint(1, VOCAB, (2, 9))
    (loss,) = ours(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, ours(ids, labels=ids).loss)
    (hidden,) = ours.model(ids, return_dict=False)
    assert hidden.shape == (2, 9, 64)


def test_positions_restart_in_every_document() -> None:
    """Seen from inside: rotary embeddings only know distances, so the loss does not tell where positions start."""
    bounds = torch.tensor([0, 0, 3, 4, 4, 8, 8, 8], dtype=torch.int32)
    want = [0, 1, 2, 0, 0, 1, 2, 3, 0, 1]  # and those of the tail
    ours, _ = pair()
    seen: list[torch.Tensor] = []
    rotary_emb = ours.model.rotary_emb
    rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    ours(input_ids=torch.randint(1, VOCAB, (1, 10)), cu_seqlens=bounds)
    assert [positions.flatten().tolist() for positions in seen] == [want]


@pytest.mark.parametrize("return_logits", [False, True])
def test_statistics_of_every_token_are_recorded(return_logits: bool) -> None:
    """The log-probabilities are those of stock logits, and the loss is the same as without them."""
    stock, docs, recorded = tiny_llama(), documents(), []
    ours = copy.deepcopy(stock)
    accelerate(ours, return_logits=return_logits)
    batch = PackedBatch.from_documents(docs)
    loss = ours(**batch.model_inputs(), record_stats=recorded.append).loss
    assert torch.equal(loss, ours(**batch.model_inputs()).loss)
    (stats,) = recorded
    expected = []
    for doc in docs:
        log_probs = stock(doc[None]).logits[0].log_softmax(-1).detach()
        expected += [*(float(log_probs[i, doc[i + 1]]) for i in range(len(doc) - 1)), 0.0]
    assert_near(stats.log_prob, torch.tensor(expected))
    torch.testing.assert_close(loss, -stats.log_prob.sum() / batch.num_items)


def test_statistics_need_labels_and_a_loss_of_ours() -> None:
    ours = tiny_llama()
    with accelerate(ours), pytest.raises(ValueError, match="record_stats: got a value without labels"):
        ours(documents()[0][None], record_stats=print)
    with (
        accelerate(ours, ops=["attention"]),
        pytest.raises(ValueError, match="record_stats: the losses of lemur_fast give statistics; ops leaves out both"),
    ):
        ours(documents()[0][None], labels=documents()[0][None], record_stats=print)
