"""The console script ``sim-m2f``: one command per module of ``sim_m2f/tools``."""

import argparse
import importlib
import sys
from types import ModuleType

import torch

from sim_m2f.allocator import keep_freed_memory
from sim_m2f.errors import UserError

COMMANDS = ("train", "report", "explain", "predict", "export", "check", "shapes", "doctor", "ablate")


def main(arguments: list[str] | None = None) -> int:
    """Run ``sim-m2f COMMAND ...``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="sim-m2f", description="Instance masks learned from bounding boxes alone."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"sim_m2f.tools.{name}")
        summary = module.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(module=module)
    parsed = parser.parse_args(arguments)
    return guarded(parsed.module, parsed)


def guarded(module: ModuleType, parsed: argparse.Namespace) -> int:
    """Run a command; a mistake of the user becomes lines on standard error and exit status 2."""
    if not torch.cuda.is_available():
        keep_freed_memory()
    try:
        return module.run(parsed)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
