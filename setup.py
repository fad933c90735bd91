"""Builds the compiled part, ``lemur_fast._C``, with CMake and Ninja; everything else is in ``pyproject.toml``.

What the environment may say:

- ``LEMUR_FAST_CUDA``: ``0`` leaves CUDA out, ``1`` makes a missing nvcc an error; unset, CUDA is built when nvcc is
  found.
- ``LEMUR_FAST_CUDA_ARCHS``: what to compile for, such as ``80;90`` or ``90a``; unset, every architecture we support
  that nvcc knows.
- ``CXX``, ``CUDACXX``, ``CUDA_HOME``: where the compilers are, as usual.
"""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


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


class CMakeBuild(build_ext):
    """A ``build_ext`` that hands the one extension over to CMake."""

    def build_extension(self, ext: Extension) -> None:
        """Configures, builds, and puts the module where setuptools expects it."""
        cuda = os.environ.get("LEMUR_FAST_CUDA") or "auto"
        if cuda not in ("auto", "0", "1"):
            raise SystemExit(f"lemur_fast: LEMUR_FAST_CUDA is {cuda!r}; it takes 0, 1, or nothing")
        if not has_cxx_compiler():
            if cuda == "1":
                raise SystemExit("lemur_fast: LEMUR_FAST_CUDA=1, but there is no C++ compiler (set CXX)")
            # The package works without its compiled part, slower, and says so whenever it is imported.
            self.warn(
                "lemur_fast: NO C++ COMPILER FOUND: installing without the compiled part lemur_fast._C. "
                "Ops run on plain torch. Install g++ or clang++ (or set CXX) and install again."
            )
            return

        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Kept between builds, so that a changed file recompiles alone. One folder per interpreter.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
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
            f"-DLEMUR_FAST_CUDA={cuda}",
            f"-DLEMUR_FAST_CUDA_ARCHS={os.environ.get('LEMUR_FAST_CUDA_ARCHS', '')}",
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
