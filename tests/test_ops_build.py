"""The build of the operator: with and without compilers, its options, the registers of the CUDA kernels."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN_PLAIN = """
import torch, MultiScaleDeformableAttention as msda
print(msda.LOAD_ERROR)
weights = torch.rand(1, 3, 2, 1, 4, requires_grad=True)
output = msda.ms_deform_attn(torch.rand(1, 6, 2, 8), [(2, 3)], None, torch.rand(1, 3, 2, 1, 4, 2), weights)
output.sum().backward()
assert output.shape == (1, 3, 16) and weights.grad.shape == weights.shape
"""


def load_build():
    spec = importlib.util.spec_from_file_location("operator_build", ROOT / "ops" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = load_build()
nvcc = build.find_nvcc()


def install(folder, **environment):
    """Builds the whole package into ``folder`` as pip does; only compilers that are named are in reach."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    variables = {name: os.environ[name] for name in os.environ.keys() - {"CXX", "CUDA_HOME"}}
    variables |= {"PATH": str(tools)} | environment
    command = [sys.executable, "setup.py", "build", "--build-base", str(folder / "build")]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)


@pytest.mark.slow
def test_without_a_compiler_the_package_installs_and_plain_pytorch_serves(tmp_path):
    done = install(tmp_path)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "plain PyTorch serves" in line]
    assert len(said) == 1
    assert "no C++ compiler" in said[0]
    (package,) = (tmp_path / "build").rglob("MultiScaleDeformableAttention")
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    run = subprocess.run(
        [sys.executable, "-c", RUN_PLAIN], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "not compiled" in run.stdout


@pytest.mark.parametrize("wanted", ["cpu", "cuda"])
@pytest.mark.slow
def test_what_is_asked_for_and_cannot_be_built_is_an_error(tmp_path, wanted):
    done = install(tmp_path, SIM_M2F_OPERATOR=wanted)
    assert done.returncode != 0
    assert "not found" in done.stderr or "was found" in done.stderr


@pytest.mark.slow
def test_a_cuda_part_that_does_not_compile_is_an_error(tmp_path):
    """nvcc that fails on every source; the C++ compiler accepts anything."""
    toolkit = tmp_path / "cuda"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\necho 'error: broken kernel' >&2\nexit 2\n")
    (toolkit / "bin" / "nvcc").chmod(0o755)
    environment = {"CUDA_HOME": str(toolkit), "CXX": shutil.which("true"), "TORCH_CUDA_ARCH_LIST": "9.0"}
    done = install(tmp_path, **environment)
    assert done.returncode != 0
    assert "broken kernel" in done.stderr


@pytest.mark.parametrize("cxx", [["g++-12"], ["ccache", "g++-12"], ["/usr/bin/sccache", "g++-12", "-m64"]])
def test_the_host_compiler_of_nvcc_is_no_cache(cxx):
    tools = build.Toolchain(Path("torch"), cxx, "nvcc")
    assert build.nvcc_command(tools, [])[:3] == ["nvcc", "-ccbin", "g++-12"]


def test_architectures(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 10.0+PTX")
    flags, listed = build.cuda_architectures("nvcc")
    assert listed == "8.0 9.0a 10.0+PTX"
    assert flags[1::2] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_100,code=sm_100",
        "arch=compute_100,code=compute_100",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match="Hopper"):
        build.cuda_architectures("nvcc")


@pytest.mark.skipif(nvcc is None, reason="needs nvcc")
def test_default_architectures_end_with_ptx(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    flags, listed = build.cuda_architectures(nvcc)
    assert listed.endswith("+PTX")
    assert flags[-1].rpartition("=")[2].startswith("compute_")


@pytest.mark.skipif(nvcc is None, reason="needs nvcc")
@pytest.mark.slow
def test_cuda_kernels_compile_without_spills(tmp_path):
    """ptxas reports no spilled register and no stack in any kernel; other GPUs: test_benchmark_msda.py."""
    command = [nvcc, "-O3", "-std=c++17", "-arch=sm_90", "-Xptxas", "-v"]
    command += ["-c", str(ROOT / "ops" / "cuda.cu"), "-o", str(tmp_path / "cuda.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    assert len(report) == done.stderr.count("Compiling entry function") > 0
    assert set(report) == {("0", "0", "0")}
