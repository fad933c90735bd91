"""recipes/prepare_data.py from the command line's point of view, on small folders."""

import errno
import importlib.util
import json
import re
import sys

import pytest
import tyro

from lemur_fast.data import pipeline
from lemur_fast.data.store import TokenStore
from lemur_fast.files import claimed
from tests.recipes.conftest import RECIPES

PROSE = "The lazy dog number {}, which had slept since noon, woke up and looked around for something good to eat.\n"
ITEM = "What is the capital of the country whose flag shows a red disc on a white ground?"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("prepare_data", RECIPES / "prepare_data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare_data"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(recipe, tmp_path):
    (tmp_path / "src").mkdir()
    for index in range(12):
        words = " + ".join(f"x{index}_{i}" for i in range(30))
        (tmp_path / "src" / f"{index}.py").write_text(f"y = (\n    {words.replace('+', chr(10) + '    +')}\n)\n")
    (tmp_path / "src" / "run.sh").write_text("#!/bin/sh\necho hello\n")
    with (tmp_path / "notes.jsonl").open("w") as file:
        for index in range(12):
            print(
                json.dumps({"text": "".join(PROSE.format(100 * index + i) for i in range(3)) + str(index)}), file=file
            )
        print(json.dumps({"text": PROSE.format(1) + ITEM}), file=file)
    (tmp_path / "quiz.txt").write_text(ITEM)

    def go(*arguments, out="corpus"):
        command = ["--code", tmp_path / "src", "--text", tmp_path / "notes.jsonl", "--out", tmp_path / out, *arguments]
        return recipe.prepare_data(tyro.cli(recipe.PrepareData, args=[str(argument) for argument in command]))

    return go


def test_a_corpus_from_folders_and_tables(run, tmp_path, capsys):
    assert run("--decontaminate", tmp_path / "quiz.txt", "--languages", "python", "--near-duplicates", "0.9") == 0
    printed = capsys.readouterr().out
    assert "src (code)" in printed
    assert "1 other language" in printed
    assert "1 contaminated by quiz" in printed
    assert re.search(r"mixture +at code:text = 10:1, [\d,]+ tokens until code begins to repeat", printed)
    store = TokenStore(tmp_path / "corpus")
    assert store.manifest["sources"]["src"]["documents"] == 13
    assert {path.name for path in (tmp_path / "corpus").iterdir()} == {
        *("manifest.json", "summary.html", "documents", "train", "held_out", "tokenizer", "plan.json", ".lock"),
    }
    assert run("--decontaminate", tmp_path / "quiz.txt", "--languages", "python", "--near-duplicates", "0.9") == 0
    assert "is finished already" in capsys.readouterr().out


def test_a_source_of_which_nothing_is_left_is_told(run, tmp_path, capsys):
    (tmp_path / "dry").mkdir()
    (tmp_path / "dry" / "a.md").write_text("Too short.")
    assert run("--text", tmp_path / "notes.jsonl", tmp_path / "dry") == 0
    assert "NOTHING    is left of dry to train on" in capsys.readouterr().out


def test_a_full_disk_is_told_and_the_same_command_continues(run, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "train/00000.arrow")

    with pytest.MonkeyPatch.context() as patch:
        real = pipeline.write_json
        patch.setattr(
            pipeline, "write_json", lambda path, it: full() if "work/tokenize" in str(path) else real(path, it)
        )
        assert run() == 1
    assert re.search(r"No space left on device.*run the same command again to continue", capsys.readouterr().err)
    with pytest.raises(FileNotFoundError):
        TokenStore(tmp_path / "corpus")
    with claimed(tmp_path / "corpus"):
        assert run() == 2
    assert "corpus is in use by process " in capsys.readouterr().err
    monkeypatch.setattr(pipeline.dedup, "band_keys", lambda _: pytest.fail("read again"))
    assert run() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--held-out", "1"], r"held_out must be in \[0, 1\), got 1"),
        (["--text", "/nonexistent"], "there is no file or folder /nonexistent"),
        (["--sources", "/nonexistent.toml"], "/nonexistent.toml cannot be read"),
        (["--decontaminate", "/nonexistent.txt"], "evaluation set /nonexistent.txt cannot be read"),
        (["--languages", "klingon"], "unknown languages .'klingon'"),
        (["--tokenizer", "/nonexistent"], "no tokenizer in /nonexistent"),
        (["--executor", "slurm"], "there is no sbatch on this machine"),
        (["--executor", "ray"], "--executor ray: the package ray is not installed"),
        (["--workers", "-1"], "--workers must not be negative, got -1"),
        (["--text", ""], "--text: takes folders, files and globs, got ''"),
    ],
)
def test_bad_settings_are_refused_by_name(run, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("PATH", "")
    assert run(*arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_that_cannot_be_made_is_refused(run, capsys):
    assert run(out="quiz.txt/corpus") == 2
    assert "run the same command again" not in capsys.readouterr().err


def test_text_given_twice_is_refused(recipe, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--text", "a", "--text", "b"])
    with pytest.raises(SystemExit) as leaving:
        recipe.main()
    assert leaving.value.code == 2
    assert "prepare_data: --text is given 2 times" in capsys.readouterr().err


def test_help_teaches(recipe, capsys):
    with pytest.raises(SystemExit) as leaving:
        tyro.cli(recipe.PrepareData, args=["--help"], description=recipe.__doc__)
    assert leaving.value.code == 0
    printed = capsys.readouterr().out
    for needed in ("--code", "--near-duplicates", "--quality.min-words", "--executor", "[[source]]", "summary.html"):
        assert needed in printed
