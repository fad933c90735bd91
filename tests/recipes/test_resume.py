"""Killed at any moment, on any number of processes, resumed: the run that was never stopped."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from lemur_fast.files import claimed
from tests.recipes.conftest import launch, make_store, metrics, run, unless_given

STEPS = 9
COMMON = ("--steps", STEPS, "--checkpoint-every", 3, "--eval-every", 5, "--sample-tokens", 0)


@pytest.fixture(scope="module")
def whole(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped, on one process with one thread."""
    out = tmp_path_factory.mktemp("whole") / "run"
    process = launch(*COMMON, "--out", out, "--data", small_store)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return out


def wait_for(process, folder, lines):
    """Wait until a run has logged so many lines, or has ended."""
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and len(metrics_so_far(folder)) >= lines:
            return
        time.sleep(0.02)
    assert process.poll() is not None, "the run did not get anywhere"


def metrics_so_far(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def trained(folder):
    """What a step is made of: everything that was logged but speed and memory."""
    kept = ("step", "train/", "held_out/", "source/", "data/")
    return [{k: v for k, v in record.items() if k.startswith(kept)} for record in metrics(folder)]


def assert_same_run(folder, whole):
    assert trained(folder) == trained(whole)
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (folder, whole))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value.equal(ours[name]), name


def assert_near(folder, whole):
    """The same batches, and losses and weights equal to float32 rounding."""
    ours, theirs = trained(folder), trained(whole)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert a[name] == (value if name.startswith("data/") else pytest.approx(value, rel=2e-4)), name
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (folder, whole))
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 2e-3 * value.norm(), name


def kill_and_resume(tmp_path, store, whole, times, seed):
    print(f"seed {seed}")  # pytest shows it with a failure
    rng = random.Random(seed)
    folder, killed = tmp_path / "run", 0
    for _ in range(times):
        process = launch(*COMMON, "--out", folder, "--data", store, "--resume", "auto")
        done = len(metrics_so_far(folder)) if (folder / "metrics.jsonl").exists() else 0
        wait_for(process, folder, min(done + rng.randint(1, 6), STEPS))
        time.sleep(rng.random() * 0.2)  # in the middle of whatever it is doing
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    process = launch(*COMMON, "--out", folder, "--data", store, "--resume", "auto")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert killed, "no run was alive to be killed"
    assert_same_run(folder, whole)


def test_killed_at_a_random_step_and_resumed(tmp_path, small_store, whole):
    kill_and_resume(tmp_path, small_store, whole, times=1, seed=time.time_ns() % 1000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_again_and_again(tmp_path, small_store, whole, seed):
    kill_and_resume(tmp_path, small_store, whole, times=3, seed=seed)


def until_step(tmp_path, whole, step):
    """A copy of a run as a kill would have left it when the checkpoint of `step` was its latest."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "model")
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return folder


def test_one_process_goes_on_where_two_were_stopped(pretrain, tmp_path, small_store, whole):
    """Two gloo processes equal one; so do the steps that one takes after them."""
    folder = tmp_path / "run"
    process = launch(*COMMON, "--out", folder, "--data", small_store, "--shard-size", 2, processes=2)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert_near(folder, whole)
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
    assert run(pretrain, *COMMON, "--out", folder, "--data", small_store, "--resume", "auto") == 0
    assert_near(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--shard-size", 2),
        ("--checkpointing", "selective", "--sync-every"),
        ("--shard-size", 1, "--batch-tokens", 1536),
    ],
    ids=["hybrid", "full, checkpointed, reduced after every row", "replicas, rows that do not divide"],
)
def test_four_processes_are_one(tmp_path, small_store, whole, options):
    arguments = (*COMMON, "--data", small_store, *options)
    if "--batch-tokens" in options:
        process = launch(*arguments, "--out", tmp_path / "one")
        assert process.wait(timeout=300) == 0
        whole = tmp_path / "one"
    process = launch(*arguments, "--out", tmp_path / "four", processes=4)
    printed, _ = process.communicate(timeout=500)
    assert process.returncode == 0, printed
    assert_near(tmp_path / "four", whole)


@pytest.mark.slow
def test_compiled_layers_train_alike(tmp_path, small_store, whole):
    process = launch(*COMMON, "--data", small_store, "--out", tmp_path / "run", "--compile")
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert_near(tmp_path / "run", whole)


def test_a_process_that_dies_ends_the_others_and_a_rerun_resumes(pretrain, tmp_path, small_store, whole):
    folder = tmp_path / "run"
    process = launch(*COMMON, "--out", folder, "--data", small_store, processes=2)
    wait_for(process, folder, 5)
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if "RANK" in child.environ()]
    (victim,) = [worker for worker in workers if worker.environ()["RANK"] == "1"]
    os.kill(victim.pid, signal.SIGKILL)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "process 0 of 2 stops: " in printed
    assert "--resume auto" in printed
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert run(pretrain, *COMMON, "--out", folder, "--data", small_store, "--resume", "auto") == 0
    assert_near(folder, whole)


def test_two_processes_stop_together_when_torchrun_is_told_to(pretrain, tmp_path, small_store, whole):
    folder = tmp_path / "run"
    process = launch(*COMMON, "--out", folder, "--data", small_store, processes=2)
    wait_for(process, folder, 4)
    process.terminate()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    stopped = json.loads((folder / "run.json").read_text())
    assert stopped["outcome"] == f"stopped by SIGTERM after step {stopped['steps_done']} of {STEPS}", printed
    assert (folder / "model" / "model.safetensors").exists()
    assert sorted((folder / "checkpoints").iterdir())[-1].name == f"step-{stopped['steps_done']:08d}"
    assert run(pretrain, *COMMON, "--out", folder, "--data", small_store, "--resume", "auto") == 0
    assert_near(folder, whole)


def test_processes_wait_for_the_one_that_saves_and_hear_that_it_could_not(tmp_path, small_store, whole):
    folder = until_step(tmp_path, whole, STEPS)
    (folder / "loss.png").unlink()
    (folder / "loss.png" / "in the way").mkdir(parents=True)
    process = launch(*COMMON, "--out", folder, "--data", small_store, "--resume", "auto", processes=2)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    told = re.findall(r"process (\d) of 2 stops: \[Errno \d+\] .*loss\.png.* with --resume auto", printed)
    assert sorted(told) == ["0", "1"], printed
    assert (folder / "model" / "model.safetensors").exists()


def test_a_damaged_checkpoint_is_passed_over(pretrain, tmp_path, small_store, whole, capsys):
    folder = until_step(tmp_path, whole, STEPS)
    shards = sorted((folder / "checkpoints").glob("*/__0_0.distcp"))
    assert len(shards) == 2
    with shards[-1].open("r+b") as file:
        file.truncate(1000)
    assert run(pretrain, *COMMON, "--out", folder, "--data", small_store, "--resume", "auto") == 0
    printed = capsys.readouterr().out
    assert f"step-{STEPS:08d} is damaged: __0_0.distcp has 1000 bytes" in printed
    assert "resume     after step 6, written by 1 process(es)" in printed
    assert_near(folder, whole)


def test_a_finished_run_has_nothing_left_to_do(pretrain, tmp_path, small_store, whole):
    folder = until_step(tmp_path, whole, STEPS)
    assert run(pretrain, *COMMON, "--out", folder, "--data", small_store, "--resume", "auto") == 0
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--lr", "1e-2"), r"settings are not what they were: --lr was 0\.02, is 0\.01\. .*--resume-changed"),
        (("--steps", 20, "--clip", 2), r"--clip was 1\.0, is 2\.0; --steps was 9, is 20"),
        (("--layers", 3, "--resume-changed"), r"not the run that was stopped: --layers was 2, is 3"),
        (("--mixture", "code", 10, "text", 2, "--resume-changed"), r"--mixture was \{.*1\.0\}, is \{.*2\.0\}"),
    ],
)
def test_another_run_is_not_resumed(pretrain, tmp_path, small_store, whole, capsys, changes, message):
    folder = until_step(tmp_path, whole, STEPS)
    before = (folder / "metrics.jsonl").read_text()
    arguments = (*unless_given(COMMON, changes), "--out", folder, "--data", small_store, "--resume", "auto", *changes)
    assert run(pretrain, *arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert (folder / "metrics.jsonl").read_text() == before


def test_other_documents_are_not_resumed(pretrain, tmp_path, whole, capsys):
    folder = until_step(tmp_path, whole, STEPS)
    make_store(tmp_path / "other", "[f-j]*.py", slice(40, 80))
    assert run(pretrain, *COMMON, "--out", folder, "--data", tmp_path / "other", "--resume", "auto") == 2
    assert "--documents was" in capsys.readouterr().err


def test_two_runs_do_not_share_a_folder(pretrain, tmp_path, small_store, whole, capsys):
    folder = until_step(tmp_path, whole, STEPS)
    with claimed(folder):
        assert run(pretrain, *COMMON, "--out", folder, "--data", small_store, "--resume", "auto") == 2
    assert f"{folder} is in use by process {os.getpid()} on " in capsys.readouterr().err


def test_settings_change_when_that_is_asked_for(pretrain, tmp_path, small_store, whole):
    folder = until_step(tmp_path, whole, STEPS)
    arguments = ("--steps", 11, "--lr", "1e-2", "--resume-changed", "--sample-tokens", 0, "--eval-every", 0)
    assert run(pretrain, *arguments, "--out", folder, "--data", small_store, "--resume", "auto") == 0
    records = [record for record in metrics(folder) if "train/lr" in record]
    assert [record["step"] for record in records] == list(range(1, 12))
    assert records[9]["train/lr"] < 3e-3


def test_the_latest_run_is_the_one_that_goes_on(pretrain, tmp_path, small_store, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ("--data", small_store, "--steps", 1, "--sample-tokens", 0, "--eval-tokens", 256)
    for _ in range(2):
        assert run(pretrain, *arguments) == 0
    capsys.readouterr()
    assert run(pretrain, *arguments, "--resume", "auto") == 0
    printed = capsys.readouterr().out
    assert "run        runs/pretrain-tiny-2\n" in printed
    assert "resume     after step 1" in printed


def test_a_full_disk_in_the_middle_of_a_checkpoint(pretrain, tmp_path, small_store, whole, capsys, monkeypatch):
    """The system refuses to let a file grow; the run goes on, says so, and ends with what it can."""
    import resource

    from lemur_fast.training.checkpoint import _Writer

    real, old = _Writer.write_data, resource.getrlimit(resource.RLIMIT_FSIZE)

    def while_full(self, plan, planner):
        if self.facts["step"] != 6:
            return real(self, plan, planner)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        try:
            return real(self, plan, planner)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    monkeypatch.setattr(_Writer, "write_data", while_full)
    assert run(pretrain, *COMMON, "--keep", 9, "--out", tmp_path / "run", "--data", small_store) == 0
    printed = capsys.readouterr().out
    assert "the checkpoint of step 6 could not be written (" in printed
    assert "the one of step 3 is whole" in printed
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (3, 9)]
    assert_near(tmp_path / "run", whole)
