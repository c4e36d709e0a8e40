"""A folder in which everything is sound, for tests to break; and a command run in it, with what it said."""

import contextlib
import csv
import http.server
import io
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT, SMALL_FILE
from PIL import Image

from sim_m2f.cli import main
from sim_m2f.config import CfgNode, get_cfg
from sim_m2f.data.formats.base import images_of
from sim_m2f.data.formats.registry import WRITERS
from sim_m2f.modeling import build_model
from sim_m2f.segmenter import Segmenter

NAMES = ["cat", "dog house", "bird"]
SIZE = 64, 48
OUTPUTS = "out/", "run/index.html", "run/report/"
NOTES = "note: ", "warning: ", "goes on after step "
VOC = """<annotation><filename>{}</filename><size><width>64</width><height>48</height></size>
<object><name>cat</name><bndbox><xmin>8</xmin><ymin>8</ymin><xmax>38</xmax><ymax>28</ymax></bndbox></object>
</annotation>"""
OVERRIDES = {
    "MODEL.BACKBONE.NAME": "test_resnet",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "3",
    "MODEL.SIM.PROMPTS.ENABLED": "True",
    "MODEL.SIM.SHOW.PERIOD": "0",
    "INPUT.IMAGE_SIZE": "64",
    "INPUT.MIN_SIZE_TEST": "64",
    "INPUT.MAX_SIZE_TEST": "64",
    "DATASETS.TRAIN_ANNOTATIONS": "boxes.json",
    "DATASETS.TRAIN_IMAGES": "images",
    "DATASETS.TEST_ANNOTATIONS": "boxes.json",
    "DATASETS.TEST_IMAGES": "images",
    "SOLVER.MAX_ITER": "2",
    "TRACKERS": "()",
    "OUTPUT_DIR": "out",
}


def write_sound(folder: Path) -> None:
    """Images with annotations in all formats, a configuration, a network, and a run that has ended."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    files = "1.png", "2.jpg", "3.png"
    for name in files:
        pixels = rng.integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
    content = boxes(files)
    (folder / "boxes.json").write_text(json.dumps(content))
    write_formats(folder, content)
    cfg = settings()
    (folder / "base.yaml").write_text(cfg.dump())
    (folder / "config.yaml").write_text("_BASE_: base.yaml\n")
    torch.manual_seed(0)
    Segmenter(build_model(cfg), cfg, NAMES).save_pretrained(folder / "model")
    outcome = run(["train", "--config-file", "config.yaml", "OUTPUT_DIR", "run"], folder)
    assert outcome.status == 0, outcome.lines


def boxes(files: tuple[str, ...]) -> dict:
    """A COCO JSON: a polygon, and no object on the last image."""
    polygon = [[8, 8, 38, 8, 38, 28, 8, 28]]
    return {
        "images": [
            {"id": number, "file_name": name, "width": SIZE[0], "height": SIZE[1]}
            for number, name in enumerate(files, start=1)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(NAMES, start=1)],
        "annotations": [
            {
                "id": number,
                "image_id": number,
                "category_id": number,
                "bbox": [8, 8, 30, 20],
                "segmentation": polygon,
                "area": 600,
                "iscrowd": 0,
            }
            for number in (1, 2)
        ],
    }


def write_formats(folder: Path, content: dict) -> None:
    """The same in all formats that are read."""
    for name in ("cvat", "labelme", "labelstudio"):
        WRITERS[name].write(folder, content["categories"], images_of(content))
    tasks = json.loads((folder / "labelstudio.json").read_text())
    value = {"x": 12.5, "y": 20, "width": 50, "height": 40, "rectanglelabels": ["cat"]}
    result = {"type": "rectanglelabels", "original_width": 64, "original_height": 48, "value": value}
    tasks[0] = {"id": 7, "data": {"image": "/data/upload/1.png"}, "annotations": [{"result": [result]}]}
    (folder / "tasks.json").write_text(json.dumps(tasks))
    (folder / "labelstudio.json").unlink()
    for kind in ("voc", "yolo"):
        (folder / kind).mkdir()
    (folder / "yolo/classes.txt").write_text("".join(f"{name}\n" for name in NAMES))
    with (folder / "boxes.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image", "label", "xmin", "ymin", "xmax", "ymax"])
        for number, name in enumerate(("1.png", "2.jpg"), start=1):
            table.writerow([name, "cat", 8, 8, 38, 28])
            (folder / f"voc/{number}.xml").write_text(VOC.format(name))
            (folder / f"yolo/{number}.txt").write_text("0 0.5 0.5 0.25 0.25\n")


def settings() -> CfgNode:
    """The configuration of a network that is trained in a moment."""
    cfg = get_cfg()
    cfg.merge_from_file(ROOT / "configs/shapes/boxinst_R18.yaml")
    cfg.merge_from_file(SMALL_FILE)
    cfg.merge_from_list([item for pair in OVERRIDES.items() for item in pair])
    return cfg


def copied(sound: Path, folder: Path) -> Path:
    """A copy whose files are shared until one is replaced."""
    return Path(shutil.copytree(sound, folder, copy_function=os.link))


def contents(folder: Path) -> dict[str, bytes]:
    """What every file holds, links and pipes aside."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@dataclass(frozen=True)
class Outcome:
    """What became of a command.

    Attributes:
        status: its exit status.
        lines: its errors: standard error, and what ``check`` finds; notes and summaries aside.
        touched: files of the user's that it changed, or that it left outside of its output (``out``, and the
            report of a run) or half-written.
    """

    status: int
    lines: list[str]
    touched: list[str]

    @property
    def kind(self) -> str:
        """What it may be, "runs" or "one line" (of several problems, one each); or "broken"."""
        expected = 2 if self.lines else 0
        return "broken" if self.touched or self.status != expected else "one line" if self.lines else "runs"


def run(arguments: list[str], folder: Path) -> Outcome:
    """Call a command in a folder; whatever it raises comes through."""
    before, here = contents(folder), Path.cwd()
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        os.chdir(folder)
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            status = main(arguments)
    except SystemExit as error:  # of argparse
        status = int(error.code or 0)
    finally:
        os.chdir(here)
    lines = stderr.getvalue().splitlines()
    if "check" in arguments[:1] and status == 2 and not lines:
        lines = stdout.getvalue().splitlines()[:-1]
    told = [line.removeprefix("error: ") for line in lines if not line.startswith(NOTES)]
    after = contents(folder)
    new = [name for name in after if name not in before]
    touched = [name for name in before if after.get(name) != before[name] and not name.startswith(OUTPUTS)]
    touched += [name for name in new if not name.startswith(OUTPUTS) and Path(name).name != ".lock"]
    touched += [name for name in new if Path(name).name.startswith(".") and Path(name).name != ".lock"]
    return Outcome(status, told if status else [], touched)


ANSWERS = {
    "/404.pth": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "/500.pth": b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
    "/page.pth": b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n<!doctype html>",
    "/nothing.pth": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "/short.pth": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nPK\x03\x04",
    "/nonsense.pth": b"220 welcome\r\n",
    "/circle.pth": b"HTTP/1.1 302 Found\r\nLocation: /circle.pth\r\nContent-Length: 0\r\n\r\n",
}


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The address of a server with broken files of weights, and one of weights of something else."""
    file = io.BytesIO()
    torch.save({"model": {"weight": torch.zeros(3)}}, file)
    weights = file.getvalue()
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(weights) + weights

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.close_connection = True
            self.wfile.write(ANSWERS.get(self.path, whole))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{listening.server_port}"
        listening.shutdown()
