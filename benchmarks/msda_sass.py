"""Counts what the operator's CUDA kernels cost, from their machine code: no GPU is needed.

    python benchmarks/msda_sass.py            writes benchmarks/results/msda_sass.json

For Mask2Former's pixel decoder (3 levels x 4 points, 32 channels), in float32 and, offsets and logits too, in
bfloat16: warp instructions for one query and head, registers, spilled bytes, shared memory of a block. A loop
counts as often as it is run, everything else once, also where a branch jumps over it. It needs nvcc, and
cuobjdump with nvdisasm, of the CUDA toolkit or of the package triton.
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "ops"))
import build  # noqa: E402

CAPABILITIES = ("8.0", "9.0", "10.0")
POINTS, CHANNELS, QUERIES = 12, 32, 64  # of a query and head; of a head; of a block
BINS = 2048  # kBins of cuda_backward.cuh
WARP = 32
SOURCE = """
#include <cstddef>
#include <cstdio>
#include "cuda_backward.cuh"
#include "cuda_forward.cuh"
namespace msda {
namespace {
#define KERNELS(T, LANES) \\
  template __global__ void forward_kernel<T, T, LANES, true>(const __grid_constant__ Problem); \\
  template __global__ void backward_kernel<T, T, LANES, true>(const __grid_constant__ Problem, bool)
KERNELS(float, 8);
KERNELS(__nv_bfloat16, 4);
}  // namespace
}  // namespace msda
int main() {
  const int block = msda::SharedMemory::bytes_before_groups(POINTS);
  const msda::BackwardMemory backward{nullptr, POINTS, QUERIES, CHANNELS};
  std::printf("%d %d", block + QUERIES * msda::forward_group_bytes(POINTS), block + backward.bytes());
}
"""


@dataclass(frozen=True)
class Kernel:
    """One instantiation; a group of lanes serves a query and head."""

    direction: str
    dtype: str
    lanes: int

    @property
    def pattern(self) -> str:
        number = {"float32": "f", "bfloat16": "13__nv_bfloat16"}[self.dtype]
        return rf"\d{self.direction}_kernelI{number}(?:S\w*_|f)Li{self.lanes}E"


KERNELS = [
    Kernel(direction, dtype, lanes)
    for direction in ("forward", "backward")
    for dtype, lanes in (("float32", 8), ("bfloat16", 4))
]


def find_cuobjdump(nvcc: str) -> str:
    """Of the toolkit, else of triton, which brings nvdisasm along.

    Raises:
        SystemExit: there is neither.
    """
    candidates = [Path(nvcc).with_name("cuobjdump"), Path(shutil.which("cuobjdump") or "/")]
    spec = importlib.util.find_spec("triton")
    if spec is not None:
        candidates.append(Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump")
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise SystemExit("cuobjdump was not found: it comes with the CUDA toolkit and with triton")
    return str(found)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def instructions_of(text: str) -> list[tuple[int, str]]:
    """Addresses and instructions of one function up to its last exit; beyond it wait warps out of step."""
    found = [(int(a, 16), t) for a, t in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(\S.*?)\s*;", text)]
    last = max(i for i, (_, words) in enumerate(found) if words.endswith("EXIT"))
    return found[: last + 1]


def innermost_loops(instructions: list[tuple[int, str]]) -> list[range]:
    """Ranges of addresses from the target of a jump back to the jump, where no other lies within."""
    loops = []
    for address, words in instructions:
        jump = re.match(r"(?:@!?U?P\d+ )?BRA(?:\.\S+)? .*?0x([0-9a-f]+)", words)
        if jump and int(jump[1], 16) < address:
            loops.append(range(int(jump[1], 16), address + 1))
    return [
        loop
        for loop in loops
        if not any(other is not loop and other[0] in loop and other[-1] in loop for other in loops)
    ]


def repetitions(kernel: Kernel, body: list[str]) -> float:
    """How often a warp runs a loop with this body, behind the block's preparation."""

    def count(pattern: str) -> int:
        return sum(bool(re.search(pattern, words)) for words in body)

    numbers = CHANNELS // kernel.lanes  # of a lane
    of_lane = -(-POINTS // kernel.lanes)
    if count(r"LDG\.E\.128"):  # over points, four corners at a time
        return POINTS * 4 / count(r"LDG\.E\.128")
    if count(r"\bRED"):  # over sorted corners; a step reads its gradient, 16 bytes at a time
        return POINTS * 4 / (count(r"LDS\.128") / (numbers / 4))
    if count(r"SHFL\.UP"):  # over bins
        return BINS / 4 / (QUERIES * kernel.lanes)
    return of_lane


def instructions_per_pair(kernel: Kernel, instructions: list[tuple[int, str]]) -> float:
    """Warp instructions for one query and head.

    Up to the first barrier one warp prepares the block, and the others come to that barrier.
    """
    barrier = next(address for address, words in instructions if "BAR.SYNC" in words)
    before = sum(address <= barrier for address, _ in instructions)
    loops = {
        loop: repetitions(kernel, [words for address, words in instructions if address in loop])
        for loop in innermost_loops(instructions)
        if loop[0] > barrier
    }
    of_warp = sum(
        next((number for loop, number in loops.items() if address in loop), 1)
        for address, _ in instructions
        if address > barrier
    )
    return before / QUERIES + of_warp / (WARP / kernel.lanes)


def measure(nvcc: str, cuobjdump: str, capability: str, folder: Path) -> list[dict]:
    """The kernels as compiled for one capability."""
    (folder / "kernels.cu").write_text(SOURCE)
    numbers = {"POINTS": POINTS, "QUERIES": QUERIES, "CHANNELS": CHANNELS}
    defines = [f"-D{name}={number}" for name, number in numbers.items()]
    program = str(folder / "kernels")
    report = run(
        *(nvcc, "-O3", "-std=c++17", f"-I{ROOT / 'ops'}", *defines, "-Xptxas", "-v"),
        *(f"-arch=sm_{capability.replace('.', '')}", str(folder / "kernels.cu"), "-o", program),
    )
    shared = dict(zip(("forward", "backward"), map(int, run(program).split()), strict=True))
    functions = re.split(r"\n\s*Function : ", run(cuobjdump, "--dump-sass", program))[1:]
    results = []
    for kernel in KERNELS:
        (text,) = (text for text in functions if re.search(kernel.pattern, text.split("\n", 1)[0]))
        (used,) = re.findall(
            rf"Compiling entry function '\S*{kernel.pattern}.*?(\d+) bytes spill stores, (\d+) bytes spill "
            r"loads.*?Used (\d+) registers",
            report,
            re.DOTALL,
        )
        results.append(
            {
                "kernel": kernel.direction,
                "dtype": kernel.dtype,
                "capability": capability,
                "instructions": round(instructions_per_pair(kernel, instructions_of(text))),
                "registers": int(used[2]),
                "spilled_bytes": int(used[0]) + int(used[1]),
                "threads": QUERIES * kernel.lanes,
                "shared_bytes": shared[kernel.direction],
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", nargs="+", default=CAPABILITIES)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/msda_sass.json")
    args = parser.parse_args()
    nvcc = build.find_nvcc()
    if nvcc is None:
        raise SystemExit("nvcc was not found (set CUDA_HOME to the CUDA toolkit)")
    cuobjdump, results = find_cuobjdump(nvcc), []
    for capability in args.capability:
        with tempfile.TemporaryDirectory() as folder:
            results += measure(nvcc, cuobjdump, capability, Path(folder))
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    for row in results:
        print(", ".join(f"{name} {number}" for name, number in row.items()))


if __name__ == "__main__":
    main()
