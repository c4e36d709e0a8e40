"""Training: the step is ``Trainer.step``, the run ``Trainer.train``; accelerate sees to devices and ranks."""

import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from sim_m2f.config import CfgNode
from sim_m2f.data.catalog import test_sources
from sim_m2f.data.copy_paste import Jitter, PasteBank, paste
from sim_m2f.data.dataset import TrainDataset
from sim_m2f.data.loader import test_loader, train_loader
from sim_m2f.distributed import gather_on_first_rank, max_over_ranks
from sim_m2f.engine.checkpoint import (
    last_checkpoint,
    load_checkpoint,
    load_weights,
    point_to,
    read_checkpoint,
    save_checkpoint,
)
from sim_m2f.engine.evaluator import evaluate
from sim_m2f.engine.logging import LossAverage, MetricsLogger, memory_gib, progress_bar
from sim_m2f.engine.method_maps import MethodView
from sim_m2f.engine.optimizer import build_optimizer, build_scheduler
from sim_m2f.errors import UserError
from sim_m2f.files import atomic_write
from sim_m2f.modeling import build_model
from sim_m2f.supervision.criterion import build_criterion
from sim_m2f.supervision.schedule import resolve_steps
from sim_m2f.supervision.teacher import Teacher
from sim_m2f.tools.method_pictures import FOLDER, drop_later_steps, write_method
from sim_m2f.tools.report import write_report


def build_accelerator(cfg: CfgNode) -> Accelerator:
    """Devices, ranks and mixed precision as MODEL.DEVICE and SOLVER.AMP ask for them."""
    device, amp = cfg.MODEL.DEVICE, cfg.SOLVER.AMP
    has_gpu = torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"MODEL.DEVICE: {device!r}; take auto, cpu or cuda (CUDA_VISIBLE_DEVICES chooses the GPU)"
        )
    if device == "cuda" and not has_gpu:
        raise UserError(
            "MODEL.DEVICE: cuda, but PyTorch sees no GPU; set MODEL.DEVICE cpu, or see 'sim-m2f doctor'"
        )
    if amp.DTYPE not in ("auto", "bf16", "fp16"):
        raise UserError(f"SOLVER.AMP.DTYPE: {amp.DTYPE!r}; take auto, bf16 or fp16")
    precision = "no"
    if amp.ENABLED and has_gpu and device != "cpu":
        automatic = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        precision = automatic if amp.DTYPE == "auto" else amp.DTYPE
    return Accelerator(cpu=device == "cpu", mixed_precision=precision)


def teaching_terms(cfg: CfgNode) -> list[str]:
    """The keys of the losses in use that need the teacher's outputs."""
    sim = cfg.MODEL.SIM
    uses = {
        "PAIRWISE.FEATURE_AFFINITY": sim.PAIRWISE.ENABLED and sim.PAIRWISE.FEATURE_AFFINITY,
        "PSEUDO_SEMANTIC": sim.PSEUDO_SEMANTIC.ENABLED,
        "SELF_CORRECTION": sim.SELF_CORRECTION.ENABLED,
        "COPY_PASTE": sim.COPY_PASTE.ENABLED,
    }
    return [f"MODEL.SIM.{term}" for term, used in uses.items() if used and sim.SUPERVISION == "box"]


class Trainer:
    """One run in ``cfg.OUTPUT_DIR``.

    Args:
        cfg: the configuration.
        resume: go on from the folder's last checkpoint, if it has one.

    Raises:
        UserError: the configuration, the data or a checkpoint has a fault.
    """

    def __init__(self, cfg: CfgNode, resume: bool = False) -> None:
        self.cfg = cfg
        self.output_dir = Path(cfg.OUTPUT_DIR)
        self.accelerator = build_accelerator(cfg)
        model = build_model(cfg).to(memory_format=torch.channels_last)
        self.checkpoint = last_checkpoint(self.output_dir) if resume else None
        state = read_checkpoint(self.checkpoint) if self.checkpoint else {}
        if self.checkpoint:
            load_weights(model, state.get("model", {}), self.checkpoint)
        elif cfg.MODEL.WEIGHTS:
            load_checkpoint(model, cfg.MODEL.WEIGHTS)
        self.criterion = build_criterion(cfg).to(self.accelerator.device)
        self.teacher = self._build_teacher(model)
        self.bank = self._build_bank()
        self.model, self.optimizer = self.accelerator.prepare(model, build_optimizer(model, cfg))
        self.scheduler = build_scheduler(self.optimizer.optimizer, cfg)
        self.iteration = 0
        if self.checkpoint:
            self._load_state(state, self.checkpoint)

    def train(self) -> None:
        """Train to SOLVER.MAX_ITER, with evaluations and checkpoints; SIGINT and SIGTERM stop it in order."""
        cfg, solver = self.cfg, self.cfg.SOLVER
        ranks = self.accelerator.process_index, self.accelerator.num_processes
        loader = train_loader(cfg, self.iteration, *ranks)
        self._write_config()
        logger = MetricsLogger(self.output_dir, self.iteration) if self.accelerator.is_main_process else None
        view = self._build_view(loader.dataset)
        show_period = max(1, round(resolve_steps(cfg.MODEL.SIM.SHOW.PERIOD, solver.MAX_ITER)))
        average = LossAverage()
        with progress_bar(self.iteration, solver.MAX_ITER, logger is not None) as bar, StopSignal() as stop:
            batches = iter(loader)
            while self.iteration < solver.MAX_ITER and not self._agreed(stop):
                average.add(self.step(next(batches)))
                bar.update()
                last = self.iteration == solver.MAX_ITER
                if last or self.iteration % solver.LOG_PERIOD == 0:
                    self._log(logger, bar, average.take())
                if view and (last or _due(self.iteration, show_period)):
                    self._show(view, logger)
                if last or _due(self.iteration, solver.CHECKPOINT_PERIOD):
                    self.save()
                if not last and _due(self.iteration, cfg.TEST.EVAL_PERIOD):
                    self.evaluate(logger)
        if self.iteration < solver.MAX_ITER:
            self.save()
            self.accelerator.print(
                f"stopped after step {self.iteration}; the same command with --resume goes on"
            )
            raise SystemExit(128 + self._agreed(stop))
        self.evaluate(logger)
        if logger:
            logger.close()
            self.report()

    def step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """One update of the weights; returns the losses. Its random numbers depend on seed, step and rank."""
        torch.manual_seed(_step_seed(self.cfg.SEED, self.iteration, self.accelerator.process_index))
        self.model.train()
        self.criterion.train()
        images = batch["images"].to(
            self.accelerator.device, memory_format=torch.channels_last, non_blocking=True
        )
        images, targets = self._pasted(images, batch["targets"])
        losses = self.criterion(self.model(images), targets, images, self._taught(images), self.bank)
        self.accelerator.backward(sum(losses.values()))
        clip = self.cfg.SOLVER.CLIP_GRADIENTS
        if clip.ENABLED:
            self.accelerator.clip_grad_norm_(self.model.parameters(), clip.CLIP_VALUE, clip.NORM_TYPE)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.teacher:
            self.teacher.update(self.accelerator.unwrap_model(self.model))
        self.iteration += 1
        return losses

    def _build_teacher(self, model: torch.nn.Module) -> Teacher | None:
        teacher = self.cfg.MODEL.SIM.TEACHER
        needed_by = teaching_terms(self.cfg) + ["TEST.USE_TEACHER"] * self.cfg.TEST.USE_TEACHER
        if needed_by and not teacher.ENABLED:
            raise UserError(f"{needed_by[0]} needs a teacher; set MODEL.SIM.TEACHER.ENABLED True")
        return Teacher(model, teacher.MOMENTUM).to(self.accelerator.device) if teacher.ENABLED else None

    def _build_bank(self) -> PasteBank | None:
        sim = self.cfg.MODEL.SIM
        if not sim.COPY_PASTE.ENABLED or sim.SUPERVISION != "box":
            return None
        return PasteBank(sim.COPY_PASTE.PICTURES, self.accelerator.device, sim.COPY_PASTE.SCORE_POWER)

    def _pasted(
        self, images: Tensor, targets: list[dict[str, Tensor]]
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The batch with objects of recent pictures on it, once copy-paste has started."""
        keys = self.cfg.MODEL.SIM.COPY_PASTE
        if self.bank is None or self.iteration < resolve_steps(keys.START, self.cfg.SOLVER.MAX_ITER):
            return images, targets
        moved = keys.SHIFT > 0 or keys.SCALE != (1.0, 1.0)
        jitter = Jitter(keys.SHIFT, keys.SCALE) if moved else None
        return paste(images, targets, self.bank, keys.PROBABILITY, keys.OBJECTS, jitter)

    def _taught(self, images: Tensor) -> dict[str, Any] | None:
        """The teacher's outputs, where a loss needs them, in the same precision as the student's."""
        if not teaching_terms(self.cfg):
            return None
        with self.accelerator.autocast():
            return self.teacher(images)

    def _build_view(self, dataset: TrainDataset) -> MethodView | None:
        """On the first rank, where there are pseudo masks to see; a former run's pictures of them go."""
        show = self.cfg.MODEL.SIM.SHOW
        if not self.accelerator.is_main_process:
            return None
        drop_later_steps(self.output_dir / FOLDER, self.iteration)
        wanted = show.PERIOD > 0 and show.PICTURES > 0 and teaching_terms(self.cfg)
        return MethodView(self.cfg, dataset, show.PICTURES, self.accelerator) if wanted else None

    def _show(self, view: MethodView, logger: MetricsLogger) -> None:
        """Draw what the method makes of some pictures; nothing that training uses changes."""
        maps = view.maps(self.model, self.teacher.network, self.criterion)
        for name, figure in write_method(self.output_dir / FOLDER, self.iteration, maps):
            logger.write_picture(self.iteration - 1, f"{FOLDER}/{name}", figure)

    def evaluate(self, logger: MetricsLogger | None = None) -> dict[str, float]:
        """Score every test set; with a logger the values also go to metrics.jsonl."""
        metrics: dict[str, float] = {}
        sources = test_sources(self.cfg)
        for source in sources:
            loader = test_loader(
                self.cfg, source, self.accelerator.process_index, self.accelerator.num_processes
            )
            folder = self.output_dir if source is sources[0] else self.output_dir / source.name
            scores = evaluate(
                self.teacher.network if self.cfg.TEST.USE_TEACHER else self.model,
                loader,
                folder,
                accelerator=self.accelerator,
                top_k=self.cfg.TEST.DETECTIONS_PER_IMAGE,
            )
            prefix = "" if source is sources[0] else f"{source.name}/"
            metrics.update({f"{prefix}{name}": value for name, value in scores.items()})
        if logger:
            logger.write(self.iteration - 1, metrics)
        return metrics

    def report(self) -> None:
        """Write the page of the first test set and say where it is."""
        source = test_sources(self.cfg)[0]
        page = write_report(self.output_dir, test_loader(self.cfg, source).dataset.data)
        print(f"Report: {page}")

    def save(self) -> None:
        """Write a checkpoint of everything that training changes; the run's former one goes.

        All ranks call it, rank 0 writes.
        """
        state = self._state()
        if not self.accelerator.is_main_process:
            return
        final = self.iteration == self.cfg.SOLVER.MAX_ITER
        path = self.output_dir / ("model_final.pth" if final else f"model_{self.iteration - 1:07d}.pth")
        save_checkpoint(path, state)
        point_to(path)
        if self.checkpoint not in (None, path) and not self.cfg.SOLVER.KEEP_CHECKPOINTS:
            self.checkpoint.unlink(missing_ok=True)
        self.checkpoint = path

    def _agreed(self, stop: "StopSignal") -> int:
        """The signal that any rank has received, 0 for none; ranks ask each other every LOG_PERIOD steps."""
        if self.accelerator.num_processes == 1:
            return stop.received
        if self.iteration % self.cfg.SOLVER.LOG_PERIOD:
            return 0
        return int(max_over_ranks(torch.tensor(stop.received, device=self.accelerator.device)))

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "criterion": self.criterion.state_dict(),
            "teacher": self.teacher.state_dict() if self.teacher else {},
            "use_teacher": self.cfg.TEST.USE_TEACHER,
            "banks": self._banks(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "iteration": self.iteration,
        }

    def _banks(self) -> list[dict[str, Any]]:
        """The state of every rank's paste bank, on the CPU; empty without copy-paste."""
        if self.bank is None:
            return []
        return gather_on_first_rank(send_to_device(self.bank.state_dict(), "cpu"))

    def _load_state(self, state: dict[str, Any], path: Path) -> None:
        try:
            self.criterion.load_state_dict(state["criterion"])
            if self.teacher:
                self.teacher.load_state_dict(state["teacher"])
            if self.bank is not None and state["banks"]:  # of a run without copy-paste there are none
                banks = state["banks"]
                self.bank.load_state_dict(banks[self.accelerator.process_index % len(banks)])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.accelerator.scaler and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.iteration = state["iteration"]
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{path}: belongs to another run ({error}); leave --resume away or change OUTPUT_DIR"
            ) from error

    def _log(self, logger: MetricsLogger | None, bar: Any, losses: dict[str, float]) -> None:
        if logger is None:
            return
        rate = bar.format_dict["rate"] or 0.0
        memory = memory_gib(self.accelerator.device)
        values = {
            **losses,
            "lr": max(self.scheduler.get_last_lr()),
            "steps_per_second": rate,
            "memory_gib": memory,
        }
        logger.write(self.iteration - 1, values)
        bar.set_postfix_str(f"loss {losses['total_loss']:.3f}, {memory:.1f} GiB")

    def _write_config(self) -> None:
        if self.accelerator.is_main_process:
            with atomic_write(self.output_dir / "config.yaml") as file:
                file.write(self.cfg.dump())


class StopSignal:
    """Notes SIGINT and SIGTERM instead of dying of them; a second one of either is not caught."""

    signals = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> "StopSignal":
        self.received = 0
        self.former = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def _note(self, number: int, _: Any) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()


def _step_seed(seed: int, iteration: int, rank: int) -> int:
    return ((seed % 2**16) * 2**32 + iteration) * 2**12 + rank


def _due(iteration: int, period: int) -> bool:
    return period > 0 and iteration % period == 0
