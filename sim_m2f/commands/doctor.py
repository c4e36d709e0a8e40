"""Show what is installed, which operator kernels will run, and how to get what is missing.

At its top it imports Python's own library only, so that it runs where any package is missing.
"""

import argparse
import importlib
import importlib.util
import itertools
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from types import ModuleType
from typing import NamedTuple

PROJECT = "sim-m2f"
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml"}  # where the module has another name than the package
DTYPES = ("float32", "float16", "bfloat16", "float64")
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


class Package(NamedTuple):
    """A declared dependency: "timm>=1.0.20", "timm", "1.0.20" and the extra that it belongs to, or ""."""

    requirement: str
    name: str
    least: str
    extra: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments."""


def declared_packages() -> list[Package]:
    """What the installed project says that it needs, the required packages first.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    packages = []
    for line in requires(PROJECT) or []:
        requirement, _, marker = line.partition(";")
        (name,) = re.findall(r"^[\w.-]+", requirement)
        least = "".join(re.findall(r">=\s*([\w.]+)", requirement))
        extra = "".join(re.findall(r"extra == \W([\w-]+)", marker))
        packages.append(Package(requirement.strip(), name, least, extra))
    return sorted(packages, key=lambda package: package.extra)


def state_of(package: Package) -> tuple[str, bool]:
    """Version of a package or what is wrong with it, and whether it can be used; extras are not imported."""
    module = IMPORTED_AS.get(package.name.lower(), package.name.replace("-", "_"))
    try:
        installed = version(package.name)
        if not package.extra:
            importlib.import_module(module)
    except Exception as error:  # what a broken package raises has many classes
        if isinstance(error, ModuleNotFoundError) and error.name in (module, package.name):
            return "is missing", False
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"{installed} cannot be imported ({reason})", False
    if _numbers(installed) < _numbers(package.least):
        return f"{installed} is too old", False
    return installed, True


def _numbers(version: str) -> list[int]:
    """The numbers of a version to compare by; "2.10.0" is "2.10", "2.10+cpu" too."""
    return [int(number) for number in re.findall(r"\d+", re.sub(r"(\.0)*(\+.*)?$", "", version))]


def package_lines() -> tuple[list[str], list[str]]:
    """A line for every required package and one for every extra, and the required ones that cannot be used.

    Raises:
        PackageNotFoundError: the project is not installed, so that nothing says what it needs.
    """
    lines, unusable = [], []
    for extra, packages in itertools.groupby(declared_packages(), key=lambda package: package.extra):
        states = {package: state_of(package) for package in packages}
        lacking = [package for package, (_, usable) in states.items() if not usable]
        texts = [f"{package.name} {text}" for package, (text, _) in states.items()]
        if extra:
            hint = f"; pip install '{PROJECT}[{extra}]'" if lacking else ""
            lines.append(f"extra {extra}: {', '.join(texts)}{hint}")
        else:
            unusable = [package.name for package in lacking]
            hints = [f"; pip install '{p.requirement}'" if p in lacking else "" for p in states]
            lines += [text + hint for text, hint in zip(texts, hints, strict=True)]
    return lines, unusable


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
    import torch

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
    import torch

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
    """Prints the report; 1 where a required package is missing, too old or broken."""
    system = f"{platform.system()} {platform.machine()}"
    print(f"Python {platform.python_version()} on {system} ({sys.executable})")
    try:
        lines, unusable = package_lines()
    except PackageNotFoundError:
        print(f"{PROJECT} is not installed, so nothing says what it needs; pip install .")
        return 1
    print("\n".join(lines))
    if "torch" in unusable:
        print("operator: cannot run without torch")
    elif importlib.util.find_spec("MultiScaleDeformableAttention") is None:
        print("operator: not installed, plain PyTorch everywhere; pip install .")
    else:
        print("\n".join(operator_lines(importlib.import_module("MultiScaleDeformableAttention"))))
    return 1 if unusable else 0
