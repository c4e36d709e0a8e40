"""The network as an ONNX file for images of any size, its deformable attention written with GridSample."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sim_m2f.errors import UserError, first_line
from sim_m2f.modeling.deformable_attention import MSDeformAttn, Shapes
from sim_m2f.modeling.mask2former import Mask2Former

OPSET = 18  # the one that PyTorch writes without conversion
DIVISOR = 32
EXAMPLE = (1, 3, 96, 128)  # neither side like the other, nor like a number of channels


class GridSampleAttention(MSDeformAttn):
    """`MSDeformAttn` in operations that ONNX has, for sizes that are not known in advance."""

    def forward(self, query: Tensor, reference: Tensor, source: Tensor, shapes: Shapes) -> Tensor:
        batch, queries, _ = query.shape
        offsets = self.sampling_offsets(query).view(batch, queries, self.heads, self.levels, self.points, 2)
        weights = self.attention_weights(query).view(batch, queries, self.heads, -1).softmax(-1)
        weights = weights.unflatten(-1, (self.levels, self.points))
        value = self.value_proj(source).unflatten(-1, (self.heads, -1)).permute(0, 2, 3, 1)  # (B, M, D, S)
        maps = value.flatten(0, 1).split([height * width for height, width in shapes], dim=2)
        total: Any = 0.0
        for level, (height, width) in enumerate(shapes):
            x, y = offsets[..., level, :, :].unbind(-1)
            places = reference[:, :, :, None] + torch.stack([x / width, y / height], dim=-1)
            places = (2 * places - 1).transpose(1, 2).flatten(0, 1)  # (BM, Q, P, 2)
            samples = F.grid_sample(maps[level].unflatten(2, (height, width)), places, align_corners=False)
            weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]  # (BM, 1, Q, P)
            total = total + (samples * weight).sum(-1)  # (BM, D, Q)
        return self.output_proj(total.unflatten(0, (batch, self.heads)).flatten(1, 2).transpose(1, 2))


class _LastLayer(nn.Module):
    """(B, 3, H, W) in; class logits (B, Q, C+1) and mask logits (B, Q, H/4, W/4) of the last layer out."""

    def __init__(self, network: Mask2Former) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.network(images, auxiliary=False)
        return outputs["pred_logits"], outputs["pred_masks"]


def onnx_bytes(network: Mask2Former) -> bytes:
    """The contents of an ONNX file: "images" in, "pred_logits" and "pred_masks" out, as the network has them.

    Height and width are free multiples of 32; one image at a time.

    Raises:
        UserError: the packages of the extra ``onnx`` are missing, or the backbone cannot be exported.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs more packages ({error}): pip install 'sim-m2f[onnx]'") from error
    portable = copy.deepcopy(network).cpu().eval()
    for module in portable.modules():
        if isinstance(module, MSDeformAttn):
            module.__class__ = GridSampleAttention
    sides = {2: DIVISOR * torch.export.Dim("height", min=1), 3: DIVISOR * torch.export.Dim("width", min=1)}
    try:
        last = _LastLayer(portable).eval()
        graph = torch.export.export(last, (torch.zeros(EXAMPLE),), dynamic_shapes=(sides,))
        program = torch.onnx.export(
            graph,
            input_names=["images"],
            output_names=["pred_logits", "pred_masks"],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # what a backbone of timm's does to the exporter has many classes
        fault = f"cannot be exported to ONNX ({first_line(error)[:120]})"
        advice = "export to safetensors, or take another backbone"
        raise UserError(f"backbone {network.backbone.name}: {fault}; {advice}") from error
    return program.model_proto.SerializeToString()  # type: ignore[union-attr]
