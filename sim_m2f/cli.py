"""The console script ``sim-m2f``: one command per module of ``sim_m2f/commands``, imported when called."""

import argparse
import importlib
import sys
from types import ModuleType

from sim_m2f.allocator import keep_freed_memory
from sim_m2f.errors import UserError

COMMANDS = {
    "train": "train, go on with a run, or evaluate a checkpoint",
    "report": "write the page of a finished run",
    "explain": "draw how a checkpoint gets from boxes to pseudo masks",
    "predict": "find the objects in images: COCO JSON and overlays",
    "export": "write a trained network for other programs",
    "check": "check a data set completely",
    "shapes": "write the embedded shapes data set",
    "doctor": "show what is installed, which kernels run, and how to get what is missing",
    "ablate": "train the method term by term and compare the results",
}


def main(arguments: list[str] | None = None) -> int:
    """Run ``sim-m2f COMMAND ...``; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="sim-m2f", description="Instance masks learned from bounding boxes alone."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in arguments[:1]:
            try:
                module = importlib.import_module(f"sim_m2f.commands.{name}")
            except ModuleNotFoundError as error:
                print(f"error: the package {error.name} is missing; see 'sim-m2f doctor'", file=sys.stderr)
                return 2
            module.add_arguments(command)
    return guarded(module, parser.parse_args(arguments))


def guarded(module: ModuleType, parsed: argparse.Namespace) -> int:
    """Run a command; a mistake of the user becomes lines on standard error and exit status 2."""
    torch = sys.modules.get("torch")  # what works without it is not to wait for it
    if torch and not torch.cuda.is_available():
        keep_freed_memory()
    try:
        return module.run(parsed)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
