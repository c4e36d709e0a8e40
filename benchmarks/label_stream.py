"""Labels many images by `sim-m2f label`, killed and started again on the way, and watches its memory.

    python benchmarks/label_stream.py --images 100000

The images are links to a few painted ones, each with one to five boxes; the network is that of
tests/small.yaml with prompts and random weights, since neither time nor memory depends on what it has
learned. The command is killed (-9) after a third, ended by SIGTERM after two thirds, and started again both
times. Writes benchmarks/results/label_stream.json: largest resident memory while it labels each tenth, and
while masks.json is put together; minutes; and whether every box has its mask, in order.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from hardware import describe
from PIL import Image

import sim_m2f
from sim_m2f.config import get_cfg
from sim_m2f.files import write_file

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks/results/label_stream.json"
SIZE, PAINTED = 64, 50
STOPS = {1 / 3: signal.SIGKILL, 2 / 3: signal.SIGTERM}


def make_set(folder: Path, count: int) -> int:
    """Images, and boxes.json; returns the number of boxes."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    annotations = []
    for index in range(count):
        file = folder / f"images/{index:06d}.png"
        if index < PAINTED:
            Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(file)
        else:
            os.link(folder / f"images/{index % PAINTED:06d}.png", file)
        for _ in range(random.integers(1, 6)):
            x, y = random.integers(0, SIZE - 20, 2).tolist()
            width, height = random.integers(8, 20, 2).tolist()
            number = len(annotations) + 1
            annotations.append(
                {"id": number, "image_id": index, "category_id": 1, "bbox": [x, y, width, height]}
            )
    images = [
        {"id": index, "file_name": f"{index:06d}.png", "width": SIZE, "height": SIZE}
        for index in range(count)
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "boxes.json").write_text(json.dumps(content))
    return len(annotations)


def make_network(folder: Path) -> None:
    cfg = get_cfg()
    cfg.merge_from_file(ROOT / "tests/small.yaml")
    keys = ["INPUT.MIN_SIZE_TEST", "0", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "1"]
    cfg.merge_from_list(["MODEL.SIM.PROMPTS.ENABLED", "True", *keys])
    sim_m2f.Segmenter(sim_m2f.build_model(cfg), cfg, ["thing"]).save_pretrained(folder)


class Watched:
    """The command, its memory sampled while it runs, by the share of images that are noted."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.journal = folder / "out/masks.progress.jsonl"
        self.peaks: dict[str, float] = {}

    def run(self, until: float = 1.0, stop: signal.Signals | None = None) -> int:
        """Start it and, once a share of the images is done, send it a signal; returns its exit status."""
        command = [sys.executable, "-m", "sim_m2f.cli", "label", "--model", str(self.folder / "network")]
        command += ["--annotations", str(self.folder / "boxes.json"), "--device", "cpu"]
        command += ["--images", str(self.folder / "images"), "--output", str(self.folder / "out")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.folder / "log.txt").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        memory, done, read = psutil.Process(process.pid), 0, 0
        while process.poll() is None:
            time.sleep(0.5)
            if self.journal.exists():
                with self.journal.open("rb") as file:
                    file.seek(read)
                    lines = file.read().count(b"\n")
                    read, done = file.tell(), done + lines
            share = max(done - 1, 0) / self.count
            try:
                used = memory.memory_info().rss / 2**20
            except psutil.NoSuchProcess:
                break
            tenth = f"{int(10 * share) * 10} %" if share < 1 else "masks.json"
            self.peaks[tenth] = round(max(self.peaks.get(tenth, 0.0), used), 1)
            if stop and share >= until:
                process.send_signal(stop)
        return process.wait()


def faults(folder: Path) -> int:
    """Boxes whose record is not the given one, in its place, with a mask."""
    given = json.loads((folder / "boxes.json").read_text())["annotations"]
    made = json.loads((folder / "out/masks.json").read_text())["annotations"]
    kept = [
        old.items() <= new.items() and new.get("area", 0) > 0 for old, new in zip(given, made, strict=True)
    ]
    return kept.count(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        boxes = make_set(folder, args.images)
        make_network(folder / "network")
        watched, start = Watched(folder, args.images), time.perf_counter()
        ends = [watched.run(share, stop) for share, stop in STOPS.items()] + [watched.run()]
        result = {
            "images": args.images,
            "boxes": boxes,
            "exit statuses": ends,
            "boxes that were changed, moved or left without a mask": faults(folder),
            "minutes": round((time.perf_counter() - start) / 60, 1),
            "largest resident memory, MiB": watched.peaks,
            "hardware": describe(),
        }
    write_file(args.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
