"""A web page on this machine: objects in images, masks of drawn boxes, the review of a labelled set."""

import argparse
import contextlib
import signal
import socket
import threading
from pathlib import Path

from sim_m2f.commands.check import add_limits, limits
from sim_m2f.data.catalog import DatasetSource
from sim_m2f.errors import UserError
from sim_m2f.files import expanded
from sim_m2f.labelling.quality import FILE, read_quality
from sim_m2f.labelling.run import Labeller
from sim_m2f.own_folder import locked
from sim_m2f.report.labelled import MASKS
from sim_m2f.segmenter import Segmenter, from_pretrained
from sim_m2f.serving.review import Review


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a network: folder (of fit) or name on the Hub")
    parser.add_argument("--config-file", default="", metavar="FILE", help="its YAML file, for a checkpoint")
    labelled = "with masks.json, of label or fit, to review (MODEL, where it has one)"
    parser.add_argument("--labelled", type=Path, metavar="FOLDER", help=labelled)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="its images (those of fit)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)"
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (7860); 0: a free one")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_limits(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C; returns the exit status.

    Raises:
        UserError: packages are missing, or the arguments, the network or the labelled set have a fault.
    """
    port = free_port(args.host, args.port)
    folder = args.labelled or expanded(args.model)
    if args.labelled and not (folder / MASKS).is_file():
        raise UserError(f"{folder}: holds no {MASKS}; give the output folder of label or fit")
    model = from_pretrained(args.model, args.config_file, args.device)
    limits(args, model.cfg)
    with contextlib.ExitStack() as held:
        review = None
        if (folder / MASKS).is_file():
            held.enter_context(locked(folder, "--labelled"))
            review = open_review(model, args.model, folder, args.images)
        try:
            from sim_m2f.serving.server import served
        except ModuleNotFoundError as error:
            advice = "pip install 'sim-m2f[serve]'"
            raise UserError(f"the page needs more packages ({error}): {advice}") from error
        address = held.enter_context(served(model, review, args.host, port))
        print(f"page: {address} (Ctrl-C ends it)", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, and removes uploads
        held.enter_context(contextlib.redirect_stdout(None))  # gradio tells of every file that it sends
        threading.Event().wait()
    return 0


def free_port(host: str, port: int) -> int:
    """The port, or for 0 one that is free.

    Raises:
        UserError: nobody can listen there.
    """
    try:
        with socket.create_server((host, port)) as listening:
            return int(listening.getsockname()[1])
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise UserError(f"{host}:{port}: cannot be served from ({reason}); give another --port") from error


def open_review(model: Segmenter, name: str, folder: Path, images: Path | None) -> Review:
    """The review of a labelled set, of the images that the network has learned from if no others are given.

    Raises:
        UserError: these are not known or not there; see ``Review`` for more.
    """
    if images is None and folder == expanded(name) and model.cfg.DATASETS.TRAIN_IMAGES:
        images = Path(model.cfg.DATASETS.TRAIN_IMAGES)
    if images is None or not images.is_dir():
        fault = f"{images} is no folder" if images else "it is not known where they are"
        raise UserError(f"--images: {fault}; give the folder of the images of {folder / MASKS}")
    scored = folder if (folder / FILE).is_file() else expanded(name)  # label --val fits scores to its masks
    quality = read_quality(scored, model.colors_by_default)
    labeller = Labeller(model, quality, quality.colors, keep_overlaps=True)
    return Review(labeller, DatasetSource("labelled", folder / MASKS, images, model.cfg.INPUT.LIMITS))
