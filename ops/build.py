"""Builds the operator: one shared library for every PyTorch from 2.10 on and every Python (Stable ABI).

`setup.py` builds with it (`extension.py`), `python ops/build.py` does without setuptools. The CPU part needs
a C++ compiler (GCC or Clang), the CUDA part nvcc as well, but no GPU. Environment:

    SIM_M2F_OPERATOR      auto (default): what the machine can build; none; cpu; cuda: both parts, or fail.
    TORCH_CUDA_ARCH_LIST  compute capabilities, such as "8.0;9.0+PTX".
    CXX, CUDA_HOME        the compilers, where they are not found.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent
TARGET_VERSION = "0x020a000000000000"  # PyTorch 2.10
DEFAULT_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0")
CXX_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
KERNEL_FLAGS = ("-fno-thread-jumps",)  # GCC would turn conditions that share a comparison into branches
X86_KERNELS = {  # instruction set: name, bytes of a vector, flags
    "baseline": ("SSE2", 16, ()),
    "avx2": ("AVX2", 32, ("-mavx2", "-mfma")),
    "avx512": ("AVX-512", 64, ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma")),
}
OTHER_KERNELS = {"baseline": (platform.machine(), 16, ())}
CACHES = "ccache", "sccache", "distcc"  # words of CXX before the compiler


class BuildError(Exception):
    """The operator cannot be built; the message says why in one line."""


@dataclass(frozen=True)
class Toolchain:
    """What this machine builds with."""

    torch: Path  # folder of the installed package
    cxx: tuple[str, ...]
    nvcc: str | None


def find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("PyTorch is not installed where the package is built (try --no-build-isolation)")
    return Path(spec.origin).parent


def find_cxx() -> tuple[str, ...]:
    if os.environ.get("CXX"):
        return tuple(shlex.split(os.environ["CXX"]))
    found = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if found is None or sys.platform == "win32":
        raise BuildError("no C++ compiler was found (GCC or Clang; set CXX to name one)")
    return (found,)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    candidates += [Path(path) for path in [shutil.which("nvcc")] if path]
    candidates += [Path("/usr/local/cuda/bin/nvcc")]
    return next((str(path) for path in candidates if path.exists()), None)


def find_toolchain() -> Toolchain | None:
    """The compilers to use, or None where the operator is not wanted.

    Raises:
        BuildError: something that is needed is not there.
    """
    wanted = os.environ.get("SIM_M2F_OPERATOR", "auto")
    if wanted not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"SIM_M2F_OPERATOR={wanted}: choose auto, none, cpu or cuda")
    if wanted == "none":
        return None
    nvcc = None if wanted == "cpu" else find_nvcc()
    if wanted == "cuda" and nvcc is None:
        raise BuildError("nvcc was not found (set CUDA_HOME to the CUDA toolkit)")
    return Toolchain(find_torch(), find_cxx(), nvcc)


def cuda_architectures(nvcc: str) -> tuple[list[str], str]:
    """nvcc's flags and a readable list: TORCH_CUDA_ARCH_LIST, or a default with PTX for later cards."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        output = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        known = set(re.findall(r"compute_(\d+)", output))
        listed = [item for item in DEFAULT_CAPABILITIES if item.replace(".", "") in known]
        listed[-1] += "+PTX"
    flags = []
    for item in listed:
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", item)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {item}: expected a capability such as 8.0 or 9.0+PTX")
        number = match[1] + match[2] + match[3]
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match[4]:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags, " ".join(listed)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        hint = "SIM_M2F_OPERATOR=cpu builds without the CUDA part, SIM_M2F_OPERATOR=none without the operator"
        raise SystemExit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}\n{hint}")


def kernel_commands(compile_cxx: list[str], folder: Path) -> list[list[str]]:
    """cpu_kernels.cpp, once per instruction set."""
    sets = X86_KERNELS if platform.machine().lower() in ("x86_64", "amd64") else OTHER_KERNELS
    return [
        [
            *compile_cxx,
            *KERNEL_FLAGS,
            *flags,
            f"-DMSDA_KERNELS={name}_kernels",
            f'-DMSDA_NAME="{label}"',
            f"-DMSDA_VECTOR_BYTES={width}",
            *("-c", str(SOURCES / "cpu_kernels.cpp"), "-o", str(folder / f"kernels_{name}.o")),
        ]
        for name, (label, width, flags) in sets.items()
    ]


def nvcc_command(tools: Toolchain, arguments: list[str]) -> list[str]:
    """nvcc with the host compiler of the C++ part, which may stand behind a cache."""
    host = next(word for word in tools.cxx if Path(word).name not in CACHES)
    return [tools.nvcc, "-ccbin", host, "-Xcompiler", "-fPIC,-fvisibility=hidden", *arguments]


def link_command(tools: Toolchain, objects: list[str], library: Path) -> list[str]:
    """The linker; with CUDA it is nvcc, which adds its runtime library, statically.

    libtorch is named as a dependency, so that symbols are found in it and, where there is one, in
    libtorch_cuda. It needs no path: whoever loads the operator has loaded PyTorch before.
    """
    if sys.platform == "darwin":
        return [*tools.cxx, "-shared", "-undefined", "dynamic_lookup", *objects, "-o", str(library)]
    libraries = [f"-L{tools.torch / 'lib'}", "-ltorch", "-ltorch_cpu"]
    if tools.nvcc:
        return nvcc_command(
            tools, ["-shared", *objects, "-Xlinker", "--no-as-needed", *libraries, "-o", str(library)]
        )
    return [*tools.cxx, "-shared", *objects, "-Wl,--no-as-needed", *libraries, "-o", str(library)]


def build(tools: Toolchain, folder: Path, library: Path) -> str:
    """Compiles into ``folder`` and links ``library``; returns what was built, in words."""
    torch_flags = [f"-I{tools.torch / 'include'}", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]
    compile_cxx = [*tools.cxx, *CXX_FLAGS, *torch_flags]
    commands = kernel_commands(compile_cxx, folder)
    summary = f"CPU part with {tools.cxx[0]}"
    if tools.nvcc:
        flags, capabilities = cuda_architectures(tools.nvcc)
        source = ["-c", str(SOURCES / "cuda.cu"), "-o", str(folder / "cuda.o")]
        commands.insert(0, nvcc_command(tools, ["-O3", "-std=c++17", "--threads", "2", *flags, *source]))
        compile_cxx.append(f'-DMSDA_CUDA="{capabilities}"')
        summary += f", CUDA part with {tools.nvcc} for {capabilities}"
    for name in ("cpu", "operator"):
        commands.append([*compile_cxx, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(folder / f"{name}.o")])
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(run, commands))
    library.parent.mkdir(parents=True, exist_ok=True)
    run(link_command(tools, [command[-1] for command in commands], library))
    return summary


def main() -> None:
    """Builds beside the Python files, for those who run from a checkout without installing it."""
    try:
        tools = find_toolchain()
    except BuildError as error:
        raise SystemExit(str(error)) from None
    if tools is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(build(tools, Path(folder), SOURCES / "MultiScaleDeformableAttention" / "_C.so"))


if __name__ == "__main__":
    main()
