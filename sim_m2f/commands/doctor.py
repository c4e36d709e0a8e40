"""Show what is installed, which operator kernels will run, and how to get what is missing.

At its top it imports Python's own library only, so that it runs where any package is missing.
"""

import argparse
import importlib.util
import itertools
import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import NamedTuple

from sim_m2f.errors import first_line

PROJECT = "sim-m2f"
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml"}  # where the module has another name than the package
REQUIREMENT = re.compile(r"([\w.-]+)(?:[^;]*>=\s*([\w.]+))?[^;]*(?:;.*extra == \W([\w-]+))?")
UNKNOWN = "of unknown version (its METADATA is damaged)"
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


class Package(NamedTuple):
    """A declared dependency: "timm>=1.0.20", "timm", "1.0.20" and the extra that it belongs to, or ""."""

    requirement: str  # what pip has to install; for an extra's package "sim-m2f[EXTRA]"
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
        name, least, extra = REQUIREMENT.findall(line)[0]
        requirement = f"{PROJECT}[{extra}]" if extra else line.partition(";")[0].strip()
        packages.append(Package(requirement, name, least, extra))
    return sorted(packages, key=lambda package: package.extra)


def state_of(package: Package) -> tuple[str, bool]:
    """Version of a package or what is wrong with it, and whether it can be used; extras are not imported."""
    module = IMPORTED_AS.get(package.name.lower(), package.name.replace("-", "_"))
    try:
        installed = _installed(package.name)
        if not package.extra:
            importlib.import_module(module)
    except Exception as error:  # what a broken package raises has many classes
        if isinstance(error, ModuleNotFoundError) and error.name in (module, package.name):
            return "is missing", False
        return f"{installed} cannot be imported ({first_line(error)})", False
    if installed == UNKNOWN:
        return installed, False
    usable = _numbers(installed) >= _numbers(package.least)
    return installed if usable else f"{installed} is too old", usable


def _installed(name: str) -> str:
    """The version of a package, ``UNKNOWN`` where what pip wrote of it is damaged.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    try:
        return version(name) or UNKNOWN  # None of an empty file METADATA
    except PackageNotFoundError:
        raise
    except Exception:  # what a damaged one raises has many classes
        return UNKNOWN


def _numbers(version: str) -> list[int]:
    """The numbers of a version to compare by; "2.10.0" is "2.10", "2.10+cpu" too."""
    return [int(number) for number in re.findall(r"\d+", re.sub(r"(\.0)*(\+.*)?$", "", version))]


def print_packages(packages: list[Package]) -> list[str]:
    """Prints a line for every required package and every extra; returns what is required and unusable."""
    unusable = []
    for requirement, group in itertools.groupby(packages, key=lambda package: package.requirement):
        states = {package: state_of(package) for package in group}
        lacking = [package for package, (_, usable) in states.items() if not usable]
        unusable += [package.name for package in lacking if not package.extra]
        extra = "".join({f"extra {package.extra}: " for package in states if package.extra})
        texts = ", ".join(f"{package.name} {text}" for package, (text, _) in states.items())
        print(f"{extra}{texts}" + (f"; pip install '{requirement}'" if lacking else ""))
    return unusable


def runs_on(capability: tuple[int, int], built: str) -> bool:
    """Whether code for the capabilities ``built``, such as "8.0 9.0+PTX", runs on a GPU of ``capability``."""
    for major, minor, suffix, ptx in re.findall(r"(\d+)\.(\d+)([af]?)(\+PTX)?", built):
        code = int(major), int(minor)
        upwards = ptx or (code[0] == capability[0] and not suffix)
        if code == capability or (upwards and code < capability):
            return True
    return False


def operator_lines() -> Iterator[str]:
    """What was compiled, which GPUs it serves, and what runs on which device and type."""
    import torch
    from MultiScaleDeformableAttention import LOAD_ERROR, has_kernel

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    build = "" if LOAD_ERROR else torch.ops.msda.build_info()
    if build:
        yield f"operator: compiled, {build}"
    else:
        yield f"operator: plain PyTorch everywhere, because {LOAD_ERROR}"
        yield f"  to compile it: install a C++ compiler (and the CUDA toolkit for GPUs), then {REBUILD}"
    if not gpus:
        yield "GPU: none that PyTorch can use"
    for gpu in gpus:
        major, minor = torch.cuda.get_device_capability(gpu)
        line = f"GPU {gpu}: {torch.cuda.get_device_name(gpu)}, compute capability {major}.{minor}"
        if "CUDA" in build and not runs_on((major, minor), build.partition("CUDA ")[2]):
            line += f"; the operator was not compiled for it: TORCH_CUDA_ARCH_LIST={major}.{minor} {REBUILD}"
        yield line
    for device in ("cpu", "cuda", "mps") if build else ():
        kind = "compiled" if has_kernel(torch.device(device)) else "plain PyTorch"
        yield f"  {device}: {kind} for float32, float16, bfloat16, float64"
    if build and gpus and not has_kernel(torch.device("cuda")):
        yield f"  for the GPU kernels: install the CUDA toolkit (nvcc), then {REBUILD}"


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 where a required package is missing, too old or broken."""
    machine = f"{platform.system()} {platform.machine()}"
    print(f"Python {platform.python_version()} on {machine} ({sys.executable})")
    try:
        unusable = print_packages(declared_packages())
    except PackageNotFoundError:
        print(f"{PROJECT} is not installed, so nothing says what it needs; pip install .")
        return 1
    if "torch" in unusable:
        print("operator: cannot run without torch")
    elif importlib.util.find_spec("MultiScaleDeformableAttention") is None:
        print("operator: not installed, plain PyTorch everywhere; pip install .")
    else:
        print("\n".join(operator_lines()))
    return 1 if unusable else 0
