"""A trained network for other programs."""

from pathlib import Path

from sim_m2f.files import write_file
from sim_m2f.weights.checkpoint import save_checkpoint
from sim_m2f.weights.detectron2 import detectron2_checkpoint
from sim_m2f.weights.folder import TrainedNetwork, write_folder
from sim_m2f.weights.onnx import onnx_bytes
from sim_m2f.weights.transformers import write_transformers

PROMPTS = "sem_seg_head.predictor.prompts."
FORMATS = {
    "safetensors": "a folder of ours: weights, configuration, class names and model card",
    "detectron2": "a .pth file that the original Mask2Former loads",
    "transformers": "a folder for Mask2FormerForUniversalSegmentation and its image processor",
    "onnx": "an .onnx file for images whose sides are multiples of 32",
}


def export(trained: TrainedNetwork, format_name: str, output: Path) -> None:
    """Write a network in one of ``FORMATS`` to a folder or a file.

    Raises:
        UserError: the format does not have such a network, or the path cannot be written.
    """
    # no other format than ours has a place for prompts
    own = trained.network.state_dict()
    weights = {name: weight.cpu() for name, weight in own.items() if not name.startswith(PROMPTS)}
    if format_name == "safetensors":
        write_folder(output, trained)
    elif format_name == "transformers":
        write_transformers(output, weights, trained.cfg, trained.class_names)
    elif format_name == "detectron2":
        save_checkpoint(output, detectron2_checkpoint(weights, trained.cfg))
    else:
        write_file(output, onnx_bytes(trained.network.eval()))
