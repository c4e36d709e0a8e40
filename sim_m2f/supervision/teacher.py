"""The teacher: an exponential moving average of the whole network (mean teacher, https://arxiv.org/abs/1703.01780)."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sim_m2f.config import CfgNode
from sim_m2f.distributed import copy_from_first_rank
from sim_m2f.errors import UserError
from sim_m2f.structures import Outputs, Prompts


def teacher_terms(cfg: CfgNode) -> list[str]:
    """The keys of the losses in use that need the teacher's outputs.

    Raises:
        UserError: they do, or TEST.USE_TEACHER does, and there is no teacher.
    """
    sim = cfg.MODEL.SIM
    uses = {
        "PAIRWISE.FEATURE_AFFINITY": sim.PAIRWISE.ENABLED and sim.PAIRWISE.FEATURE_AFFINITY,
        "PSEUDO_SEMANTIC": sim.PSEUDO_SEMANTIC.ENABLED,
        "SELF_CORRECTION": sim.SELF_CORRECTION.ENABLED,
        "GATED_MASKS": sim.GATED_MASKS.ENABLED,
        "COPY_PASTE": sim.COPY_PASTE.ENABLED and not sim.COLOR_MODEL.ENABLED,
    }
    terms = [f"MODEL.SIM.{term}" for term, used in uses.items() if used and sim.SUPERVISION != "mask"]
    needed_by = [*terms, *(["TEST.USE_TEACHER"] if cfg.TEST.get("USE_TEACHER") else [])]
    if needed_by and not sim.TEACHER.ENABLED:
        raise UserError(f"{needed_by[0]} needs a teacher; set MODEL.SIM.TEACHER.ENABLED True")
    return terms


class Teacher(nn.Module):
    """Weights follow the student's: teacher <- m teacher + (1 - m) student.

    At the n-th update m = min(momentum, (1 + n) / (10 + n)), so that the first steps are forgotten quickly.
    Buffers are copied; the statistics of batch norms, which differ from rank to rank, are those of rank 0.

    It computes without gradient and in evaluation mode, whatever the student's mode.

    Args:
        student: the network; a copy of it is kept.
        momentum: m after the ramp, 0 to 1.
    """

    def __init__(self, student: nn.Module, momentum: float) -> None:
        super().__init__()
        self.network = copy.deepcopy(student).requires_grad_(False).eval()
        self.momentum = momentum
        self.norms = [module for module in self.network.modules() if isinstance(module, _BatchNorm)]
        self.updates = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"updates": self.updates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]

    def train(self, mode: bool = True) -> "Teacher":
        return self

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move a step towards the student's weights, all tensors in one fused call."""
        momentum = min(self.momentum, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.network.parameters()), list(student.parameters()), 1 - momentum)
        buffers = list(self.network.buffers())
        if buffers:
            torch._foreach_copy_(buffers, list(student.buffers()))
        copy_from_first_rank([buffer for norm in self.norms for buffer in norm.buffers()])
        self.updates += 1

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Prompts | None = None) -> Outputs:
        """The network's outputs for (B, 3, H, W) images."""
        return self.network(images, prompts=prompts) if prompts else self.network(images)


def build_teacher(cfg: CfgNode, student: nn.Module, device: torch.device) -> Teacher | None:
    """A teacher that starts as the student, if MODEL.SIM.TEACHER.ENABLED."""
    keys = cfg.MODEL.SIM.TEACHER
    return Teacher(student, keys.MOMENTUM).to(device) if keys.ENABLED else None
