"""What other implementations of Swin keep in their files and ours computes: relative position indices."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sim_m2f.config import CfgNode

TABLE, INDEX = ".relative_position_bias_table", ".relative_position_index"


def relative_position_index(window: int) -> Tensor:
    """(window^2, window^2) int64: the row of the bias table for every pair of tokens of a window.

    Row (dy + window - 1) * (2 window - 1) + dx + window - 1 belongs to the offset (dy, dx) of the first token
    from the second (Swin, https://arxiv.org/abs/2103.14030, equation 4).
    """
    y, x = torch.cartesian_prod(torch.arange(window), torch.arange(window)).unbind(1)
    dy, dx = (axis[:, None] - axis[None] + window - 1 for axis in (y, x))
    return dy * (2 * window - 1) + dx


def relative_position_indices(names: Iterable[str], cfg: CfgNode) -> dict[str, Tensor]:
    """The index for every bias table among ``names``, under the name that it has beside the table."""
    tables = [name for name in names if name.endswith(TABLE)]
    return {
        table.replace(TABLE, INDEX): relative_position_index(cfg.MODEL.SWIN.WINDOW_SIZE) for table in tables
    }
