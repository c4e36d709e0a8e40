"""Every check of a configuration that names and types cannot make."""

from typing import Any

from sim_m2f.config.defaults import WITHOUT_EFFECT, get_cfg
from sim_m2f.config.node import CfgNode, value_of
from sim_m2f.errors import UserError

# Keys of Mask2Former's files that choose among implementations, and the one that exists here.
ONLY_CHOICE: dict[str, Any] = {
    "INPUT.FORMAT": "RGB",
    "MODEL.RESNETS.STEM_TYPE": "basic",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.SWIN.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.SWIN.QKV_BIAS": True,
    "MODEL.SWIN.APE": False,
    "MODEL.SWIN.PATCH_NORM": True,
    "MODEL.META_ARCHITECTURE": "MaskFormer",
    "MODEL.SEM_SEG_HEAD.NAME": "MaskFormerHead",
    "MODEL.SEM_SEG_HEAD.NORM": "GN",
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 4,
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "MSDeformAttnPixelDecoder",
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": "MultiScaleMaskedTransformerDecoder",
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "multi_scale_pixel_decoder",
    "SOLVER.OPTIMIZER": "ADAMW",
}
CHOICES: dict[str, tuple[str, ...]] = {
    "TRACKERS": ("tensorboard", "wandb", "mlflow"),
    "MODEL.DEVICE": ("auto", "cpu", "cuda"),
    "MODEL.RESNETS.NORM": ("FrozenBN", "BN", "SyncBN", "GN"),
    "MODEL.SIM.SUPERVISION": ("box", "mask"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupPolyLR", "WarmupCosineLR"),
    "SOLVER.AMP.DTYPE": ("auto", "bf16", "fp16"),
}
LEAST = {
    "SEED": 0,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 1,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 1,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 1,
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS": 1,
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS": 1,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 0,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD": 1,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 1,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 1,
    "MODEL.MASK_FORMER.NHEADS": 1,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 1,
    "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": 1,
    "MODEL.MASK_FORMER.DEC_LAYERS": 1,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 1,
    "MODEL.SIM.PAIRWISE.DILATION": 1,
    "MODEL.SIM.PROTOTYPES.COUNT": 1,
    "MODEL.SIM.COPY_PASTE.PICTURES": 1,
    "INPUT.IMAGE_SIZE": 1,
    "INPUT.MIN_SIZE_TEST": 0,
    "INPUT.MAX_SIZE_TEST": 1,
    "INPUT.BOTTOM_ROWS": 0,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.LOG_PERIOD": 1,
    "TEST.DETECTIONS_PER_IMAGE": 1,
}
MULTIPLES: tuple[tuple[str, str | int], ...] = (  # of a number, or of another key's value
    ("MODEL.SEM_SEG_HEAD.CONVS_DIM", 32),  # groups of the pixel decoder's norms
    ("MODEL.SEM_SEG_HEAD.CONVS_DIM", "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS"),
    ("MODEL.MASK_FORMER.HIDDEN_DIM", 2),  # position embeddings of x and y
    ("MODEL.MASK_FORMER.HIDDEN_DIM", "MODEL.MASK_FORMER.NHEADS"),
)


def validate(cfg: CfgNode) -> None:
    """Check what names and types cannot say.

    Raises:
        UserError: a key asks for something that does not exist, a number is below the least that makes sense,
            or no multiple of what it is divided by.
    """
    for key, only in ONLY_CHOICE.items():
        if value_of(cfg, key) != only:
            raise UserError(f"{key}: {value_of(cfg, key)!r} does not exist here; the only choice is {only!r}")
    check_choices(cfg)
    for key, least in LEAST.items():
        if value_of(cfg, key) < least:
            raise UserError(f"{key} is {value_of(cfg, key)}; use a number of at least {least}")
    for key, divisor in MULTIPLES:
        number = value_of(cfg, divisor) if isinstance(divisor, str) else divisor
        if value_of(cfg, key) % number:
            name = f"{divisor} ({number})" if isinstance(divisor, str) else number
            raise UserError(f"{key} is {value_of(cfg, key)}; use a multiple of {name}")
    low, high = cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE
    if not 0 < low <= high:
        raise UserError(f"INPUT.MIN_SCALE is {low}, INPUT.MAX_SCALE {high}; use 0 < MIN_SCALE <= MAX_SCALE")


def check_choices(cfg: CfgNode) -> None:
    """Check the keys that name one of several things.

    Raises:
        UserError: a key names something that does not exist.
    """
    for key, choices in CHOICES.items():
        value = value_of(cfg, key)
        for one in value if isinstance(value, tuple) else (value,):
            if one not in choices:
                known = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise UserError(f"{key}: {one!r} does not exist; take {known}")


def without_effect(cfg: CfgNode) -> list[str]:
    """The keys that ask for something that does not happen here."""
    defaults = get_cfg()
    return [key for key in WITHOUT_EFFECT if value_of(cfg, key) != value_of(defaults, key)]
