"""How losses read the predicted masks: in boxes, or whole; no copy of them waits for the backward pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sim_m2f.supervision.losses import parts
from sim_m2f.supervision.targets import BoxPixels


def whole_masks(predicted: Tensor, rows: Tensor) -> Tensor:
    """Those (..., h, w) of the predicted masks (B, L, Q, h, w) that the rows (...) name, copied, float32."""
    maps = predicted.flatten(0, 2).index_select(0, rows.flatten())
    return maps.view(*rows.shape, *maps.shape[1:]).float()


def recomputed(loss: Callable[[Tensor], Tensor], predicted: Tensor, rows: Tensor) -> Tensor:
    """A loss of ``whole_masks``, computed once more in the backward pass instead of keeping the masks."""
    return checkpoint(
        lambda: loss(whole_masks(predicted, rows)), use_reentrant=False, preserve_rng_state=False
    )


class BoxLogits(NamedTuple):
    """All that the losses in boxes read of the masks; float32 logits.

    pixels: (L, P) at P pixels.
    along_x, along_y: (L, T, w) and (L, T, h), the largest of every column and of every row; one of equal
        ones receives the gradient.
    """

    pixels: Tensor
    along_x: Tensor
    along_y: Tensor


def box_logits(predicted: Tensor, rows: Tensor, pixels: BoxPixels) -> BoxLogits:
    """Those of the masks (L, T) that the rows name among the predicted ones (B, L, Q, h, w)."""
    height, width = predicted.shape[-2:]
    first = rows * (height * width)
    places = first, pixels.target, pixels.y * width + pixels.x, _largest(predicted, rows) + first[..., None]
    values, largest = _Read.apply(predicted, *places)
    return BoxLogits(values, *largest.split([width, height], dim=-1))


@torch.no_grad()
def _largest(predicted: Tensor, rows: Tensor) -> Tensor:
    """(L, T, w + h): where in its mask each column and each row has its largest logit."""
    height, width = predicted.shape[-2:]
    columns, lines = (torch.arange(side, device=rows.device) for side in (width, height))
    masks, flat = predicted.flatten(0, 2), rows.flatten()
    found = [rows.new_zeros(0, width + height)]
    for part in parts(len(flat), height * width):
        own = masks.index_select(0, flat[part])
        of_columns, of_rows = own.max(-2).indices, own.max(-1).indices
        found.append(torch.cat([of_columns * width + columns, lines * width + of_rows], dim=-1))
    return torch.cat(found).view(*rows.shape, width + height)


class _Read(torch.autograd.Function):
    """Values of the predicted masks at two lists of places, with one gradient of the masks.

    Nothing is kept but the lists, and of the first one, which is long, only what it is made from; ``parts``
    of it go together.

    Takes masks (B, L, Q, h, w), first places of masks (L, T), objects (P,) and places in a mask (P,) of
    pixels, and further places (L, T, K); returns (L, P) and (L, T, K) float32.
    """

    @staticmethod
    def forward(
        ctx: Any, masks: Tensor, first: Tensor, target: Tensor, pixel: Tensor, further: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(first, target, pixel, further)
        ctx.like = masks.shape, masks.dtype
        flat = masks.flatten()
        values = torch.empty(len(first), len(target), device=masks.device)
        for part in parts(len(target), len(first)):
            places = first.index_select(1, target[part]).add_(pixel[part])
            values[:, part] = flat.index_select(0, places.view(-1)).view(places.shape)
        return values, flat.index_select(0, further.view(-1)).view(further.shape).float()

    @staticmethod
    def backward(ctx: Any, of_pixels: Tensor, of_further: Tensor) -> tuple[Tensor | None, ...]:
        (first, target, pixel, further), (shape, dtype) = ctx.saved_tensors, ctx.like
        gradient = torch.zeros(shape, dtype=dtype, device=of_pixels.device)
        flat = gradient.view(-1)
        for part in parts(len(target), len(first)):
            places = first.index_select(1, target[part]).add_(pixel[part])
            flat.index_add_(0, places.view(-1), of_pixels[:, part].reshape(-1).to(dtype))
        flat.index_add_(0, further.view(-1), of_further.reshape(-1).to(dtype))
        return gradient, None, None, None, None
