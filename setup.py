"""Builds the compiled part, ``lemur_fast._C``, with CMake and Ninja; everything else is in ``pyproject.toml``.

What the environment may say:

- ``LEMUR_FAST_CUDA``: ``0`` leaves CUDA out, ``1`` makes it an error when CUDA cannot be built; unset, CUDA is built
  when there is an nvcc that can.
- ``LEMUR_FAST_CUDA_ARCHS``: what to compile for, such as ``80;90`` or ``90a``; unset, every architecture we support
  that nvcc knows.
- ``LEMUR_FAST_EMULATE``: ``1`` makes AVX-512 and AMX of AVX2, slowly, for tests on a CPU that lacks them (``make
  test-emulated``).
- ``CXX``, ``CUDACXX``, ``CUDAHOSTCXX``, ``CUDA_HOME``: where the compilers are, as usual.

nvcc is looked at here and not by CMake, whose messages come with its own call stack.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

OLDEST_CUDA = (12, 4)
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
"""What is compiled for, as far as nvcc knows it: 100 and 120 from CUDA 12.8 on. PTX of the newest comes with it."""


def find_tool(name: str, folder_attribute: str) -> str:
    """Path of a build tool: from its PyPI package where that is installed (no PATH needed), else from PATH."""
    try:
        folder = getattr(importlib.import_module(name), folder_attribute)
    except (ImportError, AttributeError):
        folder = ""
    found = shutil.which(name, path=folder) if folder else None
    found = found or shutil.which(name)
    if not found:
        raise SystemExit(f"lemur_fast: {name} is needed to build the compiled part: pip install {name}")
    return found


def has_cxx_compiler() -> bool:
    """Whether a C++ compiler is named by CXX or lies on PATH."""
    named = os.environ.get("CXX", "").split()
    return any(shutil.which(name) for name in (named[:1] or ["c++", "g++", "clang++"]))


class CudaMissingError(Exception):
    """CUDA cannot be built; says why."""


def find_nvcc() -> str:
    """Path of nvcc."""
    named = os.environ.get("CUDACXX")
    if named:
        found = shutil.which(named)
        if not found:
            raise CudaMissingError(f"CUDACXX is {named}, which is no program")
        return found
    homes = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/opt/cuda/bin"]
    found = shutil.which("nvcc", path=os.pathsep.join(places))
    if not found:
        raise CudaMissingError("nvcc was not found (looked at CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)")
    return found


def output_of(*command: str) -> str:
    """What it prints; CudaMissingError with the first line that tells of an error when it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CudaMissingError(f"{command[0]} does not run: {error.strerror}") from None
    if result.returncode:
        lines = (result.stderr + result.stdout).strip().splitlines() or [f"exit status {result.returncode}"]
        line = next((line for line in lines if "error" in line), lines[-1])
        # The text goes on through CMake into a string of C++: nothing that either of them reads as its own.
        raise CudaMissingError(f"{command[0]} fails: {re.sub(r'[^ !%-:<-Z^-~]', '', line)}")
    return result.stdout


def find_cuda() -> tuple[str, list[str]]:
    """Path of an nvcc that compiles here, and the architectures to compile for.

    Raises:
        CudaMissingError: there is none.
        SystemExit: ``LEMUR_FAST_CUDA_ARCHS`` asks for what it does not know.
    """
    nvcc = find_nvcc()
    version = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    if not version:
        raise CudaMissingError(f"{nvcc} does not tell its version")
    if (int(version[1]), int(version[2])) < OLDEST_CUDA:
        raise CudaMissingError(f"{nvcc} is of CUDA {version[1]}.{version[2]}; CUDA 12.4 or newer is needed")
    known = re.findall(r"\bsm_(\d+)\b", output_of(nvcc, "--list-gpu-code"))
    asked = re.findall(r"[^\s,;]+", os.environ.get("LEMUR_FAST_CUDA_ARCHS", ""))
    for arch in asked:
        # nvcc lists 90 and 100, and takes their variants 90a and 100f without listing them.
        variant = re.fullmatch(r"(\d+)([af]?)", arch)
        oldest = {"": 0, "a": 90, "f": 100}
        if not variant or variant[1] not in known or int(variant[1]) < oldest[variant[2]]:
            raise SystemExit(
                f"lemur_fast: LEMUR_FAST_CUDA_ARCHS: got {arch}; "
                f"{nvcc} of CUDA {version[1]}.{version[2]} takes {', '.join(known)}"
            )
    archs = asked or [arch for arch in CUDA_ARCHS if arch in known]
    if not archs:
        raise CudaMissingError(f"{nvcc} knows none of the architectures {', '.join(CUDA_ARCHS)}")
    host = os.environ.get("CUDAHOSTCXX")
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cu")
        probe.write_text("__global__ void probe() {}\n")
        output_of(nvcc, *(("-ccbin", host) if host else ()), "-c", str(probe), "-o", f"{folder}/probe.o")
    return nvcc, archs


class CMakeBuild(build_ext):
    """A ``build_ext`` that hands the one extension over to CMake."""

    def build_extension(self, ext: Extension) -> None:
        """Configures, builds, and puts the module where setuptools expects it."""
        cuda = os.environ.get("LEMUR_FAST_CUDA") or "auto"
        if cuda not in ("auto", "0", "1"):
            raise SystemExit(f"lemur_fast: LEMUR_FAST_CUDA is {cuda!r}; it takes 0, 1, or nothing")
        emulate = os.environ.get("LEMUR_FAST_EMULATE") or "0"
        if emulate not in ("0", "1"):
            raise SystemExit(f"lemur_fast: LEMUR_FAST_EMULATE is {emulate!r}; it takes 0, 1, or nothing")
        if not has_cxx_compiler():
            if cuda == "1":
                raise SystemExit("lemur_fast: LEMUR_FAST_CUDA=1, but there is no C++ compiler (set CXX)")
            # The package works without its compiled part, slower, and says so whenever it is imported.
            self.warn(
                "lemur_fast: NO C++ COMPILER FOUND: installing without the compiled part lemur_fast._C. "
                "Ops run on plain torch. Install g++ or clang++ (or set CXX) and install again."
            )
            return
        nvcc, archs, missing = "", [], ""
        try:
            if cuda == "0":
                raise CudaMissingError("switched off by LEMUR_FAST_CUDA=0")
            nvcc, archs = find_cuda()
        except CudaMissingError as error:
            if cuda == "1":
                raise SystemExit(f"lemur_fast: LEMUR_FAST_CUDA=1, but {error}") from None
            missing = str(error)
            print(f"lemur_fast: building without CUDA: {missing}", flush=True)

        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Kept between builds, so that a changed file recompiles alone. One folder per interpreter.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{'-emulated' * int(emulate)}"
        # But what another compiler, checkout or build environment left there must not decide anything. (CMake's --fresh
        # would remove the objects too.)
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for folder in build.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(folder)
        cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DLEMUR_FAST_VERSION={self.distribution.get_version()}",
            f"-DLEMUR_FAST_NVCC={nvcc}",
            f"-DLEMUR_FAST_CUDA_ARCHS={';'.join(archs)}",
            f"-DLEMUR_FAST_CUDA_MISSING={missing}",
            f"-DLEMUR_FAST_EMULATE={emulate}",
        ]
        for command in (configure, [cmake, "--build", str(build)]):
            if subprocess.run(command, check=False).returncode != 0:
                raise SystemExit(
                    "lemur_fast: building the compiled part failed; the reason is above (pip shows it with -v). "
                    "If it is CUDA's, LEMUR_FAST_CUDA=0 builds without."
                )
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a running process may have the old one mapped.
        target.unlink(missing_ok=True)
        shutil.copy2(build / target.name, target)


# optional: with no compiler at all there is no file to install (see CMakeBuild). A compiler that fails still fails the
# build.
setup(ext_modules=[Extension("lemur_fast._C", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
