"""Masks of all queries, few of which a loss reads."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def mask_product(embedding: Tensor, features: Tensor) -> Tensor:
    """(B, N, D) times (B, D, P), the mask logits (B, N, P) of N queries at P pixels.

    On a CPU the backward pass leaves out queries whose masks have no gradient, most of them: losses read the
    masks that an object has claimed.
    """
    if (
        embedding.device.type != "cpu"
        or not torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return embedding @ features
    return _MaskProduct.apply(embedding, features)


class _MaskProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embedding: Tensor, features: Tensor) -> Tensor:
        ctx.save_for_backward(embedding, features)
        return embedding @ features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        embedding, features = ctx.saved_tensors
        of_embedding, of_features = torch.zeros_like(embedding), torch.empty_like(features)
        for image, own in enumerate(gradient):
            rows = own.abs().amax(-1).nonzero().flatten()
            read = own[rows]
            of_embedding[image, rows] = read @ features[image].T
            torch.mm(embedding[image, rows].T, read, out=of_features[image])
        return of_embedding, of_features
