"""Training: the step is ``Trainer.step``, the run ``Trainer.train``; accelerate sees to devices and ranks."""

import io
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sim_m2f.config import CfgNode, cfg_from_text, changed_on_resume
from sim_m2f.data.loader import BatchIterator, train_loader
from sim_m2f.data.student_colors import student_colors
from sim_m2f.distributed import copy_from_first_rank, largest_number, share
from sim_m2f.draws import Seed, generator
from sim_m2f.engine.accelerator import build_accelerator
from sim_m2f.engine.evaluator import evaluate_all
from sim_m2f.engine.gradient_sum import GradientSum
from sim_m2f.engine.logging import LossAverage, MetricsLogger, add_to
from sim_m2f.engine.optimizer import build_optimizer, build_scheduler
from sim_m2f.engine.stop_signal import StopSignal
from sim_m2f.errors import UserError, first_line
from sim_m2f.modeling import build_model, compile_maps
from sim_m2f.pixels import Pixels
from sim_m2f.structures import Batch, Outputs, Size, Target
from sim_m2f.supervision.base import Criterion, Prepared, together
from sim_m2f.supervision.copy_paste import build_copy_paste
from sim_m2f.supervision.criterion import build_criterion
from sim_m2f.supervision.mask_shape import mask_shapes
from sim_m2f.supervision.matched import Matched
from sim_m2f.supervision.teacher import build_teacher, teacher_terms
from sim_m2f.weights import checkpoint as checkpoints
from sim_m2f.weights.sources import last_checkpoint

Part = tuple[Tensor, Sequence[Target], Sequence[Seed], Sequence[Size]]  # images, their targets, seeds, sizes


class Hook:
    """A run calls each of its hooks, in their order, on all ranks."""

    def before_train(self, trainer: "Trainer") -> None:
        """Before the first step, when data and networks are there."""

    def after_step(self, trainer: "Trainer", losses: dict[str, Tensor]) -> None:
        """After every step; ``trainer.iteration`` counts it already."""

    def after_train(self, trainer: "Trainer") -> None:
        """After the last step, unless the run was stopped."""


class Trainer:
    """One run in ``cfg.OUTPUT_DIR``.

    Attributes:
        observed: what the last step saw beside its losses: ``mask_shapes``.
        logger: what the hook ``Metrics`` opens on the first rank, for all hooks.

    Args:
        cfg: the configuration.
        hooks: what happens beside the steps, in this order.
        resume: go on from the folder's last checkpoint, if it has one.
        teacher: which network of the checkpoint that MODEL.WEIGHTS names; see ``load_checkpoint``.

    Raises:
        UserError: the configuration, the data or a checkpoint has a fault.
    """

    def __init__(
        self, cfg: CfgNode, hooks: Sequence[Hook] = (), resume: bool = False, teacher: bool | None = None
    ) -> None:
        self.cfg, self.hooks = cfg, hooks
        self.output_dir = Path(cfg.OUTPUT_DIR)
        self.logger: MetricsLogger | None = None
        self.accelerator = build_accelerator(cfg)
        model = build_model(cfg).to(memory_format=torch.channels_last)
        self.checkpoint = last_checkpoint(self.output_dir) if resume else None
        state = checkpoints.read_checkpoint(self.checkpoint) if self.checkpoint else {}
        if self.checkpoint:
            checkpoints.load_weights(model, state.get("model", {}), self.checkpoint)
        elif cfg.MODEL.WEIGHTS:
            checkpoints.load_checkpoint(model, cfg.MODEL.WEIGHTS, teacher=teacher)
        device, ranks = self.accelerator.device, self.accelerator.num_processes
        self.slots = share(cfg.SOLVER.IMS_PER_BATCH, self.accelerator.process_index, ranks)
        largest = -(-cfg.SOLVER.IMS_PER_BATCH // ranks)
        self.in_parts = 0 < cfg.SOLVER.IMAGES_AT_ONCE < largest  # the same on all ranks
        self.pixels = Pixels(cfg).to(device)
        self.criterion: Criterion = build_criterion(cfg).to(device)
        self.teacher_terms = teacher_terms(cfg)
        self.teacher = build_teacher(cfg, model, device)
        if cfg.MODEL.COMPILE != "none":
            for network in [model, *([self.teacher.network] if self.teacher else [])]:
                compile_maps(network, cfg.MODEL.COMPILE)
        self.copy_paste = build_copy_paste(cfg, device)
        self.model, self.optimizer = self.accelerator.prepare(model, build_optimizer(model, cfg))
        # ranks give each other their norms' statistics before an evaluation, not in every step
        self.model.broadcast_buffers = False  # of DDP, which warns of it as an argument
        # accelerate would turn all outputs into float32; masks that are matched become that, no others
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.iteration = self.saved = 0  # steps, and those in the checkpoint
        self.average, self.rate = LossAverage(), 0.0  # of the steps since they were logged; of the last step
        if self.checkpoint:
            self.previous = (
                cfg_from_text(state["config"], str(self.checkpoint)) if "config" in state else cfg
            )  # in older ones it is not
            self._load_state(state, self.checkpoint)
        self.scheduler = build_scheduler(self.optimizer.optimizer, cfg, self.iteration)

    def train(self) -> None:
        """Train to SOLVER.MAX_ITER with the hooks; SIGINT and SIGTERM stop it in order."""
        total, accelerator = self.cfg.SOLVER.MAX_ITER, self.accelerator
        if self.checkpoint:
            accelerator.print(self._resumed(), file=sys.stderr)
        ranks = accelerator.process_index, accelerator.num_processes
        with StopSignal() as self.stop:
            with self.stop.at_once(self.stopped):
                self.loader = train_loader(self.cfg, self.iteration, *ranks)
                for hook in self.hooks:
                    hook.before_train(self)
            start, hidden = self.iteration, not accelerator.is_main_process
            shown = sys.stderr if sys.stderr.isatty() else io.StringIO()  # a log gets lines, see ``Metrics``
            options = {"initial": start, "disable": hidden, "file": shown, "dynamic_ncols": True}
            self.bar = tqdm(None, "training", total, unit="step", **options)
            try:
                with self.bar:
                    self._take_steps(total)
            except SystemExit:
                accelerator.print(self.stopped)
                raise
            with self.stop.at_once(self.stopped):
                for hook in self.hooks:
                    hook.after_train(self)
                for tracker in accelerator.trackers:
                    tracker.finish()

    @property
    def stopped(self) -> str:
        """What a stopped run says last."""
        there = "" if self.saved == self.iteration else f" after step {self.saved}"
        return f"stopped after step {self.iteration}; the same command with --resume goes on{there}"

    def _resumed(self) -> str:
        """Where the run goes on, and with which other keys; UserError where it cannot."""
        if self.iteration > self.cfg.SOLVER.MAX_ITER:
            fault = f"SOLVER.MAX_ITER is {self.cfg.SOLVER.MAX_ITER}, but {self.checkpoint} has taken"
            raise UserError(f"{fault} {self.iteration} steps; set as many or more")
        changed = changed_on_resume(self.cfg, self.previous, str(self.checkpoint))
        return f"goes on after step {self.iteration}" + "".join(f"; {change}" for change in changed)

    def _take_steps(self, total: int) -> None:
        """Train up to step ``total``; a signal that any rank has received ends it with a checkpoint."""
        batches = iter(self.loader)
        batch = self._next(batches, total)
        while not (received := largest_number(self.stop.received)) and batch:
            losses = self.step(batch)
            self.bar.update()
            for hook in self.hooks:
                hook.after_step(self, losses)
            batch = self._next(batches, total)
        if received:
            self.save()
            batches.end()
            raise SystemExit(128 + received)

    def _next(self, batches: BatchIterator, total: int) -> Batch | None:
        """The next batch; None after step ``total``, or where a signal comes while workers make none."""
        while self.iteration < total and not self.stop.received:
            if (batch := batches.awaited()) is not None:
                return batch
        return None

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update of the weights; returns the losses, whose mean over the ranks is that of the batch.

        An image's random numbers depend on SEED, the step and its slot of the global batch.
        """
        seeds = [(self.cfg.SEED, self.iteration, slot) for slot in self.slots]
        torch.manual_seed(generator(seeds[0], "dropout").initial_seed())
        self.model.train()
        self.criterion.train()
        torch.backends.cudnn.benchmark = True  # in training, images have one size
        images = self.pixels.of_batch(batch["images"], batch["image_sizes"])
        targets: Sequence[Target] = [
            {**target, "seed": seed} for target, seed in zip(batch["targets"], seeds, strict=True)
        ]
        if self.copy_paste:
            images, targets = self.copy_paste(images, targets, self.iteration)
        losses, matched = self._add_gradients((images, targets, seeds, batch["image_sizes"]))
        self.criterion.update(*matched)
        if self.copy_paste:
            self.copy_paste.remember(images, matched, self.iteration)
        clip = self.cfg.SOLVER.CLIP_GRADIENTS
        if clip.ENABLED:
            self.accelerator.clip_grad_norm_(self.model.parameters(), clip.CLIP_VALUE, clip.NORM_TYPE)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rate = float(max(self.scheduler.get_last_lr()))
        self.scheduler.step()
        if self.teacher:
            self.teacher.update(self.accelerator.unwrap_model(self.model))
        torch.backends.cudnn.benchmark = False
        self.iteration += 1
        return losses

    def _add_gradients(self, batch: Part) -> tuple[dict[str, Tensor], list[Matched]]:
        """Those of this rank's images, SOLVER.IMAGES_AT_ONCE together; returns the sums of their losses."""
        parts = [batch]
        prepared: Sequence[Prepared | None] = [None]
        if self.in_parts:
            number = self.cfg.SOLVER.IMAGES_AT_ONCE
            images, targets, seeds, sizes = batch
            cuts = [slice(start, start + number) for start in range(0, len(images), number)]
            parts = [(images[cut], targets[cut], seeds[cut], sizes[cut]) for cut in cuts]
            prepared = together([self._prepared(part, own) for part, own, *_ in parts])
        sums: dict[str, Tensor] = {}
        self.observed: dict[str, Tensor] = {}
        done: list[Matched] = []
        exact = GradientSum(self.model.parameters()) if self.cfg.SOLVER.EXACT_SUMS else None
        for part, known in zip(parts, prepared, strict=True):
            ranks_add = part is parts[-1] and not exact
            with nullcontext() if ranks_add else self.accelerator.no_sync(self.model):
                losses, matched = self._losses(*part, known)
                self.accelerator.backward(sum(losses.values()))
            if exact:
                exact.collect()
            add_to(sums, losses)
            add_to(self.observed, mask_shapes(matched))
            done.append(replace(matched, predicted=matched.predicted.new_empty(0)))
        if exact:
            exact.give()
        return sums, done

    def _prepared(self, images: Tensor, targets: Sequence[Target]) -> Prepared:
        return self.criterion.prepare(targets, images, self._teacher_outputs(images, targets))

    def _losses(
        self,
        images: Tensor,
        targets: Sequence[Target],
        seeds: Sequence[Seed],
        sizes: Sequence[Size],
        prepared: Prepared | None,
    ) -> tuple[dict[str, Tensor], Matched]:
        """What the criterion makes of images that go through the networks together."""
        colors = self.cfg.INPUT.STUDENT_COLORS
        seen = student_colors(images, self.pixels, colors, seeds, sizes) if colors else images
        prompts = self.criterion.student_prompts(targets, images)
        self.accelerator.unwrap_model(self.model).backbone.draw_paths(seeds)
        with self.accelerator.autocast():
            outputs = self.model(seen, prompts=prompts)
        taught = None if prepared else self._teacher_outputs(images, targets)
        return self.criterion(outputs, targets, images, taught, prepared)

    def due(self, period: float) -> bool:
        """Whether this step ends the run, or a period of so many steps (0: no period)."""
        return self.iteration == self.cfg.SOLVER.MAX_ITER or (period > 0 and self.iteration % period == 0)

    def evaluate(self) -> dict[str, float]:
        """``evaluate_all`` of the network that TEST.USE_TEACHER names."""
        network = self.teacher.network if self.teacher and self.cfg.TEST.USE_TEACHER else self.model
        copy_from_first_rank([buffer for buffer in network.buffers() if buffer.is_floating_point()])
        with torch.compiler.set_stance("force_eager"):  # its images have many sizes
            return evaluate_all(self.cfg, network, self.accelerator)

    def save(self) -> None:
        """Write a checkpoint of everything that training changes; the run's previous one goes.

        All ranks call it, rank 0 writes, and none goes on before it has: a launcher kills all some seconds
        after the first one has ended.
        """
        average = self.average.state_dict()
        if self.accelerator.is_main_process:
            final = self.iteration == self.cfg.SOLVER.MAX_ITER
            path = self.output_dir / ("model_final.pth" if final else f"model_{self.iteration - 1:07d}.pth")
            previous = None if self.cfg.SOLVER.KEEP_CHECKPOINTS else self.checkpoint
            checkpoints.replace_checkpoint(path, self._state() | {"average": average}, previous)
            self.checkpoint = path
        largest_number(0)
        self.saved = self.iteration

    def _teacher_outputs(self, images: Tensor, targets: Sequence[Target]) -> Outputs | None:
        """Where a loss needs them, in the same precision as the student's."""
        if not self.teacher_terms or self.teacher is None:
            return None
        with self.accelerator.autocast():
            return self.teacher(images, self.criterion.teacher_prompts(targets, images))

    @property
    def _parts(self) -> dict[str, Any]:
        """What is saved beside the network, by its name in a checkpoint."""
        parts: dict[str, Any] = {"criterion": self.criterion}
        optional = {"teacher": self.teacher, "scaler": self.accelerator.scaler}
        return parts | {name: part for name, part in optional.items() if part}

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            **{name: part.state_dict() for name, part in self._parts.items()},
            "optimizer": self.optimizer.state_dict(),
            "config": self.cfg.dump(),
            "use_teacher": self.cfg.TEST.USE_TEACHER,
            "bank": self.copy_paste.bank.state_dict() if self.copy_paste else {},
            "iteration": self.iteration,
        }

    def _load_state(self, state: dict[str, Any], path: Path) -> None:
        try:
            for name, part in self._parts.items():
                if name != "scaler" or state.get(name):  # a run in another precision has none
                    part.load_state_dict(state[name])
            if self.copy_paste and state.get("bank"):  # a run without copy-paste has none
                self.copy_paste.bank.load_state_dict(state["bank"])
            optimizer = build_optimizer(self.accelerator.unwrap_model(self.model), self.previous)
            optimizer.load_state_dict(state["optimizer"])  # with its groups; those of this run may be others
            self.optimizer.optimizer.state.update(optimizer.state)
            self.average.load_state_dict(state.get("average", {}), self.accelerator.device)
            self.iteration = self.saved = int(state["iteration"])
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            advice = "leave --resume away or change OUTPUT_DIR"
            raise UserError(f"{path}: belongs to another run ({first_line(error)}); {advice}") from error
