"""Write a trained network for other programs: safetensors, detectron2, transformers or ONNX."""

import argparse
from pathlib import Path

from sim_m2f.engine.run_folder import refuse_run
from sim_m2f.errors import UserError
from sim_m2f.files import expanded, refuse_inputs
from sim_m2f.weights.export import FORMATS, export
from sim_m2f.weights.folder import CLASSES, CONFIG, read_folder
from sim_m2f.weights.sources import weights_in


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="NAME", help="folder, name on the Hub, or checkpoint of a network")
    parser.add_argument("--config-file", default="", metavar="FILE", help="its YAML file, for a checkpoint")
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in FORMATS.items())
    parser.add_argument("--format", required=True, choices=FORMATS, help=meanings)
    parser.add_argument("--output", required=True, type=Path, metavar="PATH", help="folder or file to write")


def run(args: argparse.Namespace) -> int:
    """Write the network; returns the exit status.

    Raises:
        UserError: there is no such network, the format does not have it, or the path cannot be written or
            holds what is read, a run, or a README.md of something else.
    """
    output = args.output
    is_folder = args.format in ("safetensors", "transformers")
    if (is_folder and output.is_file()) or (not is_folder and output.is_dir()):
        raise UserError(f"{output}: --format {args.format} writes a {'folder' if is_folder else 'file'}")
    _refuse_inputs(args, output)
    if is_folder:
        refuse_run(output, "its configuration and weights would be replaced; give another --output")
    export(read_folder(args.model, args.config_file), args.format, output)
    print(f"{args.format}: {output}")
    return 0


def _refuse_inputs(args: argparse.Namespace, output: Path) -> None:
    """Raises UserError where the output would replace what is read, or be another checkpoint beside it."""
    model = expanded(args.model)
    config = [expanded(args.config_file)] if args.config_file else []
    given = [path for path in (model, *config) if path.exists()]
    if args.format == "detectron2":
        refuse_inputs([output], given, [])
    read = [weights_in(model), model / CONFIG, model / CLASSES] if model.is_dir() else []
    refuse_inputs([output], [], [*given, *read])
