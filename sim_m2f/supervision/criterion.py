"""The losses of a training step from boxes: match queries to boxes, then one line per loss.

A loss is a file beside this one with a function of ``MatchedBoxes``, a line of ``TERMS`` and its keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sim_m2f.config import CfgNode
from sim_m2f.distributed import mean_over_ranks
from sim_m2f.pixels import Pixels
from sim_m2f.structures import STRIDE, Outputs, Target
from sim_m2f.supervision.affinity import alike_edges
from sim_m2f.supervision.base import Criterion, Prepared, normalised
from sim_m2f.supervision.box_edges import BoxEdges, box_edges
from sim_m2f.supervision.box_fill import box_fill
from sim_m2f.supervision.color_model import ColorLabels, color_labels
from sim_m2f.supervision.color_term import color_model
from sim_m2f.supervision.fill_guard import fill_guard
from sim_m2f.supervision.gated_masks import gated_masks
from sim_m2f.supervision.known_masks import known_masks, known_truth
from sim_m2f.supervision.label_terms import pseudo_semantic, self_correction
from sim_m2f.supervision.layers import Layers
from sim_m2f.supervision.level_set import level_set
from sim_m2f.supervision.mask_criterion import MaskCriterion
from sim_m2f.supervision.matched import Matched, MatchedBoxes, Supervision
from sim_m2f.supervision.matcher import BoxMatcher, Match, Matcher, assign
from sim_m2f.supervision.pairwise import pairwise
from sim_m2f.supervision.paste_loss import copy_paste
from sim_m2f.supervision.pasted_targets import settled
from sim_m2f.supervision.projection import projection
from sim_m2f.supervision.prompting import match_prompts, prompt_queries
from sim_m2f.supervision.pseudo_masks import IGNORED, PseudoLabels, PseudoMasks
from sim_m2f.supervision.schedule import fade_out, resolve_steps, term_weight
from sim_m2f.supervision.targets import Targets, box_pixels, map_size

# The losses by name: their group of keys under MODEL.SIM, and the function that computes them.
TERMS: dict[str, tuple[str, Callable[[MatchedBoxes], Tensor]]] = {
    "loss_projection": ("PROJECTION", projection),
    "loss_pairwise": ("PAIRWISE", pairwise),
    "loss_box_fill": ("BOX_FILL", box_fill),
    "loss_fill_guard": ("FILL_GUARD", fill_guard),
    "loss_pseudo_semantic": ("PSEUDO_SEMANTIC", pseudo_semantic),
    "loss_self_correction": ("SELF_CORRECTION", self_correction),
    "loss_level_set": ("LEVEL_SET", level_set),
    "loss_gated_masks": ("GATED_MASKS", gated_masks),
    "loss_color_model": ("COLOR_MODEL", color_model),
    "loss_copy_paste": ("COPY_PASTE", copy_paste),
    "loss_known_masks": ("KNOWN_MASKS", known_masks),
}
LABELLED = ("PSEUDO_SEMANTIC", "SELF_CORRECTION", "GATED_MASKS")  # groups of those that need pseudo masks


class SIMCriterion(Criterion):
    """Learning from boxes (SIM, CVPR 2023) and from known masks; see ``Criterion`` for the call."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.sim = cfg.MODEL.SIM
        matcher = self.sim.MATCHER
        self.matcher = BoxMatcher(matcher.CLASS_WEIGHT, matcher.PROJECTION_WEIGHT, matcher.BOX_WEIGHT)
        self.pseudo_masks = PseudoMasks(cfg)
        self.pixels = Pixels(cfg)

    def forward(
        self,
        outputs: Outputs,
        targets: Sequence[Target],
        images: Tensor,
        teacher_outputs: Outputs | None = None,
        prepared: Prepared | None = None,
    ) -> tuple[dict[str, Tensor], MatchedBoxes]:
        with torch.autocast(images.device.type, enabled=False):
            layers = self.layers(outputs)
            objects, match, labels = self._matched(layers, targets, teacher_outputs)
            features = teacher_outputs["mask_features"] if teacher_outputs else None
            edges = None
            if prepared is not None:
                labels, features, edges = prepared.labels, prepared.features, prepared.edges
            supervision = self._supervision(objects, targets, images, features, labels, edges)
            numbers = prepared.numbers if prepared else mean_over_ranks(self._numbers(objects, supervision))
            objects = normalised(objects, numbers)
            colors = self._colors(outputs, objects, match, supervision)
            supervision = replace(supervision, colors=colors, truth=known_truth(targets, images.device))
            matched = MatchedBoxes(objects, match, layers.masks, supervision)
            return self.all_losses(outputs, layers, matched, self._losses), matched

    @torch.no_grad()
    def prepare(
        self, targets: Sequence[Target], images: Tensor, teacher_outputs: Outputs | None = None
    ) -> Prepared:
        with torch.autocast(images.device.type, enabled=False):
            objects, labels, features = self.objects(targets, images), None, None
            if teacher_outputs is not None:
                taught, matcher = self.teacher_layers(teacher_outputs)
                features = teacher_outputs["mask_features"]
                labels = self.pseudo_masks(taught, features, objects, matcher(taught, objects))
            supervision = self._supervision(objects, targets, images, features, labels)
            return Prepared(self._numbers(objects, supervision), labels, features, supervision.edges)

    def update(self, *matched: Matched) -> None:
        """A training step more; the prototypes follow the teacher's features."""
        super().update(*matched)
        parts = []
        for part in matched:
            assert isinstance(part, MatchedBoxes)
            features, labels = part.supervision.teacher_features, part.supervision.labels
            if labels is not None and features is not None:
                parts.append((features, part.objects, labels))
        if parts:
            self.pseudo_masks.update(parts)

    def teacher_layers(self, outputs: Outputs) -> tuple[Layers, Matcher]:
        """The teacher's layers that pseudo masks are made of, and who finds the objects in them.

        They are those of the prompted queries where the teacher was prompted; the last one alone without
        MODEL.SIM.POSITIVE_MASKS.WEIGHTING.
        """
        prompted = outputs.get("prompted")
        layers = self.layers(prompted or outputs)
        layers = layers if self.sim.POSITIVE_MASKS.WEIGHTING else layers.last
        return layers, match_prompts if prompted else self.matcher

    def _losses(self, layers: Layers, matched: MatchedBoxes, background: bool = True) -> dict[str, Tensor]:
        """The losses of a group of queries, by name.

        A loss that starts later is there from the first step on, one that has faded out is gone, and one
        whose labels nobody has given is left out.
        """
        losses = {"loss_ce": self.classification(layers.logits, matched.objects, matched.match, background)}
        made = matched.supervision
        given: dict[str, object] = dict.fromkeys(LABELLED, made.labels)
        given |= {"COLOR_MODEL": made.colors, "KNOWN_MASKS": made.truth}
        for name, (group, term) in TERMS.items():
            keys = self.sim[group]
            weight = term_weight(keys, self.step, self.max_iter)
            enabled = keys.ENABLED if "ENABLED" in keys else weight > 0
            if enabled and given.get(group, ()) is not None:
                losses[name] = weight * term(matched)
        return losses

    @torch.no_grad()
    def _matched(
        self, layers: Layers, targets: Sequence[Target], teacher_outputs: Outputs | None
    ) -> tuple[Targets, Match, PseudoLabels | None]:
        """The objects, the student's match, and the labels that the teacher makes, by one transfer.

        The costs of both networks' queries come to the host together, and with them what copy-paste has left
        of the objects.
        """
        taught, matcher = self.teacher_layers(teacher_outputs) if teacher_outputs else (None, self.matcher)
        seen = [layers.seen, *([taught.seen] if taught and matcher is self.matcher else [])]
        logits, along_x, along_y = (torch.cat(parts) for parts in zip(*seen, strict=True))
        where = map_size(layers.masks), layers.masks.device
        cost = partial(self.matcher.cost, logits, along_x, along_y)
        objects, costs = settled(targets, *where, cost)
        match, rest = assign(costs, objects).split(len(layers.logits))
        if taught is None or teacher_outputs is None:
            return objects, match, None
        if matcher is not self.matcher:
            rest = matcher(taught, objects)
        return objects, match, self.pseudo_masks(taught, teacher_outputs["mask_features"], objects, rest)

    def _supervision(
        self,
        objects: Targets,
        targets: Sequence[Target],
        images: Tensor,
        features: Tensor | None,
        labels: PseudoLabels | None,
        edges: BoxEdges | None = None,
    ) -> Supervision:
        """What is known without the student; edges that are given are not looked for again."""
        rgb, valid, keys = self.pixels.undo(images), _valid(targets, images), self.sim.PAIRWISE
        pixels = box_pixels(objects, keys.DILATION)
        if keys.ENABLED and edges is None:
            edges = box_edges(pixels, objects, alike_edges(rgb, valid, features, keys), keys.DILATION)
        run = self.sim, self.points, self.step, self.max_iter
        return Supervision(*run, rgb, valid, pixels, features, labels, None, edges=edges)

    def _numbers(self, objects: Targets, supervision: Supervision) -> Tensor:
        """(6,) float64: the ``Numbers`` of the objects."""
        edges = labelled = torch.zeros((), dtype=torch.float64, device=objects.labels.device)
        if supervision.edges is not None:
            counted = supervision.edges.weight.sum(0) * objects.by_box[supervision.pixels.target]
            edges = counted.sum().double()
        if (labels := supervision.labels) is not None:
            labelled = ((labels.final != IGNORED) & objects.by_box[labels.pixels.target]).sum().double()
        return torch.cat([self.own_numbers(objects), torch.stack([edges, labelled])])

    def _colors(
        self, outputs: Outputs, objects: Targets, match: Match, supervision: Supervision
    ) -> ColorLabels | None:
        """Masks corrected by colour, of the prompted queries or, without any, of the matched ones.

        An object that has no query begins from logits 0, and its quality is 0.
        """
        keys = self.sim.COLOR_MODEL
        if not keys.ENABLED or term_weight(keys, self.step, self.max_iter) == 0:
            return None
        masks, query, found = outputs["pred_masks"], match.query[-1], match.matched[-1]
        if "prompted" in outputs:
            masks, query = outputs["prompted"]["pred_masks"], prompt_queries(objects)
            found = torch.ones_like(found)
        prior = fade_out(self.step, resolve_steps(keys.PRIOR, self.max_iter))
        logits = masks[objects.image_index, query].float().masked_fill(~found[:, None, None], 0)
        made = color_labels(logits, supervision.images, supervision.valid, objects, keys, prior)
        return replace(made, quality=made.quality * found)


def build_criterion(cfg: CfgNode) -> Criterion:
    """The criterion that MODEL.SIM.SUPERVISION names, its prototypes drawn from ``cfg.SEED``."""
    kinds: dict[str, type[Criterion]] = {"box": SIMCriterion, "mixed": SIMCriterion, "mask": MaskCriterion}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.SEED)
        return kinds[cfg.MODEL.SIM.SUPERVISION](cfg)


def _valid(targets: Sequence[Target], images: Tensor) -> Tensor:
    """(B, h, w) bool: pixels at stride 4 that lie wholly on usable pixels; all where nothing is said."""
    whole = torch.ones(images.shape[-2:], dtype=torch.bool, device=images.device)
    each = [target.get("valid", whole).to(images.device, non_blocking=True) for target in targets]
    return F.avg_pool2d(torch.stack(each).float(), STRIDE) == 1
