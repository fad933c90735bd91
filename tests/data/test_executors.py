"""The stages, run in other ways: the store is always the same."""

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from datatrove.executor import LocalPipelineExecutor

from lemur_fast.data import pipeline, sources
from lemur_fast.data.executors import Cluster, Step, build_store, run_local, submit_slurm
from lemur_fast.data.pipeline import STAGES, plan
from lemur_fast.data.sources import Files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """60 files, a fifth of them copies of some kind, in ten parts of two sources."""
    root = tmp_path_factory.mktemp("files")
    for index in range(60):
        words = [f"w{index}x{i}" for i in range(80)]
        if index % 10 == 4:
            words = [f"w{index - 3}x{i}" for i in range(80)]
        elif index % 10 == 7:
            words = [f"w{index - 7}x{i}" for i in range(79)] + ["new"]
        path = root / ("code" if index < 40 else "text") / f"{index:02d}.{'py' if index < 40 else 'md'}"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(words))
    return [Files(kind, kind, "a test", "CC0-1.0", (str(root / kind),), part_bytes=3000) for kind in ("code", "text")]


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def expected(files, tokenizer, lenient, tmp_path_factory):
    """The store that one process makes in one task."""
    folder = tmp_path_factory.mktemp("expected") / "store"
    store = build_store(folder, files, tokenizer, lenient(held_out=0.2), workers=1, tasks=1, progress=False)
    dropped = [entry["dropped"] for entry in store.manifest["sources"].values()]
    assert dropped[0]["exact duplicate"]["documents"] == 4
    assert dropped[0]["near duplicate"]["documents"] == 4
    assert len(list((folder / "train").iterdir())) > 6
    return content(folder)


def begin(folder, files, tokenizer, lenient):
    return plan(folder, files, tokenizer, lenient(held_out=0.2))


def test_several_tasks_and_processes_equal_one(tmp_path, files, tokenizer, lenient, expected):
    corpus = begin(tmp_path / "store", files, tokenizer, lenient)
    run_local(corpus, workers=2, tasks=3, progress=False)
    assert content(tmp_path / "store") == expected


def test_datatrove_s_own_executor_with_several_tasks_equals_one(tmp_path, files, tokenizer, lenient, expected):
    """As on a cluster: nothing of ours but the steps; tasks in an order of their own."""
    corpus = begin(tmp_path / "store", files, tokenizer, lenient)
    for stage in STAGES:
        ranks = (2, 0, 1) if len(stage.sizes(corpus)) > 2 else (0,)
        for rank in ranks:
            LocalPipelineExecutor(
                [Step(corpus, stage, quiet=False)],
                tasks=len(ranks),
                workers=1,
                logging_dir=str(tmp_path / "logs" / stage.name),
                local_tasks=1,
                local_rank_offset=rank,
            ).run()
    assert content(tmp_path / "store") == expected


@pytest.mark.parametrize("stage", ["read", "match", "verify", "tokenize", "finish"])
def test_a_full_disk_is_an_error_and_a_rerun_continues(
    tmp_path, files, tokenizer, lenient, expected, monkeypatch, stage
):
    calls, done = [], []
    works = {each.name: each.work for each in STAGES}

    def full(corpus, piece, advance):
        if piece == max(0, len(each_stage.sizes(corpus)) // 2):
            for writer in ("write_json", "write_text", "staged_file", "staged_folder"):
                patch.setattr(pipeline, writer, no_space)
        calls.append(piece)
        works[stage](corpus, piece, advance)

    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    each_stage = next(each for each in STAGES if each.name == stage)
    corpus = begin(tmp_path / "store", files, tokenizer, lenient)
    with pytest.MonkeyPatch.context() as patch:
        object.__setattr__(each_stage, "work", full)
        try:
            with pytest.raises(OSError, match="No space left on device"):
                run_local(corpus, workers=1, progress=False)
        finally:
            object.__setattr__(each_stage, "work", works[stage])
    assert not (tmp_path / "store" / "manifest.json").exists()

    def counted(corpus, piece, advance):
        done.append(piece)
        works[stage](corpus, piece, advance)

    object.__setattr__(each_stage, "work", counted)
    try:
        run_local(begin(tmp_path / "store", files, tokenizer, lenient), workers=1, progress=False)
    finally:
        object.__setattr__(each_stage, "work", works[stage])
    assert content(tmp_path / "store") == expected
    assert not set(calls[:-1]) & set(done)  # what was done is not done again


def test_killed_at_any_time_a_rerun_gives_the_same_store(tmp_path, files, tokenizer, lenient, expected):
    """SIGKILL, which nothing can tidy up after, in the middle of a stage of a process of its own."""
    folder = tmp_path / "store"
    corpus = begin(folder, files, tokenizer, lenient)
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import time
            from lemur_fast.data import dedup, executors, pipeline
            from lemur_fast.data.filters import Quality
            from lemur_fast.data.sources import Files
            from lemur_fast.data.tokenizer import load_tokenizer

            files = {files!r}
            settings = pipeline.Settings(quality=Quality.off(), held_out=0.2)
            keys = dedup.band_keys
            def slow(texts):
                time.sleep(0.3)
                return keys(texts)
            dedup.band_keys = slow
            executors.run_local(pipeline.plan({str(folder)!r}, files, load_tokenizer(), settings), 1, progress=False)
            """
        )
    )
    environment = os.environ | {"PYTHONPATH": str(Path(sources.__file__).parents[2])}
    process = subprocess.Popen([sys.executable, str(program)], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "work" / "read" / "00001").is_dir():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert children
    assert not psutil.wait_procs(children, timeout=20)[1]  # nobody stays, to write there or to hold a lock
    assert not (folder / "work" / "read" / "00009").exists()
    (folder / "work" / "read" / ".00002.1.partial").mkdir(exist_ok=True)  # whatever it was writing
    run_local(corpus, workers=1, progress=False)
    assert content(folder) == expected


@pytest.mark.slow
def test_slurm_is_given_a_chain_of_jobs_that_make_the_same_store(
    tmp_path, files, tokenizer, lenient, expected, monkeypatch
):
    """A stand-in for sbatch writes down what it is told, and runs the scripts at once."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in {
        "sbatch": f"""#!{sys.executable}
            import os, pathlib, re, subprocess, sys
            log = pathlib.Path({str(tmp_path / "sbatch.log")!r})
            number = len(log.read_text().splitlines()) + 1 if log.exists() else 1
            script = pathlib.Path(sys.argv[-1]).read_text()
            dependency = [a for a in sys.argv if a.startswith("--dependency")]
            with log.open("a") as file:
                print(number, re.search("job-name=(.*)", script)[1], dependency, file=file)
            if "merge_stats" not in script:
                last = int(re.search(r"array=0-(\\d+)", script)[1])
                for task in range(last + 1):
                    env = os.environ | dict(SLURM_ARRAY_TASK_ID=str(task), RUN_OFFSET="0", SLURM_NODELIST="here")
                    subprocess.run(["bash", "-c", script], env=env, check=True, stdout=sys.stderr)
            print("Submitted batch job", number)
            """,
        "srun": '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done; exec "$@"\n',
        "scontrol": "#!/bin/bash\necho here\n",
    }.items():
        path = bin_folder / name
        path.write_text(textwrap.dedent(text).replace("\n            ", "\n"))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(Path(sources.__file__).parents[2]))
    jobs = submit_slurm(begin(tmp_path / "store", files, tokenizer, lenient), Cluster(tasks=2, partition="cpu"))
    assert len(jobs) == len(STAGES)
    finished = content(tmp_path / "store")
    assert {name: data for name, data in finished.items() if not name.startswith(("logs/", "work/"))} == expected
    lines = [line for line in (tmp_path / "sbatch.log").read_text().splitlines() if "afterok" in line]
    assert len(lines) >= len(STAGES) - 1


def test_without_sbatch_slurm_is_refused(tmp_path, files, tokenizer, lenient, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="there is no sbatch on this machine"):
        submit_slurm(begin(tmp_path / "store", files, tokenizer, lenient), Cluster())
