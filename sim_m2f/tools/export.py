"""Write a trained network for other programs: safetensors, detectron2, transformers or ONNX."""

import argparse
from pathlib import Path

import torch

from sim_m2f.errors import UserError
from sim_m2f.files import atomic_write
from sim_m2f.segmenter import Segmenter

FORMATS = {
    "safetensors": "a folder of ours: weights, configuration, class names and model card",
    "detectron2": "a .pth file that the original Mask2Former loads",
    "transformers": "a folder for Mask2FormerForUniversalSegmentation and its image processor",
    "onnx": "an .onnx file for pictures whose sides are multiples of 32",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="NAME", help="folder of a trained network, its name on the Hub, or a checkpoint"
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="its YAML file, for a checkpoint")
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="; ".join(f"{name}: {meaning}" for name, meaning in FORMATS.items()),
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="PATH", help="the folder or file to write"
    )


def run(args: argparse.Namespace) -> int:
    """Write the network; returns the exit status.

    Raises:
        UserError: there is no such network, the format does not have it, or the path cannot be written.
    """
    from sim_m2f.pretrained import from_pretrained

    output = args.output.expanduser()
    is_folder = args.format in ("safetensors", "transformers")
    if (is_folder and output.is_file()) or (not is_folder and output.is_dir()):
        raise UserError(f"{output}: --format {args.format} writes a {'folder' if is_folder else 'file'}")
    export(from_pretrained(args.model, args.config_file, "cpu"), args.format, output)
    print(f"{args.format}: {output}")
    return 0


def export(model: Segmenter, format_name: str, output: Path) -> None:
    """Write a network in one of ``FORMATS`` to a folder or a file.

    Raises:
        UserError: the format does not have such a network, or the path cannot be written.
    """
    weights = {name: weight.detach().cpu() for name, weight in model.network.state_dict().items()}
    if format_name == "safetensors":
        model.save_pretrained(output)
    elif format_name == "transformers":
        from sim_m2f.interop.transformers import write_transformers

        write_transformers(output, weights, model.cfg, model.class_names)
    elif format_name == "detectron2":
        from sim_m2f.interop.detectron2 import detectron2_checkpoint

        content = detectron2_checkpoint(weights, model.cfg)
        with atomic_write(output, "wb") as file:
            torch.save(content, file)
    else:
        from sim_m2f.interop.onnx import onnx_bytes

        content = onnx_bytes(model.network)
        with atomic_write(output, "wb") as file:
            file.write(content)
