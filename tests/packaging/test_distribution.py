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
from elftools.elf.elffile import ELFFile

from lemur_fast import _compiled

ROOT = Path(__file__).parents[2]
PROBE = "WHERE = __file__\n"


def attempt(*command: object, cwd: Path, **environment: str) -> tuple[int, str]:
    """The exit status, and what was printed."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


def run(*command: object, cwd: Path, **environment: str) -> str:
    status, text = attempt(*command, cwd=cwd, **environment)
    assert status == 0, text
    return text


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


# ---- CUDA: nvcc as it should not be ---------------------------------------------------------------------------------


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def build_with(tmp_path: Path, checkout: Path, *, release="13.0", archs="80 86 89 90 100 120", compiles="", **setting):
    """Builds with an nvcc that tells this of itself, up to CMake, and returns what was printed and CMake was told."""
    nvcc = program(
        tmp_path / "nvcc",
        f"""case "$1" in
            --version) echo "Cuda compilation tools, release {release}, V{release}.1";;
            --list-gpu-code) for arch in {archs}; do echo sm_$arch; done;;
            *) {compiles or "true"};;
        esac""",
    )
    (tmp_path / "pybind11.py").write_text("def get_cmake_dir(): return ''\n")
    for name, folder in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
        (tmp_path / f"{name}.py").write_text(f"{folder} = {str(tmp_path)!r}\n")
        program(tmp_path / name, 'printf "told: %s\\n" "$@"; exit 1')
    environment = {"CUDACXX": str(nvcc), "PYTHONPATH": str(tmp_path), "LEMUR_FAST_CUDA_ARCHS": "", **setting}
    status, text = attempt(sys.executable, "setup.py", "build_ext", cwd=checkout, **environment)
    assert status == 1
    assert "Traceback" not in text
    return text, dict(re.findall(r"^told: -DLEMUR_FAST_(\w+)=(.*)$", text, re.MULTILINE))


NOT_THIS_ONE = [
    ({"release": "12.3"}, "is of CUDA 12.3; CUDA 12.4 or newer is needed"),
    ({"release": "9.2"}, "is of CUDA 9.2; CUDA 12.4 or newer is needed"),
    ({"release": "unknown"}, "does not tell its version"),
    ({"archs": "60 70"}, "knows none of the architectures 80, 86, 89, 90, 100, 120"),
    (
        {"compiles": "echo 'In file included from x:' >&2; echo '#error -- unsupported GNU version!' >&2; exit 1"},
        "fails: error -- unsupported GNU version!",
    ),
    ({"compiles": "exit 3"}, "fails: exit status 3"),
    ({"CUDACXX": "/nonexistent/nvcc"}, "CUDACXX is /nonexistent/nvcc, which is no program"),
]


@pytest.mark.parametrize(("nvcc", "message"), NOT_THIS_ONE)
def test_an_nvcc_that_cannot_build_stops_the_build_that_wants_cuda(checkout, tmp_path, nvcc, message):
    text, told = build_with(tmp_path, checkout, **nvcc, LEMUR_FAST_CUDA="1")
    assert re.search(rf"^lemur_fast: LEMUR_FAST_CUDA=1, but .*{re.escape(message)}$", text, re.MULTILINE)
    assert not told, "CMake was not to be called"


@pytest.mark.parametrize(("nvcc", "message"), NOT_THIS_ONE)
def test_an_nvcc_that_cannot_build_is_left_out_otherwise(checkout, tmp_path, nvcc, message):
    text, told = build_with(tmp_path, checkout, **nvcc, LEMUR_FAST_CUDA="auto")
    assert re.search(rf"^lemur_fast: building without CUDA: .*{re.escape(message)}$", text, re.MULTILINE)
    assert told["NVCC"] == told["CUDA_ARCHS"] == ""
    assert told["CUDA_MISSING"].endswith(message)


@pytest.mark.parametrize("cuda", ["1", "auto"])
@pytest.mark.parametrize("archs", ["80;75", "80, 90 75"])
def test_an_unknown_arch_stops_every_build(checkout, tmp_path, cuda, archs):
    text, told = build_with(tmp_path, checkout, LEMUR_FAST_CUDA=cuda, LEMUR_FAST_CUDA_ARCHS=archs)
    assert "lemur_fast: LEMUR_FAST_CUDA_ARCHS: got 75; " in text
    assert "of CUDA 13.0 takes 80, 86, 89, 90, 100, 120\n" in text
    assert not told


@pytest.mark.parametrize(
    ("nvcc", "archs"),
    [
        ({}, "80;86;89;90;100;120"),
        ({"release": "12.4", "archs": "75 80 86 87 89 90"}, "80;86;89;90"),
        ({"LEMUR_FAST_CUDA_ARCHS": "120 90a"}, "120;90a"),
    ],
)
def test_every_arch_of_ours_that_nvcc_knows_is_built(checkout, tmp_path, nvcc, archs):
    _, told = build_with(tmp_path, checkout, **nvcc, LEMUR_FAST_CUDA="1")
    assert told["NVCC"] == str(tmp_path / "nvcc")
    assert (told["CUDA_ARCHS"], told["CUDA_MISSING"]) == (archs, "")


# ---- the compiled part ----------------------------------------------------------------------------------------------

# torch's libraries and the toolkit's; libcuda is the driver's.
NOT_NEEDED = ("libcudart", "libcuda", "libtorch", "libc10", "libpython")


def libraries_needed_by(module: Path) -> list[str]:
    with module.open("rb") as file:
        return [tag.needed for tag in ELFFile(file).get_section_by_name(".dynamic").iter_tags("DT_NEEDED")]


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_the_module_needs_neither_torch_nor_cuda():
    needed = libraries_needed_by(Path(_compiled.C.__file__))
    assert "libc.so.6" in needed
    assert not [name for name in needed if name.startswith(NOT_NEEDED)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="manylinux")
def test_make_wheel_builds_what_runs_without_a_compiler(checkout, tmp_path):
    """The wheel of `make wheel`, installed elsewhere, finds torch's OpenMP, and CUDA code but no driver."""
    shutil.rmtree(checkout / "build", ignore_errors=True)
    binaries = Path(sys.executable).parent
    text = run("make", "--assume-old=.venv/.installed", f"BIN={binaries}", "wheel", cwd=checkout)
    # All that keeps it from older systems is their libc: "linux" alone would mean a library that no policy knows.
    assert re.search(r'constrains\s+the\s+platform\s+tag\s+to\s+"manylinux_2_\d+_', text), text
    (wheel,) = (checkout / "dist").glob("lemur_fast-*-manylinux*.whl")
    assert not [name for name in names_in_wheel(wheel) if "libgomp" in name]
    python = venv_with_our_packages(tmp_path / "venv")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=tmp_path)
    (module,) = (tmp_path / "venv").glob("lib/python*/site-packages/lemur_fast/_C.*.so")
    assert not [name for name in libraries_needed_by(module) if name.startswith(NOT_NEEDED)]
    code = """if True:
        import pathlib, re, torch, lemur_fast as lf
        C, x = lf._compiled.C, torch.randn(3, 5)
        with lf.use_backend("cpu"):
            torch.testing.assert_close(lf.ops.swiglu(x, x), torch.nn.functional.silu(x) * x)
        info = C.build_info()
        print(lf.__file__, info["cuda_archs"], C.cuda.driver_version() if info["cuda"] else info["cuda_missing"])
        print(len(set(re.findall(r"\\S*libgomp\\S*", pathlib.Path("/proc/self/maps").read_text()))), "libgomp")
    """
    text = run(python, "-c", code, cwd=tmp_path)
    assert text.startswith(str(tmp_path / "venv"))
    assert "\n1 libgomp" in text
    assert re.search(r"\['sm_80', .*'compute_\d+'\] \d+$|nvcc was not found", text.splitlines()[0]), text


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
