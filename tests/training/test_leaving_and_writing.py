"""Files that are whole or not there, models that stock transformers loads, and leaving on a signal."""

import contextlib
import json
import math
import os
import signal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, GenerationConfig

from lemur_fast.data.tokenizer import load_tokenizer
from lemur_fast.files import claimed, staged_file, staged_folder, write_json
from lemur_fast.training.interruption import Interrupted, Interruption
from lemur_fast.training.metrics import MetricsLog, peak_memory_gib, plot_losses
from lemur_fast.training.saving import recorded, run_folder, save_model


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path):
    with contextlib.suppress(KeyError), staged_folder(tmp_path / "a") as staging:
        (staging / "x").write_text("half")
        assert not (tmp_path / "a").exists()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with staged_folder(tmp_path / "a") as staging:
        (staging / "x").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(FileExistsError), staged_folder(tmp_path / "a"):
        pass


def test_a_staged_file_keeps_the_old_one_until_it_is_whole(tmp_path):
    write_json(tmp_path / "a.json", {"old": tmp_path})
    with contextlib.suppress(KeyError), staged_file(tmp_path / "a.json") as staging:
        staging.write_text("half")
        raise KeyError
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": str(tmp_path)}
    assert len(list(tmp_path.iterdir())) == 1


def test_run_folders_are_numbered_and_never_taken_over(tmp_path):
    base = tmp_path / "runs" / "pretrain-tiny"
    names = []
    for _ in range(3):
        folder = run_folder(None, base)
        (folder / "run.json").touch()
        names.append(folder.name)
    assert names == ["pretrain-tiny", "pretrain-tiny-2", "pretrain-tiny-3"]
    with pytest.raises(FileExistsError, match=r"is not empty.*--overwrite"):
        run_folder(base, "unused")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="it is no run, and is left alone"):
        run_folder(tmp_path / "thesis", "unused", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "precious"
    assert run_folder(base, "unused", overwrite=True) == base
    assert list(base.iterdir()) == []


def test_the_latest_run_is_told_by_its_number(tmp_path):
    for name in ("tiny", "tiny-2", "tiny-10", "tiny-exp-20", "tiny2", "tiny-30"):
        (tmp_path / name).mkdir()
        if name != "tiny-30":  # killed before it was a run
            (tmp_path / name / "run.json").touch()
    assert run_folder(None, tmp_path / "tiny", resume=True) == tmp_path / "tiny-10"
    assert run_folder(tmp_path / "tiny2", tmp_path / "tiny", resume=True) == tmp_path / "tiny2"
    assert run_folder(None, tmp_path / "other", resume=True) == tmp_path / "other"


def test_a_run_that_is_refused_leaves_nothing_to_go_on_from(tmp_path):
    def refused(folder, error, made=()):
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(type(error)), claimed(folder), recorded(folder, {"recipe": "x"}):
            for name in ("data", *made):
                (folder / name).mkdir(exist_ok=True)
            raise error
        return folder.exists()

    assert not refused(tmp_path / "typo", FileNotFoundError("--data"))
    assert refused(tmp_path / "trained", ValueError("late"), made=["checkpoints"])
    assert refused(tmp_path / "full disk", OSError("full"))  # its data are gone on with
    assert refused(tmp_path / "full disk", ValueError("--data"))  # by another command


def test_a_folder_is_one_process_s_until_that_is_gone(tmp_path):
    (tmp_path / "run.json").touch()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # holds the folder until it is killed, in the middle of writing
        with claimed(tmp_path), staged_folder(tmp_path / "model"), staged_file(tmp_path / "loss.png") as picture:
            picture.touch()
            os.write(writer, b"x")
            signal.pause()
    os.read(reader, 1)
    with pytest.raises(FileExistsError, match=rf"is in use by process {child} on "), claimed(tmp_path):
        pass
    with pytest.raises(FileExistsError, match=f"is in use by process {child} on "):
        run_folder(tmp_path, "unused", overwrite=True)
    assert len(list(tmp_path.glob(".*partial*"))) == 2
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with claimed(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".lock", "run.json"]
    (tmp_path / "run.json").unlink()
    assert run_folder(tmp_path, "unused") == tmp_path  # the lock alone is nobody's work


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_the_model(make_model, tmp_path, tied):
    model = make_model(tie_word_embeddings=tied).eval()
    generation = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=2)
    save_model(tmp_path / "model", model.config, model.state_dict(), load_tokenizer(), generation)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.dtype == torch.float32
    assert loaded.generation_config.temperature == 0.6
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= set(
        os.listdir(tmp_path / "model")
    )


def test_metrics_are_json_even_when_the_loss_is_not_a_number(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, **{"train/loss": 2.0})
        log.write(2, **{"train/loss": math.nan})
        log.write(3, **{"train/loss": 1.5})
        assert log.series("train/loss") == ([1, 3], [2.0, 1.5])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train/loss"] for line in lines] == [2.0, None, 1.5]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")][::2] == [(1, 2.0), (3, 1.5)]
    plot_losses(tmp_path / "loss.png", log, ["code"], "title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_peak_memory_is_what_the_process_holds():
    before = peak_memory_gib(torch.device("cpu"))
    block = torch.ones(int((before + 1) * 2**28))  # 1 GiB more than the process, which may hold less by now, ever held
    after = peak_memory_gib(torch.device("cpu"))
    del block
    assert before > 0.05
    assert after > before + 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_and_the_second_does_not(signum):
    before = signal.getsignal(signum)
    finished = False
    with Interruption() as interruption:
        with interruption.deferred():
            os.kill(os.getpid(), signum)
            finished = True
        assert finished
        assert interruption.signum == signum
        with pytest.raises(Interrupted, match=signal.Signals(signum).name), interruption.deferred():
            os.kill(os.getpid(), signum)
    assert signal.getsignal(signum) is before


def test_a_scheduler_s_second_sigterm_is_the_same_wish(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    with Interruption() as interruption:
        with interruption.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.signum == signal.SIGTERM


def test_a_signal_outside_deferred_work_is_raised_at_once():
    with Interruption() as interruption:
        assert interruption.signum is None
        with pytest.raises(Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
