"""The log of a run that is stopped and goes on, and trackers that are not there."""

import json
import sys
import types

import pytest
import torch

from lemur_fast.training.metrics import Figures, MetricsLog


def test_a_resumed_log_drops_what_comes_again(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step, loss=float(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    with MetricsLog(tmp_path, resumed_at=2) as log:
        log.write(3, loss=30.0)
        assert log.series("loss") == ([1, 2, 3], [1.0, 2.0, 30.0])
        assert log.last("lo") == {"loss": 30.0}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_full_disk_does_not_end_a_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with MetricsLog(tmp_path) as log:
        log.write(1, loss=2.0)
        log.write(2, loss=1.0)
        assert log.series("loss") == ([1, 2], [2.0, 1.0])  # what the run prints and draws at its end
    printed = capsys.readouterr().out
    assert printed.count("metrics.jsonl cannot be written ([Errno 28] No space left on device)") == 1


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_gets_everything(tmp_path, monkeypatch, tracker):
    calls = []
    package = types.ModuleType(tracker)
    package.init = lambda **about: calls.append(about)
    package.log = lambda values, step: calls.append((values, step))
    package.finish = lambda: calls.append("finished")
    monkeypatch.setitem(sys.modules, tracker, package)
    with MetricsLog(tmp_path, tracker=tracker, project="p", name="n", config={"lr": 1}) as log:
        log.write(1, loss=2.0)
    assert calls == [{"project": "p", "name": "n", "config": {"lr": 1}}, ({"loss": 2.0}, 1), "finished"]


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--track wandb: not installed; run `pip install wandb`"):
        MetricsLog(tmp_path, tracker="wandb")


def test_figures_are_those_of_the_moment_they_were_asked_for():
    values = torch.tensor([1.0, 2.0])
    assert Figures(values).read() == [1.0, 2.0]
