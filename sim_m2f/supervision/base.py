"""What supervision by boxes and by masks share: deep supervision, classification, the step counter."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sim_m2f.config import CfgNode
from sim_m2f.distributed import mean_over_ranks, number_over_ranks
from sim_m2f.supervision.matcher import Match
from sim_m2f.supervision.targets import Targets

Outputs = dict[str, Any]


class Criterion(nn.Module):
    """Base of both criteria: deep supervision, classification, the step counter (part of ``state_dict``).

    ``criterion(outputs, targets, images, teacher_outputs=None, bank=None)`` returns weighted scalars by name,
    each the sum over the decoder layers and normalised over all ranks; their sum is the training loss.

    Args of the call:
        outputs: {"pred_logits": (B, Q, C+1), "pred_masks": (B, Q, h, w) logits at stride 4, "mask_features",
            "aux_outputs": [the first two, per earlier layer]}.
        targets: per picture {"labels": (N,) int64, "boxes": (N, 4) float xyxy in pixels of the input,
            "valid": (H, W) bool, optional, False on padding and on rows without usable annotation,
            "masks": (N, H, W), only for mask supervision}.
        images: (B, 3, H, W), as the network got them.
        teacher_outputs: the teacher's outputs for the same pictures.
        bank: of copy-paste; the pictures enter it with their pseudo masks.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.former = cfg.MODEL.MASK_FORMER
        self.classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.step = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def layers(self, outputs: Outputs) -> list[dict[str, Tensor]]:
        """The outputs that are supervised, the last layer's last."""
        earlier = outputs["aux_outputs"] if self.former.DEEP_SUPERVISION else []
        return [*earlier, {name: outputs[name] for name in ("pred_logits", "pred_masks")}]

    def classification(self, logits: Tensor, targets: Targets, match: Match) -> Tensor:
        """Cross-entropy of all queries of all layers, "no object" for those without an object."""
        layers, batch, queries, _ = logits.shape
        # a column more takes the labels of the objects that are left over
        wanted = logits.new_full((layers, batch, queries + 1), self.classes, dtype=torch.int64)
        layer = torch.arange(layers, device=logits.device)[:, None].expand_as(match.query)
        picture, labels = targets.picture.expand_as(match.query), targets.labels.expand_as(match.query)
        query = torch.where(match.matched, match.query, queries)
        wanted = wanted.index_put((layer, picture, query), labels)[:, :, :-1]
        weight = logits.new_ones(self.classes + 1)
        weight[-1] = self.former.NO_OBJECT_WEIGHT
        loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight, reduction="none")
        total = mean_over_ranks(weight[wanted].flatten(1).sum(1))
        return (loss.view(layers, -1).sum(1) / total).sum()


def matched_masks(mask_logits: list[Tensor], match: Match, targets: Targets) -> Tensor:
    """(L, T, h, w) float32: the mask logits of the query that claims each object, per layer."""
    return torch.stack(
        [layer[targets.picture, query].float() for layer, query in zip(mask_logits, match.query, strict=True)]
    )


def per_object(loss: Tensor, match: Match, targets: Targets) -> Tensor:
    """Sum over layers and matched objects of a loss (L, T), per annotated object of a mean rank."""
    return (loss * match.matched).sum() / number_over_ranks(loss.new_full((), targets.annotated))


@torch.no_grad()
def mask_profiles(mask_logits: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(L, B, Q, w) and (L, B, Q, h): the largest mask probability of every column and of every row."""
    along_x = torch.stack([layer.amax(-2) for layer in mask_logits]).float().sigmoid()
    along_y = torch.stack([layer.amax(-1) for layer in mask_logits]).float().sigmoid()
    return along_x, along_y
