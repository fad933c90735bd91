"""Checkpoints: what they hold, what they survive, and what they refuse."""

import contextlib
import json
import pickle
import resource
import shutil

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

import lemur_fast as lf
from lemur_fast.packing import PackedBatch
from lemur_fast.training import checkpoint
from lemur_fast.training.checkpoint import Checkpoints, TrainingState, check_same_run, damage, differences
from lemur_fast.training.distributed import full_state_dict, shard
from lemur_fast.training.guard import Guard
from lemur_fast.training.optimizer import adamw, clip_gradients
from lemur_fast.training.step import accumulate


class Data:
    """Batches that depend on the position, and on the random numbers of the process."""

    position = 0

    def state(self):
        return {"position": self.position}

    def load_state(self, state):
        self.position = state["position"]

    def __next__(self):
        self.position += 1
        generator = torch.Generator().manual_seed(self.position)
        ids = torch.randint(0, 96, (30,), generator=generator)
        ids[:5] = torch.randint(0, 96, (5,))  # what RNG that is not restored would change
        return PackedBatch.from_documents([ids[:11], ids[11:]])


class Run:
    """A small training run, to be stopped and made anew."""

    def __init__(self, make_model, world, folder, *, keep=2, lr=1e-2, steps=20, **model):
        self.model = make_model(**model)
        torch.manual_seed(7)
        lf.accelerate(self.model)
        shard(self.model, list(self.model.model.layers), world.mesh, torch.bfloat16)
        optimizer = adamw(self.model, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
            optimizer, num_warmup_steps=3, num_training_steps=steps, min_lr_rate=0.1
        )
        self.world, self.done, self.losses = world, 0, {}
        self.state = TrainingState(self.model, optimizer, schedule, Guard.new(optimizer, 10, world.device), Data())
        self.checkpoints = Checkpoints(folder, world, keep)

    def train(self, until):
        while self.done < until:
            loss = accumulate(self.model, [next(self.state.data) for _ in range(2)])
            norm = clip_gradients(self.model.parameters(), 1.0)
            rate = self.state.schedule.get_last_lr()[0]
            self.state.guard.step(loss, norm)
            self.state.optimizer.zero_grad()
            self.state.schedule.step()
            self.done += 1
            self.losses[self.done] = (loss.item(), norm.item(), rate)
        return self

    def save(self, **facts):
        self.checkpoints.save(self.done, self.state, facts)
        self.checkpoints.wait()
        return self.checkpoints.path(self.done)

    def resume(self):
        facts = self.checkpoints.latest()
        self.state.load(self.checkpoints.path(facts["step"]), facts, self.world)
        self.done = facts["step"]
        return facts

    def everything(self):
        states = [s for _, s in sorted(self.state.optimizer.state_dict()["state"].items())]
        tensors = full_state_dict(self.model)
        for index, state in enumerate(states):
            for name, value in state.items():
                tensors[f"{index}.{name}"] = getattr(value, "full_tensor", lambda v=value: v)()
        return {name: value.clone() for name, value in tensors.items()} | {"guard": self.state.guard.state.clone()}


@pytest.fixture
def start(make_model, world, tmp_path):
    return lambda **options: Run(make_model, world, tmp_path / "checkpoints", **options)


@pytest.mark.parametrize("tied", [False, True])
def test_a_resumed_run_is_the_run_bit_for_bit(start, tied):
    whole = start(tie_word_embeddings=tied).train(9)
    stopped = start(tie_word_embeddings=tied).train(4)
    stopped.save()
    stopped.train(6)  # what is lost when it is killed
    resumed = start(tie_word_embeddings=tied, initializer_range=0.1)  # other weights, to be replaced
    assert resumed.resume()["step"] == 4
    resumed.train(9)
    assert resumed.losses == {step: whole.losses[step] for step in range(5, 10)}
    for name, value in whole.everything().items():
        assert torch.equal(resumed.everything()[name], value), name


def test_what_is_saved_is_the_state_at_the_call_however_training_goes_on(start):
    """The copy is made before `save` returns: steps that follow while files are being written do not reach them."""
    run = start().train(3)
    expected = run.everything()
    run.checkpoints.save(3, run.state, {})
    run.train(8)
    run.checkpoints.wait()
    other = start()
    other.resume()
    for name, value in expected.items():
        assert torch.equal(other.everything()[name], value), name
    run.checkpoints.save(8, run.state, {})  # the copy's memory is used again
    run.checkpoints.wait()
    expected = run.everything()
    other.resume()
    for name, value in expected.items():
        assert torch.equal(other.everything()[name], value), name


def test_the_last_k_are_kept(start):
    run = start(keep=2)
    for step in (1, 2, 3, 4):
        run.train(step).save()
    assert run.checkpoints.steps() == [3, 4]
    assert not list(run.checkpoints.folder.glob(".*"))


def truncate(folder):
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])


def flip(folder):
    file = next(folder.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def half_a_state(folder):
    file = folder / "state.json"
    file.write_text(file.read_text()[:40])


DAMAGES = {
    "truncated": (truncate, r"__0_0.distcp has \d+ bytes, not \d+"),
    "a flipped bit": (flip, "__0_0.distcp has other contents than were written"),
    "a missing file": (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
    "half a state.json": (half_a_state, "state.json cannot be read"),
    "no state.json": (lambda folder: (folder / "state.json").unlink(), "state.json cannot be read"),
}


@pytest.mark.parametrize(("break_it", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(start, capsys, break_it, message):
    run = start().train(2)
    run.save()
    expected = run.everything()
    folder = run.train(3).save()
    assert damage(folder) is None
    break_it(folder)
    other = start()
    assert other.resume()["step"] == 2
    printed = capsys.readouterr().out
    assert "step-00000003 is damaged: " in printed
    assert torch.equal(other.everything()["0.exp_avg"], expected["0.exp_avg"])
    import re

    assert re.search(message, printed)
    assert (folder.parent / "step-00000003.damaged").is_dir()
    assert other.train(3).save() == folder  # its place is free again
    assert damage(folder) is None


def test_a_checkpoint_that_was_being_written_does_not_count(start):
    run = start().train(2)
    whole = run.save()
    shutil.copytree(whole, whole.with_name(".step-00000009.partial"))
    assert run.checkpoints.steps() == [2]
    assert start().checkpoints.latest()["step"] == 2


def test_without_a_whole_one_there_is_nothing_to_resume(start):
    run = start()
    assert run.checkpoints.latest() is None
    truncate(run.train(1).save())
    message = r"--resume: no checkpoint in .* is whole; they are set aside as \*\.damaged"
    for _ in range(2):  # the second time they are aside already
        with pytest.raises(ValueError, match=message):
            run.checkpoints.latest()


@contextlib.contextmanager
def full_disk():
    """Files can grow to 64 KiB and no further: the system refuses, as it does when the disk is full.

    No fixture: pytest writes a test's result before it ends the fixtures, perhaps to a file that is larger than that.
    """
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_loses_nothing(start, capsys):
    run = start().train(2)
    run.save()
    with full_disk():
        run.train(3).save()
    printed = capsys.readouterr().out
    assert "the checkpoint of step 3 could not be written (" in printed
    assert "the one of step 2 is whole" in printed
    assert run.checkpoints.failed == 1
    assert [path.name for path in run.checkpoints.folder.iterdir()] == ["step-00000002"]
    run.train(4).save()  # training goes on
    assert run.checkpoints.steps() == [2, 4]
    whole, other = start().train(4), start()
    assert other.resume()["step"] == 4
    assert all(torch.equal(other.everything()[name], value) for name, value in whole.everything().items())


def test_a_failure_is_told_while_training_goes_on(start):
    run = start().train(1)
    with full_disk():
        run.checkpoints.save(1, run.state, {})
        run.checkpoints._writing[2].exception()
    assert "there is none before it" in run.checkpoints.poll()
    assert run.checkpoints.poll() is None


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (pickle.dumps(Evil()), r"does not hold builtins\.print"),
        # What a module of torch's has imported: by a dotted name, and by a plain one.
        (
            b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\tos.getcwd\x93)R.",
            r"does not hold torch\.distributed\.checkpoint\.filesystem\.os\.getcwd",
        ),
        (
            b"ctorch.distributed.checkpoint.filesystem\nFuture\n.",
            r"does not hold torch\.distributed\.checkpoint\.filesystem\.Future",
        ),
    ],
)
def test_a_checkpoint_cannot_run_code(start, capsys, metadata, message):
    run = start().train(1)
    folder = run.save()
    (folder / ".metadata").write_bytes(metadata)
    facts = json.loads((folder / "state.json").read_text())
    with pytest.raises(pickle.UnpicklingError, match=message):
        run.state.load(folder, facts, run.world)
    assert "code ran" not in capsys.readouterr().out


def test_a_checkpoint_holds_tensors_and_nothing_that_torch_would_unpickle(start):
    run = start().train(1)
    folder = run.save()
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["guard"] = BytesStorageMetadata()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    facts = json.loads((folder / "state.json").read_text())
    with pytest.raises(ValueError, match="a checkpoint holds nothing but tensors"):
        run.state.load(folder, facts, run.world)


def test_the_schedule_follows_the_settings_of_the_run_that_goes_on(start):
    start(lr=1e-2, steps=20).train(5).save()
    run = start(lr=2e-2, steps=40)
    run.resume()
    fresh = start(lr=2e-2, steps=40)
    for _ in range(5):
        fresh.state.optimizer.step()
        fresh.state.schedule.step()
    assert run.state.schedule.get_last_lr() == fresh.state.schedule.get_last_lr()
    assert [g["lr"] for g in run.state.optimizer.param_groups] == run.state.schedule.get_last_lr()
    for state in (run.state, fresh.state):
        state.optimizer.step()
        state.schedule.step()
    assert run.state.schedule.get_last_lr() == fresh.state.schedule.get_last_lr()


def test_facts_are_kept(start):
    start().train(1).save(settings={"lr": 0.1 + 0.2, "betas": (0.9, 0.95)}, trained={"code": 3})
    facts = start().checkpoints.latest()
    assert facts["settings"] == {"lr": 0.1 + 0.2, "betas": [0.9, 0.95]}
    assert (facts["trained"], facts["processes"], facts["step"]) == ({"code": 3}, 1, 1)


def test_differences_are_named_and_allowed_only_when_asked_for(tmp_path):
    saved = json.loads(json.dumps({"lr": 1e-3, "betas": (0.9, 0.95), "layers": 2, "out": "a", "gone": 1}))
    now = {"lr": 2e-3, "betas": (0.9, 0.95), "layers": 2, "out": tmp_path, "new": True}
    assert differences(saved, now, {"out"}) == {
        "gone": "was 1, is None",
        "lr": "was 0.001, is 0.002",
        "new": "was None, is True",
    }
    now = {**saved, "lr": 2e-3}
    with pytest.raises(ValueError, match=r"--lr was 0\.001, is 0\.002\. To use these, add --resume-changed"):
        check_same_run(saved, now, (), {"lr"}, allowed=False)
    check_same_run(saved, now, (), {"lr"}, allowed=True)
    with pytest.raises(ValueError, match="not the run that was stopped: --layers was 2, is 3"):
        check_same_run(saved, {**now, "layers": 3}, (), {"lr"}, allowed=True)


def test_checksums_are_of_every_file(start):
    folder = start().train(1).save()
    listed = json.loads((folder / "state.json").read_text())["files"]
    assert listed.keys() == {path.name for path in folder.iterdir()} - {"state.json"}
    assert checkpoint._checksum(folder / ".metadata") == listed[".metadata"][1]
