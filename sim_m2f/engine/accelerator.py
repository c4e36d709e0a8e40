"""Devices, ranks, mixed precision and trackers, by accelerate."""

from importlib.util import find_spec

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState

from sim_m2f.config import CfgNode
from sim_m2f.errors import UserError


def build_accelerator(cfg: CfgNode) -> Accelerator:
    """What MODEL.DEVICE, SOLVER.AMP and TRACKERS ask for.

    Raises:
        UserError: they ask for a GPU or for a package that is not there.
    """
    device, amp = cfg.MODEL.DEVICE, cfg.SOLVER.AMP
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        advice = "set MODEL.DEVICE cpu, or see 'sim-m2f doctor'"
        raise UserError(f"MODEL.DEVICE: cuda, but PyTorch sees no GPU; {advice}")
    precision, cpu = "no", device == "cpu" or not has_gpu
    if cpu:
        computes = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        precision = "bf16" if amp.ENABLED and amp.ON_CPU and computes else "no"
    elif amp.ENABLED:
        automatic = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        precision = automatic if amp.DTYPE == "auto" else amp.DTYPE
    missing = [name for name in cfg.TRACKERS if find_spec(name) is None]
    if missing:
        raise UserError(f"TRACKERS: the package {missing[0]} is not installed; pip install {missing[0]}")
    _forget_earlier_run(cpu, precision)
    return Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        log_with=list(cfg.TRACKERS) or None,  # it warns of an empty list
        project_dir=cfg.OUTPUT_DIR,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def _forget_earlier_run(cpu: bool, precision: str) -> None:
    """Let accelerate, which has one state per process, take another device or precision than an earlier run.

    That run keeps its own state, but its ``autocast`` is from now on that of the new one. Ranks, processes of
    one run, keep theirs.
    """
    known = AcceleratorState._shared_state
    if not known or dist.is_initialized():
        return
    if (known["_mixed_precision"], known["device"].type == "cpu") != (precision, cpu):
        for state in (AcceleratorState, PartialState):
            state._shared_state = type(state.__dict__["_shared_state"])()
