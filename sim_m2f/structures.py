"""The dictionaries that travel between data, network, supervision and evaluation."""

from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor
from typing_extensions import NotRequired  # of Python 3.11; PyTorch brings it

Size = tuple[int, int]  # height and width, in pixels
STRIDE = 4  # of masks, in pixels of the network's input


class LayerOutputs(TypedDict):
    """Predictions after one decoder layer.

    pred_logits: (B, Q, C+1) class logits, the last class is "no object".
    pred_masks: (B, Q, h, w) mask logits at stride 4.
    """

    pred_logits: Tensor
    pred_masks: Tensor


@dataclass(frozen=True)
class Prompts:
    """N boxes per image whose masks are wanted; an image with fewer has any boxes in the remaining places.

    Attributes:
        boxes: (B, N, 4) float xyxy in shares of the network's input.
        labels: (B, N) int64, 0 to C-1.
    """

    boxes: Tensor
    labels: Tensor


class Prompted(LayerOutputs):
    """The last layer's predictions of N prompted queries (N for Q), and with them:

    aux_outputs: those of each earlier layer, from the first layer on.
    layers: all of these in one tensor each, (B, L, Q, ...), of which they are views; the criteria take them
        where they are.
    """

    aux_outputs: list[LayerOutputs]
    layers: NotRequired[LayerOutputs]


class Outputs(Prompted):
    """What the network returns: the last layer's predictions, and with them:

    mask_features: (B, d, h, w) at stride 4.
    aux_outputs: the predictions of each earlier layer.
    layers: all of these in one tensor each, (B, L, Q, ...), of which they are views.
    prompted: those of the prompted queries, where the network was given prompts.
    """

    mask_features: Tensor
    prompted: NotRequired[Prompted]


class Predictions(LayerOutputs):
    """The last layer's predictions for one image, and those of the queries of given boxes."""

    prompted: NotRequired[LayerOutputs]


class Target(TypedDict):
    """The N objects of one image, as the criteria take them.

    labels: (N,) int64, 0 to C-1.
    boxes: (N, 4) float xyxy in pixels of the network's input.
    valid: (H, W) bool, False on padding and on rows without usable annotation; all usable where absent.
    masks: (N, H, W) bool, for supervision by masks and mixed supervision only.
    known: (N,) bool, whose mask is annotated; False where "masks" is empty.
    pasted: (N,) bool, objects that copy-paste has put there.
    pasted_masks: (N, h, w) bool at stride 4, their visible pixels; False for all others.
    proposals: (N, H, W) bool, masks from elsewhere; False where there is none.
    proposal_scores: (N,) float, their confidence, 0 to 1.
    seed: of the image's random numbers, see ``sim_m2f.draws``; drawn where absent.
    """

    labels: Tensor
    boxes: Tensor
    valid: NotRequired[Tensor]
    masks: NotRequired[Tensor]
    known: NotRequired[Tensor]
    pasted: NotRequired[Tensor]
    pasted_masks: NotRequired[Tensor]
    proposals: NotRequired[Tensor]
    proposal_scores: NotRequired[Tensor]
    seed: NotRequired[tuple[int, ...]]


class Annotated(TypedDict):
    """One image with its N objects, as the augmentations take it.

    image: (3, H, W) uint8 RGB.
    boxes: (N, 4) float32 xyxy in its pixels.
    labels: (N,) int64.
    valid: (H, W) uint8, 0 on rows without usable annotation.
    masks: (N, H, W) uint8, for supervision by masks only.
    known: (N,) bool, whose mask is annotated.
    proposals: (N, H, W) uint8, masks from elsewhere; 0 where there is none.
    proposal_scores: (N,) float32, their confidence, 0 to 1.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    valid: Tensor
    masks: NotRequired[Tensor]
    known: NotRequired[Tensor]
    proposals: NotRequired[Tensor]
    proposal_scores: NotRequired[Tensor]


class Sample(Annotated):
    """One image as the network sees it, before padding and normalising.

    image: (3, h, w) uint8 RGB.
    boxes: (N, 4) float32 xyxy in its pixels.
    labels: (N,) int64.
    valid: (h, w) bool.
    masks: (N, h, w) bool, for supervision by masks only.
    known: (N,) bool, whose mask is annotated.
    proposals: (N, h, w) bool, masks from elsewhere; False where there is none.
    proposal_scores: (N,) float32, their confidence, 0 to 1.
    image_id: id in the JSON.
    original_size: height and width in the JSON.
    """

    image_id: int
    original_size: Size


class Batch(TypedDict):
    """B images, padded at the bottom and on the right to a common size.

    images: (B, 3, H, W) uint8 RGB, 0 on padding; ``Pixels.of_batch`` gives what the network sees.
    targets: one per image.
    image_ids: ids in the JSON.
    image_sizes: (h, w) of each before padding.
    original_sizes: (h, w) of each in the JSON.
    """

    images: Tensor
    targets: list[Target]
    image_ids: list[int]
    image_sizes: list[Size]
    original_sizes: list[Size]


class Detections(TypedDict):
    """The K instances of one image, best first.

    scores: (K,) float, 0 to 1.
    labels: (K,) int64, 0 to C-1.
    masks: (K, H, W) bool at the size that was asked for.
    boxes: (K, 4) float xyxy in pixels around the masks, zeros for an empty mask.
    queries: (K,) int64, which query found it; several classes of one query share its mask.
    """

    scores: Tensor
    labels: Tensor
    masks: Tensor
    boxes: Tensor
    queries: Tensor
