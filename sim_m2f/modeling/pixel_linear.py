"""Linear layers that all pixels of an image go through."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PixelLinear(nn.Linear):
    """nn.Linear for (B, S, width), S being pixels.

    In inference on a CPU it is computed as the 1 x 1 convolution that it is: PyTorch's convolutions reach
    more of the processor's speed than its matrix products.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        maps = x[:, :, None].permute(0, 3, 1, 2)
        return F.conv2d(maps, self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1).flatten(1, 2)
