"""Collects runs on real images: their scores, and how well they label given boxes.

    python benchmarks/real.py people boxinst=output/people_boxinst sim=output/people_sim ...

Adds a row per run folder to benchmarks/results/real_<set>.json, in place of one of the same row, seed, steps
and settings. "label/mIoU" is the mean IoU, in percent, of true masks and the network's masks for the true
boxes of the validation images, clipped to the boxes: of prompted queries, or without prompts of the queries
matched to the boxes; "label/mIoU colors" that of the same masks corrected by colour. With --settings the rows
are exploratory and carry that text; with --opts KEY VALUE they are evaluated anew, with these keys. Without
runs, prints the file as a table of means, smallest and largest values of the seeds, with shares of the row
"mask", and draws docs/real_<set>.png.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor
from tqdm import tqdm

from sim_m2f.config import CfgNode, get_cfg
from sim_m2f.data.catalog import data_sources
from sim_m2f.data.coco import read_coco, read_mask
from sim_m2f.data.loader import eval_loader
from sim_m2f.engine.evaluator import evaluate_all
from sim_m2f.modeling import Mask2Former, build_model
from sim_m2f.modeling.postprocess import masks_in_boxes
from sim_m2f.modeling.tiles import tiled
from sim_m2f.pixels import Pixels
from sim_m2f.structures import Target
from sim_m2f.supervision.color_model import FINER, corrected_masks
from sim_m2f.supervision.layers import Layers
from sim_m2f.supervision.matcher import BoxMatcher
from sim_m2f.supervision.prompting import annotated_prompts
from sim_m2f.supervision.targets import flatten_targets
from sim_m2f.weights.checkpoint import load_checkpoint

RESULTS = Path(__file__).parent / "results"
SCORES = ("segm/AP", "segm/AP75", "boxfill/AP")
LABELS = ("label/mIoU", "label/mIoU colors")
BOXES, MASKS, SEED = "#56b4e9", "#000000", "#d55e00"  # colours of the figure
NAMES = {  # of rows in the figure
    "boxinst": "BoxInst",
    "feature_affinity": "BoxInst + features",
    "pseudo_semantic": "BoxInst + pseudo masks",
    "self_correction": "SIM without weighting",
    "sim": "SIM",
    "copy_paste": "SIM + copy-paste",
    "level_set": "BoxInst + level set",
    "gate": "BoxInst + quality gate",
    "prompts": "BoxInst + prompts",
    "colors": "BoxInst + colours",
    "best": "best recipe",
    "mask": "masks",
}


def trained(run: Path) -> tuple[CfgNode, Mask2Former]:
    """A run's configuration and its network."""
    cfg = get_cfg()
    cfg.merge_from_file(run / "config.yaml")
    network = build_model(cfg)
    load_checkpoint(network, run / "model_final.pth", complete=True)
    on_gpu = torch.cuda.is_available() and cfg.MODEL.DEVICE != "cpu"
    return cfg, network.eval().to("cuda" if on_gpu else "cpu")


@torch.no_grad()
def box_masks(cfg: CfgNode, network: Mask2Former, images: Tensor, targets: list[Target]) -> Tensor:
    """(N, h, w): the mask logits of one image's N annotated boxes."""
    if cfg.MODEL.SIM.PROMPTS.ENABLED:
        prompts = annotated_prompts(targets, images.shape[-2:], images.device)
        return tiled(network, images, cfg.TEST.TILE, prompts)["prompted"]["pred_masks"][0]
    outputs = tiled(network, images, cfg.TEST.TILE)
    objects = flatten_targets(targets, outputs["pred_masks"].shape[-2:], images.device)
    keys = cfg.MODEL.SIM.MATCHER
    matcher = BoxMatcher(keys.CLASS_WEIGHT, keys.PROJECTION_WEIGHT, keys.BOX_WEIGHT)
    match = matcher(Layers(outputs["pred_logits"][None].float(), outputs["pred_masks"][:, None]), objects)
    return outputs["pred_masks"][0, match.query[0]]


def label_ious(cfg: CfgNode, network: Mask2Former) -> Tensor:
    """(2, N): IoU of the true masks of validation and the network's for their boxes, then corrected ones."""
    source = data_sources(cfg, "TEST")[0]
    truth = read_coco(source, read_masks=True)
    batches = eval_loader(cfg, source)
    device = next(network.parameters()).device
    normalised = Pixels(cfg).to(device)
    ious = []
    for batch, image in zip(tqdm(batches, "label", leave=False, disable=None), truth.images, strict=True):
        if not len(image.labels):
            continue
        images = normalised.of_batch(batch["images"], batch["image_sizes"])
        logits = box_masks(cfg, network, images, batch["targets"])
        given, size = batch["targets"][0]["boxes"], batch["image_sizes"][0]
        pixels = batch["images"][0].to(device)
        corrected = corrected_masks(logits, pixels, given, size, cfg.MODEL.SIM.COLOR_MODEL)
        boxes, original = torch.from_numpy(image.boxes).float().to(device), batch["original_sizes"][0]
        masks, _ = masks_in_boxes(logits, boxes, size, original)
        fine, _ = masks_in_boxes(corrected, boxes, (FINER * size[0], FINER * size[1]), original)
        for index, pair in enumerate(torch.stack([masks, fine], dim=1)):
            true = torch.from_numpy(read_mask(truth, image, index)).bool().to(device)
            ious.append((pair & true).sum((1, 2)) / (pair | true).sum((1, 2)).clamp(min=1))
    return torch.stack(ious, dim=1)


def scores_of(run: Path, cfg: CfgNode, network: Mask2Former, opts: Sequence[str]) -> dict[str, float]:
    """The run's own, or those with other keys."""
    if not opts:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "segm/AP" in line][-1]
    with tempfile.TemporaryDirectory() as folder:
        cfg.merge_from_list([*opts, "OUTPUT_DIR", folder])
        return evaluate_all(cfg, network, Accelerator(cpu=not next(network.parameters()).is_cuda))


def measure(row: str, run: Path, settings: str, opts: Sequence[str] = ()) -> dict[str, str | float]:
    """The row of a finished run; minutes are those from the first step to the last checkpoint."""
    cfg, network = trained(run)
    scores = scores_of(run, cfg, network, opts)
    seconds = (run / "model_final.pth").stat().st_mtime - (run / "config.yaml").stat().st_mtime
    device = torch.cuda.get_device_name() if next(network.parameters()).is_cuda else "CPU"
    network_only, corrected = (100 * label_ious(cfg, network).mean(1)).tolist()
    return {
        "row": row,
        **({"settings": settings} if settings else {}),
        "seed": cfg.SEED,
        "steps": cfg.SOLVER.MAX_ITER,
        "minutes": round(seconds / 60, 1),
        "device": device,
        **{name: round(scores[name], 2) for name in SCORES},
        "label/mIoU": round(network_only, 2),
        "label/mIoU colors": round(corrected, 2),
    }


def read_rows(file: Path) -> list[dict]:
    """The rows of a results file, none where it is not there."""
    return json.loads(file.read_text()) if file.exists() else []


def store(path: Path, row: dict[str, str | float]) -> None:
    """Put a row into a results file, in place of one of the same row, settings, seed and steps."""
    key = ("row", "settings", "seed", "steps")
    rows = [old for old in read_rows(path) if [old.get(k) for k in key] != [row.get(k) for k in key]] + [row]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(f" {json.dumps(entry)}" for entry in rows) + "\n]\n")


def cell(values: Sequence[float]) -> str:
    """Mean, and smallest and largest of several."""
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{spread}"


def share_of(values: Sequence[float], whole: Sequence[float]) -> str:
    """Of the mean of ``whole``, that of ``values``; nothing where there is no such mean, or it is 0."""
    return f"{fmean(values) / fmean(whole):.2f}" if any(whole) else ""


def groups(rows: Sequence[dict]) -> dict[tuple[str, str, int], list[dict]]:
    """The rows of each kind, with its name, settings and steps, the shortest and worst first."""
    found: dict[tuple[str, str, int], list[dict]] = {}
    for row in rows:
        found.setdefault((row["row"], row.get("settings", ""), row["steps"]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0][2], fmean(r["segm/AP"] for r in item[1]))))


def print_table(rows: Sequence[dict]) -> None:
    """A Markdown table; shares are those of the means of the row "mask" with as many steps."""
    headings = (
        "row",
        "steps",
        "seeds",
        "AP",
        "AP75",
        "AP / mask's",
        "AP75 / mask's",
        "label mIoU",
        "with colours",
    )
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    found = groups(rows)
    for (name, settings, steps), group in found.items():
        columns = {key: [row[key] for row in group if key in row] for key in (*SCORES, *LABELS)}
        masks = found.get(("mask", "", steps), [])
        shares = [share_of(columns[key], [row[key] for row in masks]) for key in ("segm/AP", "segm/AP75")]
        labels = [cell(columns[key]) if columns[key] else "" for key in LABELS]
        scores = cell(columns["segm/AP"]), cell(columns["segm/AP75"])
        title = f"{name}, {settings}" if settings else name
        print(f"| {' | '.join([title, str(steps), str(len(group)), *scores, *shares, *labels])} |")


def draw(name: str, rows: Sequence[dict], file: Path) -> None:
    """Bars of means, a dot per seed: AP and AP75 of rows without settings, if masks have as many steps."""
    usual = {key: group for key, group in groups(rows).items() if not key[1]}
    found = {key: group for key, group in usual.items() if ("mask", "", key[2]) in usual}
    figure = Figure(figsize=(8, 0.9 + 0.42 * len(found)), dpi=150, layout="constrained")
    for place, (key, title) in enumerate({"segm/AP": "mask AP", "segm/AP75": "mask AP75"}.items()):
        axes = figure.add_subplot(1, 2, place + 1, xlabel=title)
        for height, group in enumerate(found.values()):
            values = [row[key] for row in group]
            color = MASKS if group[0]["row"] == "mask" else BOXES
            axes.barh(height, fmean(values), color=color, alpha=0.6)
            axes.plot(values, [height] * len(values), "o", color=SEED, markersize=4)
        names = [f"{NAMES.get(row, row)} ({steps} steps)" for row, _, steps in found]
        axes.set_yticks(range(len(found)), names if not place else [""] * len(found))
        axes.spines[["top", "right"]].set_visible(False)
    kinds = [Patch(color=color, alpha=0.6) for color in (BOXES, MASKS)]
    kinds.append(Line2D([], [], color=SEED, marker="o", markersize=4, linestyle=""))
    labels = ["from boxes, mean", "from masks, mean", "each seed"]
    figure.legend(kinds, labels, loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(name, fontsize=10, x=0.01, ha="left")
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", help="name of the set, for the results file")
    parser.add_argument("runs", nargs="*", metavar="ROW=FOLDER", help="name of a row, and a run's folder")
    parser.add_argument("--settings", default="", help="what is special about an exploratory row")
    parser.add_argument(
        "--opts", nargs="*", default=[], metavar="KEY VALUE", help="evaluate anew, with these"
    )
    args = parser.parse_intermixed_args()
    path = RESULTS / f"real_{args.set}.json"
    for pair in args.runs:
        name, _, folder = pair.partition("=")
        row = measure(name, Path(folder), args.settings, args.opts)
        store(path, row)
        print(json.dumps(row), file=sys.stderr)
    if not args.runs:
        rows = json.loads(path.read_text())
        print_table(rows)
        draw(args.set, rows, RESULTS.parents[1] / f"docs/real_{args.set}.png")


if __name__ == "__main__":
    main()
