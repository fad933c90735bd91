"""The compiled module itself: what it says of itself, the instruction sets, threads, and CUDA without a GPU."""

import os
import platform
import re
import subprocess
import sys

import pytest
import torch

import lemur_fast
from lemur_fast import _compiled

C = _compiled.C


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_build_info_is_of_this_version():
    info = C.build_info()
    assert info["version"] == C.__version__ == lemur_fast.__version__
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    assert "generic" in info["cpu_isas"]
    if platform.machine() in ("x86_64", "AMD64"):
        assert info["cpu_isas"][:3] == ["generic", "avx2", "avx512"]
        # compilers of before 2021 lack the last, and of before 2020 both
        assert info["cpu_isas"][3:] in (["avx512_bf16", "amx"], ["avx512_bf16"], [])


def test_isas_are_those_that_the_cpu_has():
    features = set(C.cpu.features())
    assert ("avx2" in C.cpu.isas()) == ({"avx2", "fma", "f16c"} <= features)
    avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2"} <= features
    assert ("avx512" in C.cpu.isas()) == avx512
    if "avx512_bf16" in C.build_info()["cpu_isas"]:
        assert ("avx512_bf16" in C.cpu.isas()) == (avx512 and "avx512_bf16" in features)
    if "amx" in C.cpu.isas():  # the system may refuse the tiles of a CPU that has them
        assert avx512
        assert {"amx_tile", "amx_bf16"} <= features
    if sys.platform == "linux" and platform.machine() == "x86_64":
        with open("/proc/cpuinfo") as file:
            flags = set(re.search(r"^flags\s*: (.*)$", file.read(), re.MULTILINE)[1].split())
        renamed = {"sse4.2": "sse4_2"}
        assert {renamed.get(name, name) for name in features} <= flags


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="reads Linux's word on x86-64")
def test_products_of_bfloat16_come_first_where_they_have_their_full_rate():
    with open("/proc/cpuinfo") as file:
        cpu = file.read()
    flags = set(re.search(r"^flags\s*: (.*)$", cpu, re.MULTILINE)[1].split())
    made_for_amx = "GenuineIntel" in cpu and "avx512_fp16" in flags
    assert C.cpu.bfloat16_at_full_rate() == ("avx512_bf16" in flags and not made_for_amx)
    isas = C.cpu.isas()
    if "avx512_bf16" in isas:
        assert (isas.index("avx512_bf16") < isas.index("avx512")) == C.cpu.bfloat16_at_full_rate()


def test_the_best_is_chosen_and_the_environment_overrules(monkeypatch):
    monkeypatch.delenv("LEMUR_FAST_CPU", raising=False)
    assert C.cpu.isa() == C.cpu.isas()[0]
    for name in C.cpu.isas():
        monkeypatch.setenv("LEMUR_FAST_CPU", name)
        assert C.cpu.isa() == name
    monkeypatch.setenv("LEMUR_FAST_CPU", "sse9")
    with pytest.raises(ValueError, match=r"LEMUR_FAST_CPU: got 'sse9', .* not an instruction set .* takes .*generic"):
        C.cpu.isa()


def test_a_forced_choice_holds_from_the_start():
    result = run_python("from lemur_fast import _C; print(_C.cpu.isa())", LEMUR_FAST_CPU="generic")
    assert result.stdout.strip() == "generic", result.stderr


def test_one_pool_of_threads_with_torch():
    """Two OpenMP runtimes in a process fight over the cores, and torch.set_num_threads would rule one of them."""
    if C.build_info()["openmp"] is None:
        assert C.cpu.threads() == 1
        return
    if sys.platform == "linux":
        code = (
            "import torch, lemur_fast._C as C; torch.set_num_threads(1); assert C.cpu.threads() == 1;"
            "x = torch.ones(4096, 64); y = torch.empty_like(x); torch.set_num_threads(2); torch.relu(x);"
            "C.cpu.rms_norm_fwd(x.data_ptr(), 64, 0, 0, x.data_ptr(), y.data_ptr(), 0, 0, 4096, 64, 1e-5, 0, 0);"
            "print({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'iomp' in line})"
        )
        result = run_python(code)
        assert result.returncode == 0, result.stderr
        assert len(eval(result.stdout)) == 1, result.stdout
    assert C.cpu.threads() == torch.get_num_threads()


def test_cuda_part_is_there_or_says_why_not():
    info = C.build_info()
    if info["cuda"] is None:
        assert info["cuda_missing"]
        assert info["cuda_archs"] == []
        assert not hasattr(C, "cuda")
        return
    assert info["cuda_missing"] == ""
    assert re.match(r"sm_\d+", info["cuda_archs"][0])
    assert re.match(r"compute_\d+", info["cuda_archs"][-1])
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        assert C.cuda.self_test(0) <= 10 * major + minor
        with pytest.raises(RuntimeError, match=f"device 99 asked for; there are {torch.cuda.device_count()}"):
            C.cuda.self_test(99)
    else:
        with pytest.raises(
            RuntimeError, match=r"CUDA: cudaGetDeviceCount: .* \(cudaError(NoDevice|InsufficientDriver)\)"
        ):
            C.cuda.self_test()


def test_stub_names_what_the_module_has():
    """lemur_fast/_C.pyi is written by hand."""
    import ast
    from pathlib import Path

    tree = ast.parse(Path(lemur_fast.__file__).with_name("_C.pyi").read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            assert hasattr(C, node.name), node.name
        elif isinstance(node, ast.ClassDef) and hasattr(C, node.name):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    function = getattr(getattr(C, node.name), member.name)
                    arguments = [argument.arg for argument in member.args.args]
                    assert re.findall(r"(\w+):", function.__doc__.splitlines()[0]) == arguments, member.name
