"""``python -m lemur_fast``, and what is said when the compiled part is missing."""

import importlib
import platform
import warnings

import pytest
import torch

import lemur_fast
from lemur_fast import __main__ as main
from lemur_fast import _compiled
from lemur_fast.ops._products import float32_is_faster


def lines() -> dict[str, str]:
    return dict(line.split("  ", 1) for line in main.report().splitlines())


def value(name: str) -> str:
    return lines()[name].strip() if name in lines() else pytest.fail(f"no line {name!r} in\n{main.report()}")


def test_report_names_versions_and_what_was_chosen():
    assert value("Python").startswith(platform.python_version())
    assert value("torch").split("+")[0] == torch.__version__.split("+")[0]
    assert value("lemur_fast").startswith(f"{lemur_fast.__version__} in ")
    assert value("torch threads") == str(torch.get_num_threads())
    assert value("CPU kernels").startswith(_compiled.C.cpu.isa())
    assert value("CPU features") == " ".join(_compiled.C.cpu.features())
    faster = "float32, which is faster here" if float32_is_faster() else "bfloat16"
    assert value("CPU products") == f"bfloat16 in {faster}"
    info = _compiled.C.build_info()
    archs = ", ".join(info["cuda_archs"])
    assert value("CUDA kernels") == (
        f"CUDA {info['cuda']} for {archs}" if info["cuda"] else f"not built: {info['cuda_missing']}"
    )
    assert "OUT OF DATE" not in main.report()


def test_report_survives_a_wrong_environment(monkeypatch):
    monkeypatch.setenv("LEMUR_FAST_CPU", "sse9")
    assert value("CPU kernels").startswith("LEMUR_FAST_CPU: got 'sse9'")


def test_report_names_a_stale_build(monkeypatch):
    monkeypatch.setattr(lemur_fast, "__version__", "9.9.9")
    assert f"OUT OF DATE: built from {_compiled.C.__version__}" in main.report()


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ([], "No module named 'lemur_fast._C'", "it was not built; run `pip install -e .` in "),
        (["_C.cpython-39-x86_64-linux-gnu.so"], "No module", "it was built for another Python (_C.cpython-39-"),
        (
            [f"_C.cpython-{platform.python_version_tuple()[0]}{platform.python_version_tuple()[1]}-x.so"],
            "libgomp",
            "it does not load (libgomp)",
        ),
    ],
)
def test_why_the_compiled_part_is_missing(files, error, message, tmp_path, monkeypatch):
    folder = tmp_path / "lemur_fast"
    folder.mkdir()
    (tmp_path / "setup.py").touch()
    for name in files:
        (folder / name).touch()

    def refuse(name):
        raise ImportError(error)

    monkeypatch.setattr(_compiled, "_FOLDER", folder)
    monkeypatch.setattr(importlib, "import_module", refuse)
    module, reason = _compiled._import()
    assert module is None
    assert message in f"{reason}; {_compiled._remedy()}"

    monkeypatch.setattr(_compiled, "missing", reason)
    assert value("compiled part") == reason
    with pytest.warns(RuntimeWarning, match="ops run on plain torch and packing in Python"):
        _compiled.warn_if_missing()


def test_no_warning_when_it_is_there():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _compiled.warn_if_missing()
