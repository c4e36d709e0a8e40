"""Train, go on with a run, or evaluate a checkpoint."""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from sim_m2f.config import CfgNode, extent_warning, get_cfg, validate, without_effect
from sim_m2f.distributed import leave_group
from sim_m2f.engine.launch import end_with_launcher, is_first_of_launched, launch
from sim_m2f.engine.run_folder import refuse_used
from sim_m2f.errors import UserError, file_problem, memory_problem, rank_problem
from sim_m2f.files import expanded
from sim_m2f.own_folder import locked

MOST = 1024  # machines, or processes of one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of Mask2Former's train_net.py."""
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML file of the configuration")
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    folder.add_argument("--overwrite", action="store_true", help="remove the run that OUTPUT_DIR holds")
    weights = "MODEL.WEIGHTS; where empty or timm://, or with --resume, OUTPUT_DIR's last checkpoint"
    parser.add_argument("--eval-only", action="store_true", help=f"evaluate {weights}")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes per machine")
    parser.add_argument("--num-machines", type=int, default=1, help="machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    parser.add_argument("--dist-url", default="tcp://127.0.0.1:29500", help="address of machine 0")
    restarts = "start all ranks again so often where one dies; they go on from the last checkpoint"
    parser.add_argument("--max-restarts", type=_count, default=0, help=restarts)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of its keys")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 on")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Do what the flags ask for; returns the exit status."""
    for flag, least in {"num_gpus": 1, "num_machines": 1, "machine_rank": 0}.items():
        if not least <= getattr(arguments, flag) <= MOST:
            name = f"--{flag.replace('_', '-')}"
            raise UserError(f"{name} is {getattr(arguments, flag)}; give a number from {least} to {MOST}")
    if arguments.machine_rank >= arguments.num_machines:
        fault = f"is {arguments.machine_rank}, but --num-machines {arguments.num_machines}"
        raise UserError(f"--machine-rank {fault}; number the machines from 0")
    several = arguments.num_gpus * arguments.num_machines > 1 or arguments.max_restarts
    if several and "WORLD_SIZE" not in os.environ:
        return _launch(arguments)
    from sim_m2f.training import build_trainer, evaluate  # whoever launches ranks has no use for its packages

    end_with_launcher()
    cfg = configuration(arguments.config_file, arguments.opts)
    try:
        with locked(Path(cfg.OUTPUT_DIR)) if is_first_of_launched() else nullcontext():
            if arguments.eval_only:
                evaluate(cfg, arguments.resume)
            else:
                resume = arguments.resume or arguments.max_restarts > 0  # ``_launch`` has let no other run in
                build_trainer(cfg, resume, arguments.overwrite).train()
        leave_group()
    except SystemExit:  # of all ranks together
        leave_group()
        raise
    except Exception as error:
        if problem := rank_problem(error):
            print(f"error: {problem}", file=sys.stderr, flush=True)
            os._exit(2)  # an orderly exit might wait for the other rank
        problem = memory_problem(error) or file_problem(error)
        get_error_handler().record_exception(UserError(problem) if problem else error)  # for the launcher
        raise
    return 0


def configuration(config_file: str, overrides: list[str]) -> CfgNode:
    """``read_configuration``; tells which of its keys do nothing."""
    cfg = read_configuration(config_file, overrides)
    unheeded, warning = without_effect(cfg), extent_warning(cfg)
    if unheeded and is_first_of_launched():
        where = "see sim_m2f/config/without_effect.yaml"
        print(f"note: without effect here: {', '.join(unheeded)}; {where}", file=sys.stderr)
    if warning and is_first_of_launched():
        print(f"warning: {warning}", file=sys.stderr)
    return cfg


def read_configuration(config_file: str, overrides: list[str]) -> CfgNode:
    """The defaults, changed by a YAML file and by ``KEY VALUE`` pairs.

    Raises:
        UserError: a file, a key or a value has a fault.
    """
    cfg = get_cfg()
    if config_file:
        cfg.merge_from_file(config_file)
    cfg.merge_from_list([item for item in overrides if item != "--"])
    validate(cfg)
    cfg.OUTPUT_DIR = str(expanded(cfg.OUTPUT_DIR))
    cfg.freeze()
    return cfg


def _launch(arguments: argparse.Namespace) -> int:
    """Start the ranks of this machine with the same command line; its faults are told once, before that."""
    cfg = read_configuration(arguments.config_file, arguments.opts)
    if arguments.max_restarts and arguments.overwrite:
        advice = f"remove {cfg.OUTPUT_DIR} or choose another OUTPUT_DIR"
        raise UserError(f"--overwrite: would remove what a restart goes on with (--max-restarts); {advice}")
    if not (arguments.resume or arguments.overwrite or arguments.eval_only):
        refuse_used(Path(cfg.OUTPUT_DIR))
    machines = arguments.num_machines, arguments.machine_rank, arguments.dist_url
    return launch(sys.argv, cfg.OUTPUT_DIR, arguments.num_gpus, *machines, arguments.max_restarts)
