"""Boxes against masks on the embedded shapes: the same network, seed and steps, supervised by each.

    python benchmarks/shapes.py

Trains both (some half an hour on two cores) and writes benchmarks/results/shapes.json.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import hardware

ROOT = Path(__file__).resolve().parents[1]
QUOTED = ("segm/AP", "segm/AP50", "segm/AP75", "bbox/AP", "boxfill/AP")


def train(config: str, output: Path) -> dict[str, float]:
    """Train with a configuration of configs/shapes; returns its last scores, steps and minutes."""
    start = time.time()
    command = [
        sys.executable,
        "train_net.py",
        "--config-file",
        f"configs/shapes/{config}.yaml",
        "--overwrite",
        "OUTPUT_DIR",
        str(output),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    minutes = (time.time() - start) / 60
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "segm/AP" in line][-1]
    return {
        **{name: round(scores[name], 2) for name in QUOTED},
        "steps": scores["iteration"] + 1,
        "minutes": round(minutes, 1),
    }


def main() -> None:
    results = {
        "box": train("sim_R18", ROOT / "output/shapes_box"),
        "mask": train("mask_R18", ROOT / "output/shapes_mask"),
    }
    results["hardware"] = hardware.describe()
    (ROOT / "benchmarks/results/shapes.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
