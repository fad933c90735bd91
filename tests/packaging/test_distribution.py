"""What wheels, sdists and editable installs hold. Built from a copy of the checkout, as git would clone it."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PROBE = "WHERE = __file__\n"


def run(*command: object, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A clean copy, with one more kernel in it."""
    copy = tmp_path_factory.mktemp("checkout") / "lemur_fast"
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    for name in filter(None, names):
        source, target = ROOT / name, copy / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    (copy / "kernels" / "probe.py").write_text(PROBE)
    return copy


# With no compiler the build leaves the compiled part out, which is quick.
NO_COMPILER = {"CXX": "/nonexistent/c++", "LEMUR_FAST_CUDA": "auto"}


def build(source: Path, kind: str, out: Path) -> Path:
    code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(out)!r})"
    text = run(sys.executable, "-c", code, cwd=source, **NO_COMPILER)
    if kind == "wheel":
        assert "NO C++ COMPILER FOUND" in text
    return next(out.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


def names_in_wheel(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_symlink_is_relative():
    assert os.readlink(ROOT / "lemur_fast" / "kernels") == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's package of that name"


def test_wheel_follows_the_symlink(checkout, tmp_path):
    names = names_in_wheel(build(checkout, "wheel", tmp_path))
    assert {
        "lemur_fast/kernels/probe.py",
        "lemur_fast/kernels/README.md",
        "lemur_fast/py.typed",
        "lemur_fast/_C.pyi",
    } <= names
    top = {name.split("/")[0] for name in names}
    assert len(top) == 2, f"only the package and its metadata belong in there: {top}"
    python = {str(path.relative_to(checkout)) for path in (checkout / "lemur_fast").rglob("*.py")}
    assert python <= names, "a module is missing"


def test_sdist_holds_all_that_a_wheel_needs(checkout, tmp_path):
    with tarfile.open(build(checkout, "sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("lemur_fast-*")
    for pattern in ("csrc/**/*.cpp", "csrc/**/*.h", "csrc/**/*.cu", "cmake/*.cmake"):
        for path in checkout.glob(pattern):
            assert (unpacked / path.relative_to(checkout)).is_file()
    for name in ("CMakeLists.txt", "LICENSE", "README.md"):
        assert (unpacked / name).is_file()
    names = names_in_wheel(build(unpacked, "wheel", tmp_path / "wheel"))
    assert "lemur_fast/kernels/probe.py" in names


def venv_with_our_packages(folder: Path) -> Path:
    """A venv that sees the packages of this one, without the lemur_fast that is installed here."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    return folder / "bin" / "python"


def import_probe(python: Path, cwd: Path, then: str = "") -> list[str]:
    """Where the package and the probe among the kernels were found; then what `then` prints."""
    code = (
        "import lemur_fast, lemur_fast.kernels.probe as probe, runpy;"
        f"print(lemur_fast.__file__); print(probe.WHERE); {then}"
    )
    return run(python, "-c", code, cwd=cwd).splitlines()


def test_wheel_installs_and_imports(checkout, tmp_path):
    wheel = build(checkout, "wheel", tmp_path / "wheel")
    python = venv_with_our_packages(tmp_path / "venv")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=tmp_path)
    lines = import_probe(python, tmp_path, "runpy.run_module('lemur_fast', run_name='__main__')")
    assert all(line.startswith(str(tmp_path / "venv")) for line in lines[:2])
    report = "\n".join(lines)
    assert "RuntimeWarning: lemur_fast: the compiled part is missing: it was not built; install a C++" in report
    assert "lemur_fast ops on" in report


def test_editable_install_imports_from_the_checkout(checkout, tmp_path):
    python = venv_with_our_packages(tmp_path / "venv")
    pip = (sys.executable, "-m", "pip", "--python", python)
    options = ("--no-deps", "--no-build-isolation")
    run(*pip, "install", *options, "--editable", checkout, cwd=tmp_path, **NO_COMPILER)
    # From elsewhere, and from the root, where the working directory comes first.
    for folder in (tmp_path, checkout):
        package, probe, *_ = import_probe(python, folder)
        assert package == str(checkout / "lemur_fast" / "__init__.py")
        assert Path(probe).resolve() == checkout / "kernels" / "probe.py"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LEMUR_FAST_CUDA": "yes"}, "LEMUR_FAST_CUDA is 'yes'; it takes 0, 1, or nothing"),
        ({"LEMUR_FAST_CUDA": "1", "CXX": "/nonexistent/c++"}, "LEMUR_FAST_CUDA=1, but there is no C++ compiler"),
    ],
)
def test_a_wrong_environment_is_named(checkout, tmp_path, environment, message):
    code = f"import setuptools.build_meta as backend; backend.build_wheel({str(tmp_path)!r})"
    with pytest.raises(AssertionError, match=re.escape(message)):
        run(sys.executable, "-c", code, cwd=checkout, **environment)


@pytest.mark.slow
@pytest.mark.parametrize("cuda", ["0", "auto"])
def test_isolated_install_where_torch_is_not(checkout, tmp_path, cuda):
    """``pip install .`` with a compiler, in an environment with nothing in it."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    shutil.rmtree(checkout / "build", ignore_errors=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", checkout, cwd=tmp_path, LEMUR_FAST_CUDA=cuda)
    (module,) = (tmp_path / "venv").glob("lib/python*/site-packages/lemur_fast/_C.*.so")
    code = (
        "import importlib.machinery as m, importlib.util as u;"
        f"spec = u.spec_from_file_location('_C', {str(module)!r}); _C = u.module_from_spec(spec);"
        "spec.loader.exec_module(_C); print(_C.cpu.isa(), _C.build_info()['cuda_missing'])"
    )
    text = run(python, "-c", code, cwd=tmp_path)
    if cuda == "0":
        assert "switched off by LEMUR_FAST_CUDA=0" in text
