"""What the losses ask of labels: which tokens train, and the sum of their losses."""

import pytest
import torch

from lemur_fast._compiled import C
from tests.csrc.raw import Output

IGNORED = -100


def trained_rows(labels_in, **change):
    out = torch.full((labels_in.numel() + 1,), -7)
    arguments = {"labels": labels_in.data_ptr(), "rows": labels_in.numel(), "vocab": 10, "ignore_index": IGNORED}
    count = C.cpu.trained_rows(**arguments | {"out": out.data_ptr()} | change)
    assert (out[count:] == -7).all(), "written past what is counted"
    return out[:count]


@pytest.mark.parametrize("rows", [0, 1, 2, 1000])
def test_trained_rows_are_those_not_ignored_in_order(rows):
    labels = torch.randint(0, 10, (rows,))
    labels[torch.rand(rows) < 0.4] = IGNORED
    assert torch.equal(trained_rows(labels), (labels != IGNORED).nonzero()[:, 0])
    assert trained_rows(torch.full((rows,), IGNORED)).numel() == 0
    assert C.cpu.trained_rows(labels.data_ptr(), rows, 10, IGNORED, 0) == (labels != IGNORED).sum(), "counted alone"


@pytest.mark.parametrize("wrong", [-1, 10, 2**40])
def test_a_label_outside_the_vocabulary_is_named(wrong):
    labels = torch.tensor([IGNORED, 9, wrong, wrong])
    with pytest.raises(ValueError, match=f"labels: got {wrong} at position 2; takes 0 to 9, or ignore_index -100"):
        trained_rows(labels)


@pytest.mark.parametrize("rows", [0, 1, 3, 5000])
@pytest.mark.parametrize("count", [False, True])
def test_sum_or_mean_and_number_of_the_trained(rows, count):
    loss, labels = torch.randint(-9, 9, (rows,)).float(), torch.randint(0, 2, (rows,)) * IGNORED
    total, items = Output((1,), torch.float32), Output((1,), torch.float32)
    C.cpu.sum_losses(
        loss=loss.data_ptr(),
        labels=labels.data_ptr(),
        rows=rows,
        ignore_index=IGNORED,
        total=total.data_ptr(),
        items=items.data_ptr() if count else 0,
    )
    if count:
        trained = max(1, int((labels != IGNORED).sum()))
        assert items.written().item() == trained
        torch.testing.assert_close(total.written()[0], loss.sum() / trained, rtol=1e-7, atol=0)
    else:
        assert total.written().item() == loss.sum().item()
        assert items.written().isnan()


@pytest.mark.parametrize("rows", [0, 1, 300])
@pytest.mark.parametrize("count", [False, True])
def test_one_call_gives_what_cross_entropy_and_the_sum_of_its_losses_give(rows, count):
    logits, labels = torch.randn(rows, 7), torch.randint(0, 7, (rows,))
    labels[torch.rand(rows) < 0.3] = IGNORED
    total, items = Output((1,), torch.float32), Output((1,), torch.float32)
    lse, gradient = Output((rows,), torch.float32), Output((rows, 7), torch.float32)
    nothing = {"log_prob": 0, "entropy": 0, "correct": 0}
    arguments = {"logits": logits.data_ptr(), "logits_stride": 7, "labels": labels.data_ptr(), "rows": rows, "cols": 7}
    arguments |= {"total": total.data_ptr(), "items": items.data_ptr() if count else 0, "lse": lse.data_ptr()}
    arguments |= {"dlogits": gradient.data_ptr(), "ignore_index": IGNORED, "dtype": 0, **nothing}
    C.cpu.cross_entropy_sum(**arguments, label_smoothing=0.0, z_loss=0.0, softcap=0.0)
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, labels, ignore_index=IGNORED, reduction="sum")
    losses.backward()
    torch.testing.assert_close(gradient.written(), exact.grad.float())
    torch.testing.assert_close(lse.written(), logits.logsumexp(1).masked_fill(labels == IGNORED, 0.0))
    trained = max(1, int((labels != IGNORED).sum()))
    expected = losses.detach().float() / (trained if count else 1)
    torch.testing.assert_close(total.written()[0], expected)
    assert not count or items.written().item() == trained
    if rows:
        wrong = torch.full((rows,), 7)
        arguments |= {"labels": wrong.data_ptr(), "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}
        with pytest.raises(ValueError, match="labels: got 7 at position 0"):
            C.cpu.cross_entropy_sum(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": -1}, "rows: got -1"),
        ({"labels": 0}, "labels: got a null pointer"),
        ({"loss": 0}, "loss: got a null pointer"),
        ({"total": 0}, "total: got a null pointer"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    loss, labels, total = torch.ones(2), torch.zeros(2, dtype=torch.int64), torch.empty(1)
    arguments = {"loss": loss.data_ptr(), "labels": labels.data_ptr(), "total": total.data_ptr()}
    arguments |= {"rows": 2, "ignore_index": IGNORED, "items": 0}
    C.cpu.sum_losses(**arguments)
    with pytest.raises(ValueError, match=message):
        C.cpu.sum_losses(**arguments | change)
    if "loss" not in change and "total" not in change:
        with pytest.raises(ValueError, match=message):
            trained_rows(labels, **change)
