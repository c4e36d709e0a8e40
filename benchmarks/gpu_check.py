"""Builds, checks and times the operator on an NVIDIA GPU, then the training step and short trainings.

    python3 benchmarks/gpu_check.py OUT                         all parts, in the order below
    python3 benchmarks/gpu_check.py OUT --parts build kernels   some of them
    python3 benchmarks/gpu_check.py OUT --device cpu            a trial of the script itself, small

    build       the operator for this GPU alone, its agreement with float64, its tests     build.json
    kernels     against grid_sample and --peer, as a share of the copy bandwidth            kernels.json
    step        a training step at 1024 pixels: time by part, memory, launches, waits       step.json
    trainings   shapes and people, AP beside the CPU's                                      trainings.json
    sanitizer   memcheck and racecheck of compute-sanitizer                                 summary.json

No network is needed and nothing is installed. The operator lands in ops/, everything else in OUT: a JSON file
for each part, with the hardware, as soon as there is something to say; summary.json; log.txt with all output.
A part that fails or takes longer than --limit does not stop the next. The exit status is 1 if one failed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import hardware  # noqa: E402

PARTS = ("build", "kernels", "step", "trainings", "sanitizer")
NEEDED = {  # what has to be importable, by part
    "step": [
        *("torchvision", "timm", "scipy", "pycocotools", "accelerate", "tqdm", "PIL", "yaml", "psutil"),
        *("fvcore", "iopath", "yacs", "portalocker"),
    ],
    "trainings": ["tensorboard", "matplotlib", "safetensors", "jinja2", "tabulate", "requests", "filelock"],
}
NEEDED["trainings"] += NEEDED["step"]
TESTS = [f"tests/test_ops_{name}.py" for name in ("operator", "registration", "random_shapes")]
STEP_CONFIGS = ["configs/coco/sim_R50_bs16_50ep.yaml", "configs/coco/mask_R50_bs16_50ep.yaml"]
SANITIZER_FOLDERS = ("bin", "compute-sanitizer")  # of the CUDA toolkit
SHOWN_LINES = 25  # of the output of a command that failed


@dataclass(frozen=True)
class Command:
    """One process of a part, and what its environment has besides."""

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """As one would type it in the repository."""
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        words = [word.replace(f"{ROOT}/", "") for word in self.arguments]
        return " ".join([*settings, *words]).replace(sys.executable, "python3")


def script(name: str, *arguments: object) -> Command:
    """A script of benchmarks/."""
    return Command([sys.executable, str(BENCHMARKS / name), *map(str, arguments)])


def build(args: argparse.Namespace) -> list[Command]:
    operator = Command([sys.executable, "ops/build.py"], build_settings(args.device))
    agreement = script("msda_agreement.py", "--device", args.device, "--output", args.out / "build.json")
    commands = [operator, agreement]
    if find_spec("pytest") and find_spec("hypothesis"):
        flags = ["--noconftest", "-p", "no:cacheprovider", "-m", "not slow"]
        storage = {"HYPOTHESIS_STORAGE_DIRECTORY": f"{tempfile.gettempdir()}/hypothesis"}  # not in the tree
        commands.append(Command([sys.executable, "-m", "pytest", *flags, *TESTS], storage))
    return commands


def build_settings(device: str) -> dict[str, str]:
    """Both parts of the operator for this GPU alone, or the CPU's."""
    if device == "cpu":
        return {"SIM_M2F_OPERATOR": "cpu"}
    major, minor = torch.cuda.get_device_capability()
    return {"SIM_M2F_OPERATOR": "cuda", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}


def kernels(args: argparse.Namespace) -> list[Command]:
    small = ["--case", "tiny", "--repeat", "1"] if args.device == "cpu" else []
    peer = ["--peer", *args.peer] if args.peer else []
    output = ["--output", args.out / "kernels.json"]
    return [script("msda.py", "--device", args.device, *small, *peer, *output)]


def step(args: argparse.Namespace) -> list[Command]:
    cases = ["2", "16", "2:float32"]
    small: list[str] = []
    if args.device == "cpu":
        cases, small = ["1"], ["INPUT.IMAGE_SIZE=64", "DATALOADER.NUM_WORKERS=0"]
    short = ["--steps", "1", "--warmup", "1"] if args.device == "cpu" else []
    original = ["--original", args.original] if args.original else []
    options = ["--device", args.device, "--synthetic", "10", *short, *original]
    output = ["--output", args.out / "step.json"]
    configs = [*STEP_CONFIGS, "MODEL.WEIGHTS=", *small]
    return [script("step.py", *configs, "--case", *cases, *options, *output)]


def trainings(args: argparse.Namespace) -> list[Command]:
    short = ["--steps", "2"] if args.device == "cpu" else []
    weights = ["--weights", args.weights] if args.weights else []
    output = ["--output", args.out / "trainings.json"]
    return [script("gpu_trainings.py", "--device", args.device, *short, *weights, *output)]


def sanitizer(args: argparse.Namespace) -> list[Command]:
    """Without PyTorch's cache of memory, which hides what is read or written beyond a tensor."""
    tool = find_sanitizer()
    if args.device == "cpu" or tool is None:
        return []
    check = script("msda_agreement.py", "--device", "cuda", "--small").arguments
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tools = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}  # PyTorch asks for what is not there
    return [
        Command([tool, "--tool", name, *options, "--error-exitcode", "1", *check], uncached)
        for name, options in tools.items()
    ]


def find_sanitizer() -> str | None:
    """In the path and where ops/build.py looks for nvcc."""
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    folders = [
        os.environ.get("PATH", ""),
        *(f"{home}/{name}" for home in homes for name in SANITIZER_FOLDERS),
    ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


COMMANDS = {"build": build, "kernels": kernels, "step": step, "trainings": trainings, "sanitizer": sanitizer}


def run(command: Command, deadline: float, log: IO[str]) -> dict[str, str | float]:
    """Run a command until it ends or the deadline comes; returns how it went."""
    print(f"   {command.text}", flush=True)
    log.write(f"\n$ {command.text}\n")
    log.flush()
    begin, start = log.tell(), time.monotonic()
    environment = os.environ | paths() | command.environment
    process = subprocess.Popen(
        command.arguments, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        status = process.wait(timeout=max(1, deadline - time.monotonic()))
        result = "ok" if status == 0 else f"exit status {status}"
    except subprocess.TimeoutExpired:
        result = "stopped at the time limit"
    finally:
        end_group(process)
    lines = output_since(Path(log.name), begin)
    if result != "ok":
        print("\n".join(f"   | {line}" for line in lines[-SHOWN_LINES:]), flush=True)
    seconds = round(time.monotonic() - start, 1)
    return {"command": command.text, "result": result, "seconds": seconds, "last_line": (lines or [""])[-1]}


def end_group(process: subprocess.Popen) -> None:
    """End what is left of a command and of the processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        time.sleep(1)
    process.wait()


def output_since(file: Path, begin: int) -> list[str]:
    with file.open("rb") as log:
        log.seek(begin)
        return [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]


def paths() -> dict[str, str]:
    """PYTHONPATH with the repository and its operator in front; output arrives at once."""
    old = os.environ.get("PYTHONPATH")
    folders = [str(ROOT), str(ROOT / "ops"), *([old] if old else [])]
    return {"PYTHONPATH": os.pathsep.join(folders), "PYTHONUNBUFFERED": "1"}


def missing(part: str) -> list[str]:
    return [name for name in NEEDED.get(part, ()) if find_spec(name) is None]


def run_part(part: str, args: argparse.Namespace, log: IO[str]) -> dict:
    """Run the commands of a part within its limit; returns how it went."""
    print(f"== {part}", flush=True)
    absent = missing(part)
    if absent:
        return {"result": f"left out: not installed: {', '.join(absent)}", "seconds": 0.0, "commands": []}
    start = time.monotonic()
    commands = COMMANDS[part](args)
    if not commands:
        return {"result": "left out: no compute-sanitizer, or no GPU", "seconds": 0.0, "commands": []}
    results = [run(command, start + args.limit, log) for command in commands]
    failed = [result["result"] for result in results if result["result"] != "ok"]
    seconds = round(time.monotonic() - start, 1)
    return {"result": "; ".join(map(str, failed)) or "ok", "seconds": seconds, "commands": results}


def table(parts: dict[str, dict]) -> str:
    lines = ["", "| part | seconds | result |", "|---|---|---|"]
    for part, outcome in parts.items():
        lines.append(f"| {part} | {outcome['seconds']:.0f} | {outcome['result']} |")
        lines += [f"| | {c['seconds']:.0f} | {c['last_line'][:150]} |" for c in outcome["commands"]]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder for the results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--limit", type=float, default=540, help="seconds for a part")
    parser.add_argument("--peer", nargs="+", default=[], help="for kernels: other builds, see msda.py")
    parser.add_argument("--original", type=Path, help="for step: a checkout of Mask2Former, see step.py")
    parser.add_argument("--weights", type=Path, help="for people: MobileNetV2, see gpu_trainings.py")
    args = parser.parse_args()
    for name in ("out", "original", "weights"):  # commands run in the repository
        path = getattr(args, name)
        setattr(args, name, path.resolve() if path else None)
    args.peer = [str(Path(name).resolve()) if name.endswith(".so") else name for name in args.peer]
    return args


def main() -> None:
    args = parse_arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU; --device cpu tries the script itself")
    args.out.mkdir(parents=True, exist_ok=True)
    summary: dict = {"hardware": hardware.describe(), "parts": {}}
    print(json.dumps(summary["hardware"]))
    with (args.out / "log.txt").open("a") as log:
        for part in args.parts:
            summary["parts"][part] = run_part(part, args, log)
            (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(table(summary["parts"]))
    sys.exit(any(outcome["result"] != "ok" for outcome in summary["parts"].values()))


if __name__ == "__main__":
    main()
