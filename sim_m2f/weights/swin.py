"""What other implementations of Swin keep in their files and ours computes: relative position indices."""

from collections.abc import Iterable

from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor

from sim_m2f.config import CfgNode

TABLE, INDEX = ".relative_position_bias_table", ".relative_position_index"


def relative_position_indices(names: Iterable[str], cfg: CfgNode) -> dict[str, Tensor]:
    """The index for every bias table among ``names``, under the name that it has beside the table."""
    window, tables = cfg.MODEL.SWIN.WINDOW_SIZE, [name for name in names if name.endswith(TABLE)]
    return {table.replace(TABLE, INDEX): get_relative_position_index(window, window) for table in tables}
