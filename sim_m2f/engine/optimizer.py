"""AdamW with Mask2Former's parameter groups, and the learning rate over the run."""

import math

import torch
from torch import nn

from sim_m2f.config import CfgNode
from sim_m2f.supervision.schedule import resolve_steps

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
UNDECAYED_NAMES = ("relative_position_bias_table", "absolute_pos_embed")


def parameter_groups(model: nn.Module, cfg: CfgNode) -> list[dict]:
    """Groups of equal learning rate and weight decay; backbone, norms and embeddings have their own."""
    solver = cfg.SOLVER
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            rate = solver.BASE_LR * (solver.BACKBONE_MULTIPLIER if module_name.startswith("backbone") else 1)
            decay = solver.WEIGHT_DECAY
            if isinstance(module, NORMS):
                decay = solver.WEIGHT_DECAY_NORM
            elif isinstance(module, nn.Embedding):
                decay = solver.WEIGHT_DECAY_EMBED
            elif name in UNDECAYED_NAMES:
                decay = 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


def build_optimizer(model: nn.Module, cfg: CfgNode) -> torch.optim.AdamW:
    """AdamW over ``parameter_groups``, updated in one fused call."""
    return torch.optim.AdamW(parameter_groups(model, cfg), lr=cfg.SOLVER.BASE_LR, fused=True)


def learning_rate_factor(iteration: int, cfg: CfgNode) -> float:
    """The learning rate of a step (0 is the first) in units of the base rate."""
    solver = cfg.SOLVER
    progress = min(iteration / solver.MAX_ITER, 1.0)
    warmup = 1.0
    if iteration < solver.WARMUP_ITERS:
        done = iteration / solver.WARMUP_ITERS if solver.WARMUP_METHOD == "linear" else 0.0
        warmup = solver.WARMUP_FACTOR * (1 - done) + done
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        passed = sum(iteration >= resolve_steps(step, solver.MAX_ITER) for step in solver.STEPS)
        return warmup * solver.GAMMA**passed
    if solver.LR_SCHEDULER_NAME == "WarmupPolyLR":
        return warmup * max((1 - progress) ** solver.POLY_LR_POWER, solver.POLY_LR_CONSTANT_ENDING)
    return warmup * 0.5 * (1 + math.cos(math.pi * progress))  # WarmupCosineLR


def build_scheduler(
    optimizer: torch.optim.Optimizer, cfg: CfgNode, iteration: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """``learning_rate_factor`` on every parameter group, from ``iteration`` on."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, cfg), last_epoch=iteration - 1
    )
