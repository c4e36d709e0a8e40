"""Every key of a configuration with its default and its meaning.

Keys that detectron2 or Mask2Former have carry their names and their meaning; what belongs to learning from
boxes stands under MODEL.SIM. Values are checked against the types of the defaults.
"""

import copy
from collections.abc import Iterable

from sim_m2f.config.node import CfgNode, leaf_keys, value_of


def _node(parent: CfgNode, names: Iterable[str]) -> None:
    for name in names:
        parent[name] = CfgNode()


_C = CfgNode()
_C.VERSION = 2  # Version of the key names, as in detectron2's files.
_C.OUTPUT_DIR = "./output"  # Folder for checkpoints, logs, results and the report.
_C.TRACKERS = ("tensorboard",)  # Where metrics and figures also go: "tensorboard", "wandb", "mlflow".
_C.SEED = 0  # Seed of weights, sample order and augmentation.
_node(_C, ["MODEL", "INPUT", "DATASETS", "DATALOADER", "SOLVER", "TEST"])

# ------------------------------------------------------------------------------------------------ network
_C.MODEL.DEVICE = "auto"  # "auto" (the GPU when there is one), "cpu" or "cuda"; CUDA_VISIBLE_DEVICES chooses.
_C.MODEL.META_ARCHITECTURE = "MaskFormer"  # The only one; kept for Mask2Former's files.
# Where the weights start: a file or folder of weights, an address (https://, detectron2://, hf://owner/name),
# "timm://NAME" for timm's pretrained backbone, or "" for random weights. See docs/COMPATIBILITY.md.
_C.MODEL.WEIGHTS = ""
_C.MODEL.PIXEL_MEAN = [123.675, 116.280, 103.530]  # Mean of the pixels, RGB, 0..255.
_C.MODEL.PIXEL_STD = [58.395, 57.120, 57.375]  # Standard deviation of the pixels, RGB, 0..255.
_node(_C.MODEL, ["BACKBONE", "RESNETS", "SWIN", "SEM_SEG_HEAD", "MASK_FORMER", "SIM"])

# "build_resnet_backbone" (MODEL.RESNETS), "D2SwinTransformer" (MODEL.SWIN), or the name of any timm model.
_C.MODEL.BACKBONE.NAME = "build_resnet_backbone"
_C.MODEL.BACKBONE.FREEZE_AT = 0  # ResNet stages kept fixed: 1 the stem, 2 also res2, ...; 0 none.

_C.MODEL.RESNETS.DEPTH = 50  # 18, 34, 50, 101 or 152.
# Channels at stride 4, doubled by each later stage: 64 for the depths 18 and 34, 256 for the deeper ones.
_C.MODEL.RESNETS.RES2_OUT_CHANNELS = 256
_C.MODEL.RESNETS.NORM = "FrozenBN"  # "FrozenBN", "BN", "SyncBN" or "GN"; from scratch use "BN" or "GN".
_C.MODEL.RESNETS.STRIDE_IN_1X1 = False  # The first 1x1 convolution has the stride (MSRA), not the 3x3.
_C.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]  # Feature maps of strides 4, 8, 16, 32.
_C.MODEL.RESNETS.STEM_TYPE = "basic"  # The only one.
_C.MODEL.RESNETS.STEM_OUT_CHANNELS = 64  # The only width of the stem.

_C.MODEL.SWIN.EMBED_DIM = 96  # Channels after the patch embedding.
_C.MODEL.SWIN.DEPTHS = [2, 2, 6, 2]  # Blocks per stage.
_C.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]  # Attention heads per stage.
_C.MODEL.SWIN.WINDOW_SIZE = 7  # Side of the attention window in tokens.
_C.MODEL.SWIN.PRETRAIN_IMG_SIZE = 224  # Side of the pretraining images; only absolute embeddings use it.
_C.MODEL.SWIN.PATCH_SIZE = 4  # Side of a patch in pixels.
_C.MODEL.SWIN.MLP_RATIO = 4.0  # Hidden width of the MLPs, in units of the channels.
_C.MODEL.SWIN.DROP_PATH_RATE = 0.3  # Stochastic depth of the last block, growing linearly from 0.
_C.MODEL.SWIN.OUT_FEATURES = ["res2", "res3", "res4", "res5"]  # Feature maps of strides 4, 8, 16, 32.
_C.MODEL.SWIN.QKV_BIAS = True  # Biases in queries, keys and values; the only choice.
_C.MODEL.SWIN.APE = False  # Absolute position embedding; the only choice.
_C.MODEL.SWIN.PATCH_NORM = True  # Layer norm after the patch embedding; the only choice.

_C.MODEL.SEM_SEG_HEAD.NAME = "MaskFormerHead"  # The only one; kept for Mask2Former's files.
_C.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 80  # Classes of the data set, without "no object".
_C.MODEL.SEM_SEG_HEAD.CONVS_DIM = 256  # Width of the pixel decoder.
_C.MODEL.SEM_SEG_HEAD.MASK_DIM = 256  # Width of the mask features.
_C.MODEL.SEM_SEG_HEAD.NORM = "GN"  # Norm of the pixel decoder's convolutions; the only one.
_C.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "MSDeformAttnPixelDecoder"  # The only one.
# Feature maps that the pixel decoder takes.
_C.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res3", "res4", "res5"]
# Feature maps that its encoder takes.
_C.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["res3", "res4", "res5"]
_C.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 4  # Sampling points per head and level.
_C.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = 8  # Attention heads of the encoder.
_C.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS = 6  # Deformable encoder layers.
_C.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD = 1024  # Hidden width of the encoder's MLPs.
_C.MODEL.SEM_SEG_HEAD.COMMON_STRIDE = 4  # Stride of the mask features; the only one.

_C.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME = "MultiScaleMaskedTransformerDecoder"  # The only one.
_C.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "multi_scale_pixel_decoder"  # The only one.
_C.MODEL.MASK_FORMER.DEEP_SUPERVISION = True  # Apply every loss after every decoder layer.
_C.MODEL.MASK_FORMER.NO_OBJECT_WEIGHT = 0.1  # Weight of the class "no object" in the classification loss.
_C.MODEL.MASK_FORMER.CLASS_WEIGHT = 2.0  # Weight of the classification loss.
_C.MODEL.MASK_FORMER.MASK_WEIGHT = 5.0  # Weight of the mask cross-entropy (mask supervision).
_C.MODEL.MASK_FORMER.DICE_WEIGHT = 5.0  # Weight of the mask dice loss (mask supervision).
_C.MODEL.MASK_FORMER.HIDDEN_DIM = 256  # Width of the queries.
_C.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 100  # Queries per image: the most objects that one can hold.
_C.MODEL.MASK_FORMER.NHEADS = 8  # Attention heads of the decoder.
_C.MODEL.MASK_FORMER.DROPOUT = 0.0  # Dropout in the encoder.
_C.MODEL.MASK_FORMER.DIM_FEEDFORWARD = 2048  # Hidden width of the decoder's MLPs.
_C.MODEL.MASK_FORMER.PRE_NORM = False  # Layer norm before instead of after each decoder block.
_C.MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ = False  # Project the decoder's inputs even where widths agree.
_C.MODEL.MASK_FORMER.SIZE_DIVISIBILITY = 32  # Images are padded to a multiple of this many pixels.
_C.MODEL.MASK_FORMER.DEC_LAYERS = 10  # Predictions: 1 from the queries alone + 1 after each decoder layer.
_C.MODEL.MASK_FORMER.TRAIN_NUM_POINTS = 12544  # Points per mask at which mask supervision compares.
_C.MODEL.MASK_FORMER.OVERSAMPLE_RATIO = 3.0  # Candidates drawn per point kept.
_C.MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO = 0.75  # Share of the points where the mask is least certain.

# ------------------------------------------------------------------------------------------------ supervision
# "box" (segmentations are never read) or "mask", which is what Mask2Former's own files mean.
_C.MODEL.SIM.SUPERVISION = "mask"
_node(_C.MODEL.SIM, ["MATCHER", "PROJECTION", "PAIRWISE", "BOX_FILL", "TEACHER", "PROTOTYPES"])
_node(_C.MODEL.SIM, ["PSEUDO_MASKS", "PSEUDO_SEMANTIC", "SELF_CORRECTION", "POSITIVE_MASKS", "COPY_PASTE"])
_node(_C.MODEL.SIM, ["SHOW"])
_C.MODEL.SIM.MATCHER.CLASS_WEIGHT = 2.0  # Weight of -(class probability) in the matching cost.
_C.MODEL.SIM.MATCHER.PROJECTION_WEIGHT = 5.0  # Weight of the dice of both projections in the matching cost.
_C.MODEL.SIM.MATCHER.BOX_WEIGHT = 0.0  # Weight of L1 + GIoU between the mask's box and the annotated box.
_C.MODEL.SIM.PROJECTION.ENABLED = True  # Use loss_projection.
_C.MODEL.SIM.PROJECTION.WEIGHT = 5.0  # Weight of loss_projection.
_C.MODEL.SIM.PROJECTION.START = 0.0  # First step (or fraction of the run) with loss_projection.
_C.MODEL.SIM.PROJECTION.WARMUP = 0.0  # Steps (or fraction of the run) of its linear warm-up.
_C.MODEL.SIM.PAIRWISE.ENABLED = True  # Use loss_pairwise.
_C.MODEL.SIM.PAIRWISE.WEIGHT = 2.0  # Weight of loss_pairwise.
_C.MODEL.SIM.PAIRWISE.DILATION = 2  # Distance of a pixel's 8 neighbours, in pixels at stride 4.
_C.MODEL.SIM.PAIRWISE.COLOR_THRESHOLD = 0.3  # Edges count where the colour affinity is at least this.
_C.MODEL.SIM.PAIRWISE.FEATURE_AFFINITY = False  # Multiply by the affinity of the teacher's mask features.
_C.MODEL.SIM.PAIRWISE.PRODUCT_THRESHOLD = 0.1  # Edges count where colour x feature affinity is at least this.
_C.MODEL.SIM.PAIRWISE.START = 0.0  # First step (or fraction of the run) with loss_pairwise.
_C.MODEL.SIM.PAIRWISE.WARMUP = 10000.0  # Steps (or fraction of the run) of the linear warm-up from 0.
_C.MODEL.SIM.BOX_FILL.WEIGHT = 0.0  # First weight of loss_box_fill, towards the filled box.
_C.MODEL.SIM.BOX_FILL.STEPS = 0.1  # Steps (or fraction of the run) over which loss_box_fill fades to 0.
_C.MODEL.SIM.TEACHER.ENABLED = False  # Keep a moving average of the network; the terms below need it.
_C.MODEL.SIM.TEACHER.MOMENTUM = 0.9999  # Share of the old weights that an update keeps.
_C.MODEL.SIM.PROTOTYPES.COUNT = 10  # Prototypes per class.
_C.MODEL.SIM.PROTOTYPES.MOMENTUM = 0.999  # Share of the old prototype that an update keeps.
_C.MODEL.SIM.PROTOTYPES.EPSILON = 0.05  # Weight of the entropy in the optimal transport.
_C.MODEL.SIM.PROTOTYPES.ITERATIONS = 3  # Sinkhorn iterations.
_C.MODEL.SIM.PROTOTYPES.PIXELS_PER_CLASS = 512  # Most pixels of a class per update, on a mean rank.
_C.MODEL.SIM.PROTOTYPES.TEMPERATURE = 0.1  # Divides the similarity to the nearest prototype in M_S.
_C.MODEL.SIM.PROTOTYPES.CENTER = 0.0  # Similarity at which M_S is one half.
_C.MODEL.SIM.PROTOTYPES.CONFIDENT = 0.7  # Pixels above this teacher probability belong to the object.
_C.MODEL.SIM.POSITIVE_MASKS.WEIGHTING = False  # M_I is a weighted mean, not the last layer's mask.
_C.MODEL.SIM.POSITIVE_MASKS.QUERIES = 3  # Most further queries per object whose masks count.
_C.MODEL.SIM.POSITIVE_MASKS.MIN_IOU = 0.5  # ... if their box overlaps the annotated one so much.
_C.MODEL.SIM.PSEUDO_MASKS.ALPHA = 0.5  # Share of M_S in the blend, M_I has the rest.
_C.MODEL.SIM.PSEUDO_MASKS.POSITIVE = (0.7, 0.8)  # Range of the adaptive threshold of positive pixels.
_C.MODEL.SIM.PSEUDO_MASKS.NEGATIVE = 0.4  # Pixels below are negative.
_C.MODEL.SIM.PSEUDO_MASKS.CONFIDENT = 0.7  # It lets as many pixels through as have an M_I above this.
_C.MODEL.SIM.PSEUDO_MASKS.FOCAL_ALPHA = 0.25  # Weight of positive pixels in the focal losses.
_C.MODEL.SIM.PSEUDO_MASKS.FOCAL_GAMMA = 2.0  # Exponent of the focal losses.
_C.MODEL.SIM.PSEUDO_SEMANTIC.ENABLED = False  # Use loss_pseudo_semantic.
_C.MODEL.SIM.PSEUDO_SEMANTIC.WEIGHT = 0.3  # Weight of loss_pseudo_semantic.
_C.MODEL.SIM.PSEUDO_SEMANTIC.START = 10000.0  # First step (or fraction of the run) with it.
_C.MODEL.SIM.PSEUDO_SEMANTIC.WARMUP = 10000.0  # Steps (or fraction of the run) of its linear warm-up.
_C.MODEL.SIM.SELF_CORRECTION.ENABLED = False  # Use loss_self_correction.
_C.MODEL.SIM.SELF_CORRECTION.WEIGHT = 0.3  # Weight of loss_self_correction.
_C.MODEL.SIM.SELF_CORRECTION.START = 10000.0  # First step (or fraction of the run) with it.
_C.MODEL.SIM.SELF_CORRECTION.WARMUP = 10000.0  # Steps (or fraction of the run) of its linear warm-up.
_C.MODEL.SIM.COPY_PASTE.ENABLED = False  # Paste objects of recent images, and use loss_copy_paste.
_C.MODEL.SIM.COPY_PASTE.WEIGHT = 1.0  # Weight of loss_copy_paste (focal + dice of the pasted objects).
_C.MODEL.SIM.COPY_PASTE.START = 10000.0  # First step (or fraction of the run) that pastes.
_C.MODEL.SIM.COPY_PASTE.WARMUP = 0.0  # Steps (or fraction of the run) of its linear warm-up.
_C.MODEL.SIM.COPY_PASTE.PICTURES = 50  # Recent images to draw objects from.
_C.MODEL.SIM.COPY_PASTE.PROBABILITY = 0.5  # Share of the images that receive objects.
_C.MODEL.SIM.COPY_PASTE.OBJECTS = 3  # Most objects that an image receives.
_C.MODEL.SIM.COPY_PASTE.SCORE_POWER = 3.0  # Objects are drawn in proportion to score^this.
_C.MODEL.SIM.COPY_PASTE.SHIFT = 0.0  # Farthest an object is moved, in shares of the image.
_C.MODEL.SIM.COPY_PASTE.SCALE = (1.0, 1.0)  # Least and largest factor of an object's size.
_C.MODEL.SIM.SHOW.PERIOD = 0.1  # Steps (or fraction of the run) between images of the method; 0 draws none.
_C.MODEL.SIM.SHOW.PICTURES = 4  # Training images that are shown: the first ones that have an object.

# ------------------------------------------------------------------------------------------------ images
_C.INPUT.FORMAT = "RGB"  # Order of the channels that the network sees; only "RGB".
_C.INPUT.IMAGE_SIZE = 1024  # Side of the square training crop in pixels.
_C.INPUT.MIN_SCALE = 0.1  # Smallest scale of the large-scale jitter.
_C.INPUT.MAX_SCALE = 2.0  # Largest scale of the large-scale jitter.
_C.INPUT.RANDOM_FLIP = "horizontal"  # "horizontal", "vertical" or "none".
_C.INPUT.MIN_SIZE_TEST = 800  # Shorter side of a test image in pixels; 0 keeps the image's size.
_C.INPUT.MAX_SIZE_TEST = 1333  # Longer side of a test image in pixels, at the most.
_C.INPUT.BOTTOM_ROWS = 10  # Lowest rows of an image left out of loss_pairwise (bad annotation in COCO).

# Names: coco_2017_{train,val,test-dev} and nuclei_{train,val} under $DETECTRON2_DATASETS (default datasets/),
# shapes_{train,val}.
_C.DATASETS.TRAIN = ("coco_2017_train",)  # Data sets to train on.
_C.DATASETS.TEST = ("coco_2017_val",)  # Data sets to evaluate on.
_C.DATASETS.TRAIN_ANNOTATIONS = ""  # A COCO JSON to train on instead of DATASETS.TRAIN ...
_C.DATASETS.TRAIN_IMAGES = ""  # ... and the folder of its images.
_C.DATASETS.TEST_ANNOTATIONS = ""  # A COCO JSON to evaluate on instead of DATASETS.TEST ...
_C.DATASETS.TEST_IMAGES = ""  # ... and the folder of its images.
_C.DATALOADER.NUM_WORKERS = 4  # Processes that read images, per rank; 0 reads in the training process.

# ------------------------------------------------------------------------------------------------ training
_C.SOLVER.OPTIMIZER = "ADAMW"  # The only one.
_C.SOLVER.IMS_PER_BATCH = 16  # Images per step, over all ranks.
_C.SOLVER.BASE_LR = 0.0001  # Learning rate.
_C.SOLVER.BACKBONE_MULTIPLIER = 0.1  # Learning rate of the backbone, in units of BASE_LR.
_C.SOLVER.WEIGHT_DECAY = 0.05  # Weight decay.
_C.SOLVER.WEIGHT_DECAY_NORM = 0.0  # Weight decay of norm layers.
_C.SOLVER.WEIGHT_DECAY_EMBED = 0.0  # Weight decay of embeddings.
_C.SOLVER.MAX_ITER = 368750  # Steps of the run.
_C.SOLVER.LR_SCHEDULER_NAME = "WarmupMultiStepLR"  # Or "WarmupPolyLR", "WarmupCosineLR".
_C.SOLVER.STEPS = (327778.0, 355092.0)  # Steps at which the learning rate is multiplied by GAMMA.
_C.SOLVER.GAMMA = 0.1  # Factor at each of STEPS.
_C.SOLVER.POLY_LR_POWER = 0.9  # Power of WarmupPolyLR.
_C.SOLVER.POLY_LR_CONSTANT_ENDING = 0.0  # Least factor of WarmupPolyLR.
_C.SOLVER.WARMUP_ITERS = 10  # Steps of the learning rate's warm-up.
_C.SOLVER.WARMUP_FACTOR = 1.0  # Factor of the learning rate at the first step of the warm-up.
_C.SOLVER.WARMUP_METHOD = "linear"  # "linear" or "constant".
_C.SOLVER.CHECKPOINT_PERIOD = 5000  # Steps between checkpoints; 0 writes only the last one.
_C.SOLVER.KEEP_CHECKPOINTS = False  # Keep every checkpoint, not only the newest.
_C.SOLVER.LOG_PERIOD = 20  # Steps between lines of metrics.jsonl.
_C.SOLVER.CLIP_GRADIENTS = CfgNode()
_C.SOLVER.CLIP_GRADIENTS.ENABLED = True  # Clip the gradient.
_C.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.01  # The most that the norm may be.
_C.SOLVER.CLIP_GRADIENTS.NORM_TYPE = 2.0  # Which norm.
_C.SOLVER.AMP = CfgNode()
_C.SOLVER.AMP.ENABLED = True  # Mixed precision on a GPU; a CPU computes in float32 whatever this says.
_C.SOLVER.AMP.DTYPE = "auto"  # "bf16", "fp16", or "auto": bf16 where the GPU has it, else fp16.

# ------------------------------------------------------------------------------------------------ evaluation
_C.TEST.EVAL_PERIOD = 5000  # Steps between evaluations; 0 evaluates only at the end.
_C.TEST.USE_TEACHER = False  # Evaluate the teacher's weights instead of the student's.
_C.TEST.DETECTIONS_PER_IMAGE = 100  # Detections kept per image.

# ------------------------------------------------------------------------------------------------ no effect
# Keys of Mask2Former's files that change nothing here. The defaults say what happens, whatever a file says;
# ``without_effect`` names those that ask for something else.
_EFFECTIVE = frozenset(leaf_keys(_C))
_node(_C.MODEL.MASK_FORMER, ["TEST"])
_node(_C.INPUT, ["CROP"])
_C.MODEL.RESNETS.RES5_MULTI_GRID = [1, 1, 1]  # Dilations in res5; the original does not use it either.
_C.MODEL.SWIN.QK_SCALE = None  # Factor of the attention's logits; always 1 / sqrt(channels of a head).
_C.MODEL.SWIN.DROP_RATE = 0.0  # Dropout in the backbone.
_C.MODEL.SWIN.ATTN_DROP_RATE = 0.0  # Dropout of the backbone's attention.
_C.MODEL.SWIN.USE_CHECKPOINT = False  # Activation checkpointing of the backbone.
_C.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 255  # Label of ignored pixels in semantic segmentation.
_C.MODEL.SEM_SEG_HEAD.LOSS_WEIGHT = 1.0  # Weight of detectron2's semantic loss; the original ignores it too.
_C.MODEL.MASK_FORMER.ENC_LAYERS = 0  # Encoder layers in the mask decoder.
_C.MODEL.MASK_FORMER.TEST.INSTANCE_ON = True  # Instance segmentation.
_C.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = False  # Semantic segmentation.
_C.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False  # Panoptic segmentation.
_C.MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD = 0.8  # Of panoptic segmentation.
_C.MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD = 0.8  # Of panoptic segmentation.
_C.MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = False  # Of semantic segmentation.
_C.INPUT.COLOR_AUG_SSD = False  # Augmentation of colours.
_C.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0  # Of semantic segmentation.
_C.INPUT.SIZE_DIVISIBILITY = -1  # Padding of training images; IMAGE_SIZE is their size.
_C.INPUT.DATASET_MAPPER_NAME = "coco_instance_lsj"  # How images are read: with large-scale jitter.
_C.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"  # What is clipped: the norm of all gradients together.
_C.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True  # Leave images without objects out of training.
WITHOUT_EFFECT = tuple(
    key for key in leaf_keys(_C) if key not in _EFFECTIVE and not isinstance(value_of(_C, key), CfgNode)
)


def get_cfg() -> CfgNode:
    """A fresh copy of the defaults; ``merge_from_file`` and ``merge_from_list`` change it."""
    return copy.deepcopy(_C)
