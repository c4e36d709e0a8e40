"""Show what is installed, which operator kernels will run, and how to get what is missing."""

import argparse
import importlib.util
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch

PACKAGES = ("torch", "torchvision", "timm", "scipy", "pycocotools", "accelerate", "fvcore")
DTYPES = ("float32", "float16", "bfloat16", "float64")
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments."""


def package_lines() -> list[str]:
    """Versions of Python and of the packages that the project runs on."""
    system = f"{platform.system()} {platform.machine()}"
    lines = [f"Python {platform.python_version()} on {system} ({sys.executable})"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} is missing: pip install {name}")
    return lines


def runs_on(capability: tuple[int, int], built: str) -> bool:
    """Whether code for the capabilities ``built``, such as "8.0 9.0+PTX", runs on a GPU of ``capability``."""
    for major, minor, suffix, ptx in re.findall(r"(\d+)\.(\d+)([af]?)(\+PTX)?", built):
        code = (int(major), int(minor))
        exact = code == capability if suffix else code[0] == capability[0] and code <= capability
        if exact or (ptx and code <= capability):
            return True
    return False


def gpu_lines(built: str) -> list[str]:
    """The GPUs, and whether the CUDA part, compiled for the capabilities ``built``, serves them."""
    if not torch.cuda.is_available():
        return ["GPU: none that PyTorch can use"]
    lines = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        number = f"{capability[0]}.{capability[1]}"
        name = f"GPU {index}: {torch.cuda.get_device_name(index)}, compute capability {number}"
        if built and not runs_on(capability, built):
            name += f"; the operator was not compiled for it: TORCH_CUDA_ARCH_LIST={number} {REBUILD}"
        lines.append(name)
    return lines


def operator_lines(operator: ModuleType) -> list[str]:
    """What was compiled, and which implementation runs on which device and type."""
    if operator.LOAD_ERROR:
        lines = [f"operator: plain PyTorch everywhere, because {operator.LOAD_ERROR}"]
        lines += [f"  to compile it: install a C++ compiler (and the CUDA toolkit for GPUs), then {REBUILD}"]
        return [*lines, *gpu_lines("")]
    info = torch.ops.msda.build_info()
    lines = [f"operator: compiled, {info}", *gpu_lines(info.partition("CUDA ")[2])]
    for device in ("cpu", "cuda", "mps"):
        compiled = operator.has_kernel(torch.device(device))
        lines.append(f"  {device}: {'compiled' if compiled else 'plain PyTorch'} for {', '.join(DTYPES)}")
    if torch.cuda.is_available() and not operator.has_kernel(torch.device("cuda")):
        lines.append(f"  for the GPU kernels: install the CUDA toolkit (nvcc), then {REBUILD}")
    return lines


def run(args: argparse.Namespace) -> int:
    """Prints the report."""
    print("\n".join(package_lines()))
    if importlib.util.find_spec("MultiScaleDeformableAttention") is None:
        print("operator: not installed, plain PyTorch everywhere; pip install .")
        return 0
    print("\n".join(operator_lines(importlib.import_module("MultiScaleDeformableAttention"))))
    return 0
