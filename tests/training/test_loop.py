"""A step of the loop: it waits for nothing, and its figures are those of the tokens."""

import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lemur_fast as lf
from lemur_fast.packing import PackedBatch
from lemur_fast.training import loop
from lemur_fast.training.activations import checkpoint_activations
from lemur_fast.training.distributed import shard
from lemur_fast.training.guard import Guard
from lemur_fast.training.loop import StepFacts, Telemetry, train_step
from lemur_fast.training.metrics import MetricsLog
from lemur_fast.training.optimizer import adamw, clip_gradients


class Waits(TorchDispatchMode):
    """Operators whose result the host needs: Python values, and shapes that hang on values."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def parts(make_model, documents, world):
    def make(mode="none", spike=10.0):
        model = make_model()
        lf.accelerate(model)
        checkpoint_activations(model, mode)
        shard(model, list(model.model.layers), world.mesh, torch.float32)
        guard = Guard.new(adamw(model, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1), spike, world.device)
        groups = [[0, 1, 2], [3, 4], [5, 6, 7]]  # documents of each micro-batch; the source is the document modulo 2
        batches = [PackedBatch.from_documents([documents[i] for i in group], pad_to=50) for group in groups]
        tags = []
        for group in groups:
            tag = torch.cat([torch.full((len(documents[i]),), i % 2) for i in group])
            tags.append(torch.nn.functional.pad(tag, (0, 50 - len(tag))))
        items = sum(int(batch.num_items) for batch in batches)  # counted before they go to the device
        return model, guard, batches, tags, items

    return make


def figures(parts, world):
    model, guard, batches, tags, items = parts
    return train_step(model, guard, batches, tags, world, num_items=items, num_sources=2, clip=0.5)


def test_figures_are_those_of_the_tokens_of_each_source(make_model, documents, parts, world):
    stock, sums, counts = make_model(), [0.0, 0.0], [0, 0]
    for index, document in enumerate(documents):
        ids = torch.from_numpy(document)[None]
        loss = torch.nn.functional.cross_entropy(stock(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        loss.backward()
        sums[index % 2] += loss.item()
        counts[index % 2] += len(document) - 1
    squares = sum(float(p.grad.double().square().sum()) for p in stock.parameters())
    found = figures(parts(), world).read()
    loss, norm, verdict, refused = found[:4]
    assert loss == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert norm == pytest.approx(squares**0.5 / sum(counts), rel=1e-5)
    assert (verdict, refused) == (0, 0)
    assert found[4:6] == pytest.approx(sums, rel=1e-5)
    assert found[6:] == counts


@pytest.mark.parametrize("mode", ["none", "full"])
def test_a_step_never_waits_for_the_device(parts, world, mode, monkeypatch):
    made = parts(mode)
    monkeypatch.setattr(PackedBatch, "to", lambda batch, *args, **options: batch)  # checks cu_seqlens, on a CPU alone
    figures(made, world)  # the first one builds what the optimizer and FSDP2 keep
    with Waits() as waits:
        copied = figures(made, world)
    assert waits.names == []
    with Waits() as waits:
        torch.ones(()).item()
    assert waits.names, "this test could not see a wait"
    assert copied.read()[0] > 0


class OnDevice:
    """Figures that a device has ready at some time."""

    def __init__(self, clock, ready):
        self.clock, self.ready = clock, ready

    def there(self):
        return self.clock.now >= self.ready

    def read(self):
        self.clock.now = max(self.clock.now, self.ready)
        return [2.0, 1.0, 0.0, 0.0, 2.0 * 49, 49.0]


@pytest.mark.parametrize(
    ("queueing", "computing", "expected"),
    [(1.0, 4.0, [4.0, 4.0, 4.0]), (1.0, 0.5, [1.0, 1.0, 1.0]), (1.0, 1.5, [1.0, 1.0, 2.5])],
    ids=["the device is behind", "the host is behind", "the device is a little behind"],
)
def test_the_time_of_steps_that_overlap_is_counted_once(
    make_model, world, tmp_path, monkeypatch, queueing, computing, expected
):
    clock = types.SimpleNamespace(now=10.0)
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    about = {"peak": 1e12, "source_names": ["a"], "steps": 3, "batch_tokens": 50}
    with MetricsLog(tmp_path) as log, Telemetry(log, world, make_model().config, **about) as telemetry:
        free = clock.now  # when the device is
        for step in (1, 2, 3):
            telemetry.begin()
            free = max(free, clock.now) + computing
            clock.now += queueing
            telemetry.queued(StepFacts(step, [50], 49, 0.1, 0.0, list), OnDevice(clock, free))
        telemetry.flush()
    assert telemetry.seconds == sum(expected)
    assert 50 / torch.tensor(log.series("speed/tokens_per_s")[1]) == pytest.approx(expected)


@pytest.mark.parametrize("longest", [1e-3, 1e3])
def test_clipping_is_torch_s(make_model, documents, mesh, longest):
    """And its norm does not lose the small numbers of a large matrix."""
    model = make_model()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    norm = clip_gradients(model.parameters(), longest)
    exact = sum(gradient.double().square().sum() for gradient in expected).sqrt()
    torch.testing.assert_close(norm, exact.float())
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * min(1.0, longest / float(exact)), rtol=1e-5, atol=0)
    wide = torch.nn.Parameter(torch.zeros(20000, 500))
    wide.grad = torch.full_like(wide, 1e-3)
    assert float(clip_gradients([wide], 1e9)) == pytest.approx(1e-3 * 1e7**0.5, rel=1e-6)
