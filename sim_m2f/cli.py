"""The console script ``sim-m2f``: one command per module of ``sim_m2f/commands``, imported when called."""

import argparse
import ast
import importlib
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from sim_m2f.allocator import keep_freed_memory
from sim_m2f.errors import UserError, file_problem, memory_problem
from sim_m2f.files import expanded

COMMANDS = (
    *("fit", "label", "propose", "serve", "train", "predict", "export", "check", "convert"),
    *("report", "explain", "shapes", "doctor", "ablate"),
)


class OneLineParser(argparse.ArgumentParser):
    """Tells a mistake as everything else here does, without the whole usage before it; ~ is the home."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", Path, _path)  # what arguments of type Path are read by

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see '{self.prog} --help'\n")


def _path(text: str) -> Path:
    """A path; shells leave the tilde of --output=~/x alone."""
    try:
        return expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(arguments: list[str] | None = None) -> int:
    """Run ``sim-m2f COMMAND ...``; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to put in order yet
    try:
        found = _command(arguments)
    finally:
        signal.signal(signal.SIGINT, before)
    return found if isinstance(found, int) else guarded(*found)


def _command(arguments: list[str]) -> tuple[ModuleType, argparse.Namespace] | int:
    """The command and what it is asked for; the exit status where a package is missing."""
    about = "Instance masks learned from bounding boxes alone."
    parser = OneLineParser(prog="sim-m2f", description=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        source = (Path(__file__).parent / "commands" / f"{name}.py").read_text(encoding="utf-8")
        summary = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
        command = commands.add_parser(name, help=summary, description=summary)
        if name in arguments[:1]:
            try:
                module = importlib.import_module(f"sim_m2f.commands.{name}")
            except ModuleNotFoundError as error:
                return _missing(error)
            module.add_arguments(command)
    parsed = parser.parse_args(arguments)  # which ends where there is no such command
    return module, parsed


def _missing(error: ModuleNotFoundError) -> int:
    print(f"error: the package {error.name} is missing; see 'sim-m2f doctor'", file=sys.stderr)
    return 2


def guarded(module: ModuleType, parsed: argparse.Namespace) -> int:
    """Run a command; a mistake of the user becomes lines on standard error and exit status 2.

    So does a missing package. Output that nobody reads any more (``doctor | head -1``) ends it silently.
    """
    try:
        torch = sys.modules.get("torch")  # what works without it is not to wait for it
        if torch and not torch.cuda.is_available():
            keep_freed_memory()
        status = module.run(parsed)
        sys.stdout.flush()
        return status
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "sim_m2f").startswith("sim_m2f"):
            raise
        return _missing(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit would flush into it
        return 128 + signal.SIGPIPE
    except Exception as error:
        problem = memory_problem(error) or file_problem(error)
        if problem is None:
            raise
        print(f"error: {problem}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
