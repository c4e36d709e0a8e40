"""Small networks with the structure of the published ones, and what tests of other formats share."""

import torch
from conftest import SMALL_FILE

from sim_m2f.config import CfgNode, get_cfg
from sim_m2f.modeling import build_model

OVERRIDES = [
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"),
    *("MODEL.SEM_SEG_HEAD.MASK_DIM", "64", "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD", "48"),
    *("MODEL.MASK_FORMER.DIM_FEEDFORWARD", "40", "DATASETS.TEST", "()"),
    *("INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96"),
]
BACKBONES = {
    "ResNet-50": ["MODEL.RESNETS.RES2_OUT_CHANNELS", "64"],
    "ResNet-18": ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"],
    "MSRA": ["MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.STRIDE_IN_1X1", "True"],
    "Swin": [
        *("MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.SWIN.EMBED_DIM", "24"),
        *("MODEL.SWIN.DEPTHS", "(2, 2, 2, 2)", "MODEL.SWIN.DROP_PATH_RATE", "0.0"),
    ],
}
CLASSES = ["cat", "dog", "traffic light"]


def small_network(backbone: str, seed: int = 1, overrides: list[str] | None = None):
    """(cfg, network) with weights drawn from ``seed``, norms and buffers included."""
    cfg = get_cfg()
    cfg.merge_from_file(SMALL_FILE)
    cfg.merge_from_list([*OVERRIDES, *BACKBONES[backbone], *(overrides or [])])
    return cfg, stirred(cfg, seed)


def stirred(cfg: CfgNode, seed: int):
    network = build_model(cfg).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.dtype.is_floating_point:
                noise = torch.rand(value.shape, generator=generator)
                value.mul_(0.8 + 0.4 * noise).add_(0.02 * noise)
            else:  # the number of batches that a norm has seen
                value.fill_(seed)
    return network


def assert_same_weights(network, other) -> None:
    """Bit for bit, under the same names."""
    weights, others = network.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    different = [name for name in weights if not torch.equal(weights[name], others[name])]
    assert not different
