"""Mask2Former (CVPR 2022): backbone, pixel decoder, mask decoder, named as in the published checkpoints."""

import torch
from torch import Tensor, nn

from sim_m2f.config import CfgNode, validate
from sim_m2f.modeling.backbone import build_backbone
from sim_m2f.modeling.low_precision import lowered_weights
from sim_m2f.modeling.mask_decoder import MaskDecoder
from sim_m2f.modeling.pixel_decoder import PixelDecoder
from sim_m2f.structures import LayerOutputs, Outputs, Prompted, Prompts


class Mask2Former(nn.Module):
    """Images in; class logits and mask logits of every query out.

    ``model(images)`` takes (B, 3, H, W) float, normalised with MODEL.PIXEL_MEAN and PIXEL_STD and padded to a
    multiple of 32, and returns::

        {"pred_logits": (B, Q, C+1), the last class is "no object",
         "pred_masks": (B, Q, H/4, W/4) logits,
         "mask_features": (B, MASK_DIM, H/4, W/4),
         "aux_outputs": [the first two, of each earlier layer]}

    ``model(images, auxiliary=False)`` leaves "aux_outputs" empty and saves their time.
    ``model(images, prompts=Prompts(boxes, labels))`` adds "prompted": the same of the N prompted queries;
    their "aux_outputs" begin after the first layer. It needs MODEL.SIM.PROMPTS.ENABLED.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.pixel_std = list(cfg.MODEL.PIXEL_STD)  # of its images; weights for others are converted
        self.backbone = build_backbone(cfg)
        pixel_decoder = PixelDecoder(cfg, self.backbone.channels)
        self.sem_seg_head = nn.ModuleDict({"pixel_decoder": pixel_decoder, "predictor": MaskDecoder(cfg)})

    def forward(self, images: Tensor, auxiliary: bool = True, prompts: Prompts | None = None) -> Outputs:
        pixel_decoder, predictor = self.sem_seg_head.values()
        with lowered_weights(self):
            encoded, mask_features = pixel_decoder(self.backbone(images))
            predictions, prompted = predictor(encoded, mask_features, auxiliary, prompts)
        outputs: Outputs = {**_by_layer(predictions), "mask_features": mask_features}
        if prompted:
            outputs["prompted"] = _by_layer(prompted)
        return outputs


def compile_maps(network: nn.Module, backend: str) -> None:
    """Let torch.compile compile a Mask2Former's backbone and pixel decoder when they are called."""
    for name in ("backbone", "sem_seg_head.pixel_decoder"):
        network.get_submodule(name).compile(backend=backend)


def _by_layer(layers: LayerOutputs) -> Prompted:
    """The predictions of the last layer, with those of the earlier ones and all of them together."""
    logits, masks = layers["pred_logits"].unbind(1), layers["pred_masks"].unbind(1)
    each: list[LayerOutputs] = [
        {"pred_logits": pair[0], "pred_masks": pair[1]} for pair in zip(logits, masks, strict=True)
    ]
    return {**each[-1], "aux_outputs": each[:-1], "layers": layers}


def build_model(cfg: CfgNode) -> Mask2Former:
    """The network that ``cfg.MODEL`` describes, its weights drawn from ``cfg.SEED``, on the CPU.

    Raises:
        UserError: see ``config.validate``; or timm has no such backbone.
    """
    validate(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.SEED)
        return Mask2Former(cfg)
