"""What other implementations of Swin keep in their files and ours computes: relative position indices."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sim_m2f.config import CfgNode

TABLE = ".relative_position_bias_table"


def relative_position_index(window: int) -> Tensor:
    """(window^2, window^2) int64: the row of the bias table for every pair of tokens of a window.

    Row (dy + window - 1) * (2 window - 1) + dx + window - 1 belongs to the offset (dy, dx) of the first token
    from the second (Swin, https://arxiv.org/abs/2103.14030, equation 4).
    """
    y, x = (
        axis.flatten() for axis in torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    )
    dy, dx = (grid[:, None] - grid[None] + window - 1 for grid in (y, x))
    return dy * (2 * window - 1) + dx


def relative_position_indices(weights: Mapping[str, Tensor], cfg: CfgNode) -> dict[str, Tensor]:
    """The index of every attention with a bias table among ``weights``, by the attention's name."""
    tables = [name.removesuffix(TABLE) for name in weights if name.endswith(TABLE)]
    return {name: relative_position_index(cfg.MODEL.SWIN.WINDOW_SIZE) for name in tables}
