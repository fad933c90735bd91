"""recipes/pretrain.py from end to end, with a model small enough to train in seconds."""

import json
import math
import re
import resource
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemur_fast.data.store import TokenStore
from lemur_fast.training import distributed, loop, weights
from lemur_fast.training.interruption import Interruption
from tests.recipes.conftest import RUN_FILES, launch, metrics, run


@pytest.fixture(scope="module")
def finished(pretrain, tmp_path_factory):
    """The folder of a finished run over the embedded corpus, and the state and logits of its model in memory."""
    out = tmp_path_factory.mktemp("pretrain") / "run"
    seen = {}

    def spy(model):
        seen["state"] = distributed.full_state_dict(model)
        with torch.no_grad():
            seen["logits"] = model.eval()(input_ids=torch.arange(3, 60)[None]).logits
        model.train()
        return seen["state"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "full_state_dict", spy)
        assert run(pretrain, "--out", out, "--steps", 24, "--eval-every", 10) == 0
    return out, seen


@pytest.fixture
def data(finished):
    """The token store of that run."""
    return finished[0] / "data"


def test_a_run_leaves_everything_it_promises(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names == RUN_FILES
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000024"]
    assert {path.name for path in (folder / "model").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    assert (folder / "loss.png").stat().st_size > 10_000
    assert any((folder / "tensorboard").iterdir())
    record = json.loads((folder / "run.json").read_text())
    assert (record["outcome"], record["steps_done"], record["settings"]["seed"]) == ("finished", 24, 0)
    samples = (folder / "samples.txt").read_text()
    assert "def read_json" in samples
    assert "The Python interpreter is" in samples


def test_the_model_learns_on_both_kinds(finished):
    records = metrics(finished[0])
    for kind in ("code", "text"):
        measured = [(r["step"], r[f"held_out/{kind}/loss"]) for r in records if f"held_out/{kind}/loss" in r]
        assert [step for step, _ in measured] == [0, 10, 20, 24]
        assert measured[0][1] == pytest.approx(math.log(32000), abs=0.3)
        assert measured[-1][1] < measured[0][1] - 1.0
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert len(losses) == 24
    assert losses[-1] < losses[0] - 1.5


def test_the_figures_are_real(finished):
    records = [record for record in metrics(finished[0]) if "train/loss" in record]
    for record in records:
        assert 0.5 < record["data/fill"] <= 1
        assert 0.9 < record["data/supervised_share"] < 1
        assert record["speed/supervised_tokens_per_s"] == pytest.approx(
            record["speed/tokens_per_s"] * record["data/supervised_share"]
        )
        assert 0 < record["speed/data_wait_share"] < 1
        assert record["memory/peak_gib"] > 0.1
    tokens = sum(record["data/fill"] * 1024 for record in records)
    assert records[-1]["data/code_tokens"] + records[-1]["data/text_tokens"] == pytest.approx(tokens)
    assert records[-1]["data/text_tokens"] / tokens == pytest.approx(1 / 11, abs=0.01)
    for record in records:
        assert 0 < record["speed/mfu"] < 2  # a busy machine may measure too low a peak
        assert record["train/skipped"] == 0
    by_source = [
        record.get(f"source/{name}/loss")
        for name in ("python-stdlib", "python-docs", "package-readmes")
        for record in records[:8]
    ]
    assert all(loss is None or 5 < loss < 11 for loss in by_source)
    assert sum(loss is not None for loss in by_source) > 8
    rates = [record["train/lr"] for record in records]
    assert rates[:2] == pytest.approx([1e-2, 2e-2])
    assert rates[-1] == pytest.approx(2e-3)


def test_stock_transformers_loads_the_same_model(finished):
    folder, seen = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    assert not hasattr(model, "lemur_fast")
    state = model.state_dict()
    assert state.keys() == seen["state"].keys()
    assert all(torch.equal(state[name], value) for name, value in seen["state"].items())
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 60)[None]).logits
    torch.testing.assert_close(logits, seen["logits"], rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer("import os")["input_ids"][0] == 1
    assert len(tokenizer) == model.config.vocab_size == 32000
    assert not model.config.tie_word_embeddings


def test_the_corpus_is_announced_with_source_and_licence(pretrain, data, tmp_path, capsys):
    assert run(pretrain, "--out", tmp_path / "run", "--data", data, "--steps", 1, "--sample-tokens", 0) == 0
    printed = capsys.readouterr().out
    for needed in ("mistral-common; Apache-2.0", "python-stdlib (code)", "licence: PSF-2.0", "package-readmes (text)"):
        assert needed in printed
    assert re.search(r"mixture +code 90.9% of the tokens, 0\.00 epochs", printed)
    assert "EVERY DOCUMENT" not in printed


def test_repeating_the_data_is_said_aloud(pretrain, tmp_path, tokenizer_and_small_store, capsys, caplog):
    store = tokenizer_and_small_store
    assert run(pretrain, "--out", tmp_path / "run", "--data", store, "--steps", 6, "--sample-tokens", 0) == 0
    printed = capsys.readouterr().out
    tokens = TokenStore(store).train
    code = int(tokens.lengths[tokens.kinds == "code"].sum())
    epochs = 6 * 1024 * 10 / 11 / code
    assert epochs > 1.5
    assert f"code 90.9% of the tokens, {epochs:.2f} epochs; EVERY DOCUMENT IS READ {epochs:.1f} TIMES" in printed
    assert printed.count("WARNING    all of code was read; its epoch 2 begins, documents repeat") == 1
    assert run(pretrain, "--out", tmp_path / "one", "--data", store, "--steps", 1, "--sample-tokens", 0) == 0
    assert "documents repeat" not in capsys.readouterr().out + caplog.text  # though all of it is drawn, ahead


@pytest.fixture
def tokenizer_and_small_store(tmp_path):
    from lemur_fast.data.executors import build_store
    from lemur_fast.data.filters import Quality
    from lemur_fast.data.pipeline import Settings
    from lemur_fast.data.sources import Generated
    from lemur_fast.data.tokenizer import load_tokenizer

    def source(kind, count):
        texts = [
            (str(i), f"{kind} number {i}: " + " ".join(map(str, range(i, i + 12))), "CC0-1.0") for i in range(count)
        ]
        return Generated(kind, kind, "a test", "CC0-1.0", lambda: iter(texts))

    sources = [source("code", 60), source("text", 60)]
    settings = Settings(held_out=0.3, quality=Quality.off(), near_duplicates=0)
    build_store(tmp_path / "store", sources, load_tokenizer(), settings, progress=False)
    return tmp_path / "store"


def test_the_same_seed_gives_the_same_run(pretrain, data, tmp_path):
    losses = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        arguments = ("--out", tmp_path / name, "--data", data, "--steps", 3, "--seed", seed, "--sample-tokens", 0)
        assert run(pretrain, *arguments) == 0
        losses[name] = [record["train/loss"] for record in metrics(tmp_path / name) if "train/loss" in record]
    assert losses["a"] == losses["b"]
    assert losses["a"] != losses["c"]


def test_a_folder_s_model_is_continued(pretrain, finished, data, tmp_path):
    source = finished[0] / "model"
    arguments = ("--model", source, "--data", data, "--steps", 1, "--lr", 1e-9, "--sample-tokens", 0)
    assert run(pretrain, "--out", tmp_path / "run", *arguments) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "run" / "model"))
    assert before.config.to_diff_dict() == after.config.to_diff_dict()
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-7, msg=name)
    end = [r["held_out/code/loss"] for r in metrics(finished[0]) if "held_out/code/loss" in r][-1]
    start = metrics(tmp_path / "run")[0]["held_out/code/loss"]
    assert start == pytest.approx(end, rel=1e-5)


@pytest.fixture
def break_steps(monkeypatch):
    """Makes the loss of some steps NaN, gradients included."""

    def install(broken):
        real, calls = loop.accumulate, []

        def breaks(model, batches, **options):
            calls.append(1)
            loss = real(model, batches, **options)
            if not broken(len(calls)):
                return loss
            for parameter in model.parameters():
                parameter.grad.mul_(math.nan)
            return loss * math.nan

        monkeypatch.setattr(loop, "accumulate", breaks)

    return install


def test_a_step_whose_loss_is_not_a_number_is_not_taken_and_named(pretrain, data, tmp_path, capsys, break_steps):
    break_steps(lambda step: step == 3)
    assert run(pretrain, "--out", tmp_path / "run", "--data", data, "--steps", 5, "--sample-tokens", 0) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["outcome"], record["steps_done"]) == ("finished", 5)
    (skipped,) = record["skipped"]
    assert (skipped["step"], skipped["reason"]) == (3, "loss nan, gradient norm nan: not finite")
    assert re.match(r"(python|package)-\S+/\S+", skipped["documents"][0])
    printed = capsys.readouterr().out
    assert "step     3  NOT TAKEN (loss nan, gradient norm nan: not finite); read from" in printed
    assert skipped["documents"][0] in printed
    steps = [record for record in metrics(tmp_path / "run") if "train/loss" in record]
    assert [record["train/skipped"] for record in steps] == [0, 0, 1, 0, 0]
    assert [record["train/skipped_in_all"] for record in steps] == [0, 0, 1, 1, 1]
    assert [record["train/loss"] is None for record in steps] == [False, False, True, False, False]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_many_such_steps_in_a_row_end_the_run_with_the_model_as_it_was(pretrain, data, tmp_path, capsys, break_steps):
    break_steps(lambda step: step > 2)
    assert run(pretrain, "--out", tmp_path / "run", "--data", data, "--steps", 40, "--eval-every", 0) == 1
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["steps_done"] <= 2 + loop.MAX_REFUSED + 1
    assert re.match(r"stopped after step 1[23]: 1[01] steps in a row could not be taken", record["outcome"])
    assert record["outcome"] in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


REFUSED = {
    "keep": (["--keep", "0"], "--keep must be above 0, got 0"),
    "spike": (["--spike", "-1"], "--spike must not be negative, got -1"),
    "overwrite and resume": (["--overwrite", "--out", "x", "--resume", "auto"], "and no --resume"),
    "tracker": (["--track", "trackio"], r"--track trackio: not installed; run `pip install trackio`"),
    "plan of an unknown device": (["--plan", "--plan-device", "K80"], "no datasheet's peak is known"),
    "steps": (["--steps", "0"], "--steps must be above 0, got 0"),
    "batch too small": (["--batch-tokens", "128"], r"must be a multiple of --seq-len \(256\), got 128"),
    "batch not a multiple": (["--batch-tokens", "1000"], r"must be a multiple of --seq-len \(256\), got 1000"),
    "seq_len": (["--seq-len", "1"], "--seq-len must be at least 2"),
    "lr": (["--lr", "-1"], "--lr must be above 0"),
    "lr that is infinite": (["--lr", "inf"], "--lr must be finite, got inf"),
    "lr that is no number": (["--lr", "nan"], "--lr must be finite, got nan"),
    "betas": (["--betas", "0.9", "1.5"], r"--betas must be in \[0, 1\), got \(0.9, 1.5\)"),
    "seed": (["--seed", str(2**63)], r"--seed must be below 2\^63, got 9223372036854775808"),
    "shard_size": (["--shard-size", "0"], "--shard-size must be above 0, got 0"),
    "negative shard_size": (["--shard-size", "-1"], "--shard-size must be above 0, got -1"),
    "mixture that is infinite": (["--mixture", "code", "inf"], "--mixture: .*they must be finite"),
    "heads": (["--heads", "3"], "a head's size must be an even number"),
    "kv_heads": (["--heads", "4", "--kv-heads", "3"], "--heads a multiple of --kv-heads"),
    "held_out": (["--held-out", "1.0"], r"held_out must be in \[0, 1\), got 1.0"),
    "mixture": (["--mixture", "code", "10", "text", "-1"], r"--mixture: weights must not be negative.*'text': -1.0"),
    "mixture of nothing": (["--mixture", "code", "0", "text", "0"], "--mixture: .*nor all 0"),
    "overwrite without out": (["--overwrite"], "--overwrite needs --out"),
    "data": (["--data", "/nonexistent"], "/nonexistent is not a token store"),
    "model": (["--model", "/nonexistent"], "no tokenizer in /nonexistent"),
    "shape of a model": (
        ["--model", "/nonexistent", "--layers", "3"],
        "--layers is that of the model that is continued",
    ),
    "held_out and data": (["--data", "x", "--held-out", "0.1"], "--held-out and --data: give one of them"),
    "plan of a model that is not here": (["--plan", "--model", "a/b"], "--plan --model a/b: takes a folder"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_settings_are_refused_by_name(pretrain, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(pretrain, *arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.glob("runs/*"))


def test_what_was_refused_is_not_gone_on_with(pretrain, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "pretrain-tiny").mkdir(parents=True)
    finished = tmp_path / "runs" / "pretrain-tiny" / "run.json"
    finished.touch()
    typo = ("--data", data, "--mixture", "prose", 1)
    assert run(pretrain, *typo) == 2
    assert list((tmp_path / "runs").iterdir()) == [finished.parent]
    assert run(pretrain, *typo, "--out", "x") == 2
    assert "asks for 'prose'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("again", [["--data", "a", "--data=b"], ["--held-out", ".1", "--held_out", ".2"]])
def test_an_option_given_twice_is_refused(pretrain, again, capsys):
    with pytest.raises(SystemExit) as leaving:
        pretrain.parse(again)
    assert leaving.value.code == 2
    assert f"{again[0]} is given 2 times; give it once" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written_is_refused_before_any_work(pretrain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "build_store", lambda *a, **k: pytest.fail("tokenized before looking"))
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file" / "run", tmp_path / "file"):
        assert run(pretrain, "--out", out) == 2
        assert str(tmp_path / "file") in capsys.readouterr().err
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("precious")
    assert run(pretrain, "--out", tmp_path / "thesis") == 2
    assert "is not empty" in capsys.readouterr().err


def test_an_empty_corpus_is_refused(pretrain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "embedded_sources", list)
    assert run(pretrain, "--out", tmp_path / "run") == 2
    assert "the corpus is empty" in capsys.readouterr().err


def test_a_vocabulary_that_does_not_fit_is_refused(pretrain, finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0] / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 31000}))
    assert run(pretrain, "--model", folder, "--out", tmp_path / "run") == 2
    assert "the tokenizer has 32000 tokens, the model's vocabulary only 31000" in capsys.readouterr().err
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert run(pretrain, "--model", folder, "--out", tmp_path / "run") == 2
    assert "only LLaMA models are supported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "file", "content", "message"),
    [
        ("--model", "model.safetensors", lambda whole: whole[:-9], "model.safetensors is damaged: "),
        ("--model", "model.safetensors", lambda _: b"garbage!" * 9, "model.safetensors is damaged: "),
        ("--model", "config.json", lambda _: b"{", "config.json' is not a valid JSON file"),
        ("--data", "manifest.json", lambda _: b"{}", "manifest.json is damaged: it has no tokenizer and no sources"),
        ("--data", "manifest.json", lambda _: b"{", "manifest.json is damaged: "),
        ("--data", "train/00000.arrow", lambda whole: whole[: len(whole) // 2], "train/00000.arrow is damaged: "),
        ("--data", "train/00000.arrow", lambda _: b"", "train/00000.arrow is damaged: "),
    ],
)
def test_damaged_files_are_named(pretrain, finished, data, tmp_path, capsys, option, file, content, message):
    given = {"--model": shutil.copytree(finished[0] / "model", tmp_path / "model"), "--data": data}
    if option == "--data":
        given["--data"] = shutil.copytree(data, tmp_path / "data")
    path = given[option] / file
    path.write_bytes(content(path.read_bytes()))
    assert run(pretrain, *(word for pair in given.items() for word in pair), "--out", tmp_path / "run") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full_when_the_model_is_saved_is_told(pretrain, small_store, tmp_path, capsys, monkeypatch):
    """The system refuses to let a file grow; neither safetensors nor tokenizers call that an OSError."""
    real, old = pretrain.save_model, resource.getrlimit(resource.RLIMIT_FSIZE)

    def while_full(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1]))
        try:
            return real(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    monkeypatch.setattr(pretrain, "save_model", while_full)
    arguments = ("--data", small_store, "--steps", 1, "--layers", 1, "--hidden-size", 2, "--heads", 1)
    for room in (100_000, 1_000_000):  # for neither weights nor tokenizer; for the weights
        assert run(pretrain, *arguments, "--out", tmp_path / str(room)) == 1
        assert re.search(
            r"model cannot be written: .*os error 27\S*\. Go on .*--resume auto$", capsys.readouterr().err.strip()
        )


def test_runs_of_a_newcomer_are_numbered(pretrain, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("pretrain-tiny", "pretrain-tiny-2"):
        assert run(pretrain, "--data", data, "--steps", 1, "--sample-tokens", 0) == 0
        assert f"run        runs/{name}\n" in capsys.readouterr().out
        assert (tmp_path / "runs" / name / "model" / "model.safetensors").is_file()


def test_help_teaches(capsys, pretrain):
    with pytest.raises(SystemExit) as leaving:
        pretrain.parse(["--help"])
    assert leaving.value.code == 0
    printed = capsys.readouterr().out
    for flag in (
        "--preset",
        "--out",
        "--steps",
        "--seed",
        "--batch-tokens",
        "--resume",
        "--model",
        "--mixture",
        "--checkpoint-every",
        "--keep",
        "--plan",
        "--profile",
        "--track",
        "--shard-size",
        "--compile",
    ):
        assert flag in printed
    for needed in (
        "python recipes/pretrain.py",
        "Ctrl-C",
        "metrics.jsonl",
        "tiny",
        "smollm2-135m",
        "torchrun --nnodes 8",
    ):
        assert needed in printed


def test_presets_change_defaults_and_flags_win(pretrain):
    assert pretrain.parse([]) == pretrain.Pretrain(mixture={"code": 10.0, "text": 1.0})
    assert pretrain.parse(["--mixture", "stack", "3", "docs", "1"]).mixture == {"stack": 3.0, "docs": 1.0}
    args = pretrain.parse(["--preset", "smollm2-135m", "--lr", "3e-5"])
    assert (args.seq_len, args.lr) == (2048, 3e-5)
    assert pretrain.PRESETS["tiny"].batch_tokens % pretrain.PRESETS["tiny"].seq_len == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(data, tmp_path, signum):
    """In a process of its own, stopped in the middle of training."""
    process = launch("--steps", 100000, "--eval-every", 0, "--out", tmp_path / "run", "--data", data)
    try:
        deadline = time.monotonic() + 120
        while not ((tmp_path / "run" / "metrics.jsonl").exists() and len(metrics(tmp_path / "run")) > 3):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signum)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signum, printed
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert f"stopped by {signum.name} after step {record['steps_done']} of 100000" in printed
    assert record["steps_done"] == metrics(tmp_path / "run")[-1]["step"] >= 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert np.isfinite(model.lm_head.weight.detach().numpy()).all()
    assert (tmp_path / "run" / "loss.png").is_file()
    assert not list((tmp_path / "run").glob("*.partial"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{record['steps_done']:08d}").is_dir()
    assert f"--out {tmp_path / 'run'} --resume auto" in printed


def test_the_recipe_trains_the_accelerated_model(pretrain, data, tmp_path, monkeypatch):
    accelerated = []
    real = weights.accelerate
    monkeypatch.setattr(weights, "accelerate", lambda model: accelerated.append(real(model)))
    assert run(pretrain, "--out", tmp_path / "run", "--data", data, "--steps", 1, "--sample-tokens", 0) == 0
    assert len(accelerated) == 1


def test_presets_are_estimated_without_their_weights(pretrain, capsys):
    for preset, parameters in (("llama2-7b", "6,738,415,616"), ("llama2-70b", "68,976,648,192")):
        with Interruption() as interruption:
            assert pretrain.pretrain(pretrain.parse(["--preset", preset, "--plan"]), interruption) == 0
        printed = capsys.readouterr().out
        assert f"{parameters} parameters" in printed
        assert "This is an estimate" in printed
        assert "DOES NOT FIT" not in printed
    with Interruption() as interruption:
        assert pretrain.pretrain(pretrain.parse(["--preset", "smollm2-135m", "--plan"]), interruption) == 0
    assert "134,515,008 parameters" in capsys.readouterr().out


def test_a_profile_is_a_trace_of_the_steps(pretrain, data, tmp_path):
    arguments = ("--out", tmp_path / "run", "--data", data, "--steps", 4, "--profile", "--sample-tokens", 0)
    assert run(pretrain, *arguments) == 0
    trace = json.loads((tmp_path / "run" / "profile" / "rank-0.json").read_text())
    assert any("lemur_fast::attention" in event.get("name", "") for event in trace["traceEvents"])
