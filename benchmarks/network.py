"""Times the whole network on the CPU, from an image to instances at its own size, against another one.

    python benchmarks/network.py --original DIR [--original-python PY]    DIR: a checkout of Mask2Former
    python benchmarks/network.py                                          against Hugging Face's transformers

R-50, 100 queries, 80 classes, float32; an image of 480 x 640 that the network sees as 800 x 1088; the best
100 instances. Each implementation runs in a process of its own; repetitions alternate; times are medians.
Weights are random, the same for the original as for ours. Writes benchmarks/results/network_cpu.json.

The original needs detectron2 in its Python. On the CPU it computes deformable attention in PyTorch, as its
extension is for CUDA alone; the stand-in for that extension refuses, as the extension itself does there.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks/results/network_cpu.json"
RESIZED, ORIGINAL_SIZE, INSTANCES, CLASSES = (800, 1067), (480, 640), 100, 80
MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
OURS, ORIGINAL, TRANSFORMERS = "sim-m2f", "Mask2Former", "transformers"

Found = tuple[Tensor, Tensor]  # scores (K,), masks (K, H0, W0)
Segment = Callable[[Tensor], Found]


def padded(image: Tensor) -> Tensor:
    """(1, 3, H, W), normalised, then padded to multiples of 32."""
    normalised = (image - MEAN[:, None, None]) / STD[:, None, None]
    height, width = image.shape[1:]
    return torch.nn.functional.pad(normalised, (0, -width % 32, 0, -height % 32))[None]


def ours(weights: Path) -> Segment:
    sys.path[:0] = [str(ROOT), str(ROOT / "ops")]
    import sim_m2f
    from sim_m2f.modeling.postprocess import instances

    sim_m2f.keep_freed_memory()  # as the commands do
    network = sim_m2f.build_model(sim_m2f.get_cfg()).eval()
    network.load_state_dict(torch.load(weights / "ours.pth"))

    def segment(image: Tensor) -> Found:
        outputs = network(padded(image), auxiliary=False)
        (found,) = instances(outputs, [tuple(image.shape[1:])], [ORIGINAL_SIZE], INSTANCES)
        return found["scores"], found["masks"]

    return segment


def original(weights: Path, checkout: Path) -> Segment:
    """Mask2Former itself; raises where a weight of its network is not among ours."""
    sys.path.insert(0, str(Path(__file__).parent))
    from original import build

    network = build(checkout, "cpu").eval()
    state = OrderedDict(torch.load(weights / "original.pth"))
    state._metadata = network.state_dict()._metadata  # or it takes the names for those of an older version
    missing = set(network.load_state_dict(state, strict=False).missing_keys) - {"criterion.empty_weight"}
    if missing:
        raise RuntimeError(f"no weights for {len(missing)} of its tensors, such as {min(missing)}")
    height, width = ORIGINAL_SIZE

    def segment(image: Tensor) -> Found:
        (found,) = network([{"image": image, "height": height, "width": width}])
        return found["instances"].scores, found["instances"].pred_masks

    return segment


def hugging_face() -> Segment:
    """Mask2Former of transformers, with random weights of its own."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig
    from transformers import Mask2FormerImageProcessor as Processor

    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = Mask2FormerConfig(backbone_config=ResNetConfig(out_features=stages), num_labels=CLASSES)
    network = Mask2FormerForUniversalSegmentation(config).eval()

    def segment(image: Tensor) -> Found:
        outputs = network(padded(image))
        (found,) = Processor().post_process_instance_segmentation(
            outputs, threshold=0.0, target_sizes=[ORIGINAL_SIZE], return_binary_maps=True
        )
        return torch.tensor([info["score"] for info in found["segments_info"]]), found["segmentation"]

    return segment


def worker(name: str, args: argparse.Namespace) -> None:
    """Answers every line on standard input with one inference, as a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, *RESIZED)).float()
    if name == OURS:
        segment = ours(args.weights)
    else:
        segment = original(args.weights, args.original) if name == ORIGINAL else hugging_face()
    loaded = peak_mib()
    for _ in sys.stdin:
        start = clock()
        with torch.no_grad():
            scores, masks = segment(image)
        seconds = clock() - start
        answer = {"seconds": seconds, "instances": len(masks), "loaded_mib": loaded, "peak_mib": peak_mib()}
        answer |= {"size": list(masks.shape[1:]), "scores": sorted(scores.tolist(), reverse=True)}
        print(json.dumps(answer), file=answers)


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def write_weights(folder: Path) -> None:
    """Random weights under our names and under the original's."""
    sys.path[:0] = [str(ROOT), str(ROOT / "ops")]
    import sim_m2f
    from sim_m2f.weights.names import detectron2_names, to_names

    weights = sim_m2f.build_model(sim_m2f.get_cfg()).state_dict()
    torch.save(weights, folder / "ours.pth")
    torch.save(to_names(weights, detectron2_names), folder / "original.pth")


def measure(names: list[str], args: argparse.Namespace) -> dict[str, list[dict]]:
    """The answers of every implementation, ``args.repeat`` each; the first inference is left out.

    Raises:
        SystemExit: an implementation does not run; it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder))
        command = [__file__, "--threads", str(args.threads), "--clock", args.clock, "--weights", folder]
        command += ["--original", str(args.original)] if args.original else []
        processes = {}
        for name in names:
            python = args.original_python if name == ORIGINAL else sys.executable
            processes[name] = subprocess.Popen(
                [python, *command, "--worker", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
        answers: dict[str, list[dict]] = {name: [] for name in names}
        for _ in range(args.repeat + 1):
            for name, process in processes.items():
                print("run", file=process.stdin)
                line = process.stdout.readline()
                if not line:
                    raise SystemExit(f"{name} does not run")
                answers[name].append(json.loads(line))
        for process in processes.values():
            process.stdin.close()
            process.wait()
    return {name: found[1:] for name, found in answers.items()}


def summary(answers: list[dict]) -> dict[str, float]:
    seconds = [answer["seconds"] for answer in answers]
    last = answers[-1]
    return {
        "seconds": round(statistics.median(seconds), 3),
        "fastest": round(min(seconds), 3),
        "slowest": round(max(seconds), 3),
        "instances": last["instances"],
        "peak_mib": round(last["peak_mib"]),
        "beyond_loaded_mib": round(last["peak_mib"] - last["loaded_mib"]),
    }


def table(results: dict[str, dict]) -> str:
    lines = ["| | seconds (fastest to slowest) | peak MiB | beyond the loaded network |", "|---|---|---|---|"]
    for name, row in results.items():
        spread = f"{row['seconds']:.2f} ({row['fastest']:.2f} to {row['slowest']:.2f})"
        lines.append(f"| {name} | {spread} | {row['peak_mib']} | {row['beyond_loaded_mib']} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", type=Path, help="a checkout of Mask2Former")
    parser.add_argument("--original-python", default=sys.executable, help="a Python that has detectron2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.worker:
        worker(args.worker, args)
        return
    if args.original is None and importlib.util.find_spec("transformers") is None:
        raise SystemExit("nothing to compare with: give --original DIR, or install transformers")
    baseline = ORIGINAL if args.original else TRANSFORMERS
    load_average = os.getloadavg()[0]
    answers = measure([baseline, OURS], args)
    results = {name: summary(found) for name, found in answers.items()}
    report = {
        "image": {"resized": RESIZED, "original": ORIGINAL_SIZE},
        "threads": args.threads,
        "clock": args.clock,
        "repetitions": args.repeat,
        "load_average_before": round(load_average, 2),
        "results": results,
        "speedup": round(results[baseline]["seconds"] / results[OURS]["seconds"], 2),
    }
    if args.original:
        pairs = zip(*(found[-1]["scores"] for found in answers.values()), strict=True)
        report["largest_score_difference"] = max(abs(a - b) for a, b in pairs)
    sys.path.insert(0, str(Path(__file__).parent))
    import hardware

    report["hardware"] = hardware.describe()
    temporary = args.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(args.output)
    print(table(results))
    print(f"speed-up {report['speedup']}")


if __name__ == "__main__":
    main()
