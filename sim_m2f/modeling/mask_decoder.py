"""Mask2Former's decoder: queries attend inside the masks they predicted a layer before (paper, section 3.2).

Parameter names are those of the published checkpoints (``sem_seg_head.predictor.*``).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sim_m2f.config import CfgNode
from sim_m2f.modeling.convolution import mask_product
from sim_m2f.modeling.low_precision import lowered
from sim_m2f.modeling.position import sine_positions
from sim_m2f.modeling.prompts import PromptEncoder, grown, pixels_in_boxes
from sim_m2f.structures import LayerOutputs, Prompts

FAR = -10.0  # logit of a prompted mask where it cannot be


class Attention(nn.MultiheadAttention):
    """nn.MultiheadAttention, batch first, all of whose heads share one mask."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """(B, Q, width) and (B, K, width) twice; ``allowed`` (B, Q, K) is True where a query may look."""
        inputs, widths = [query, key, value], [self.embed_dim] * 3
        if key is query:  # one product for both
            inputs, widths = [query, value], [2 * self.embed_dim, self.embed_dim]
        weights, biases = self.in_proj_weight.split(widths), self.in_proj_bias.split(widths)
        projected = [F.linear(*parts) for parts in zip(inputs, weights, biases, strict=True)]
        heads = [x.unflatten(-1, (-1, self.num_heads, self.head_dim)) for x in projected]
        q, k, v = (x.transpose(1, 2) for part in heads for x in part.unbind(2))
        mask = None if allowed is None else allowed[:, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class Residual(nn.Module):
    """What is added to its input, with a layer norm before or after."""

    norm: nn.LayerNorm
    pre_norm: bool

    def _added(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_norm:
            return x + change(self.norm(x))
        return self.norm(x + change(x))


class SelfAttentionLayer(Residual):
    """Queries look at queries."""

    def __init__(self, width: int, heads: int, pre_norm: bool) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.norm, self.pre_norm = nn.LayerNorm(width), pre_norm

    def forward(self, x: Tensor, positions: Tensor, allowed: Tensor | None = None) -> Tensor:
        def attended(x: Tensor) -> Tensor:
            placed = x + positions
            return self.self_attn(placed, placed, x, allowed)

        return self._added(x, attended)


class CrossAttentionLayer(Residual):
    """Queries look at the pixels of one level."""

    def __init__(self, width: int, heads: int, pre_norm: bool) -> None:
        super().__init__()
        self.multihead_attn = Attention(width, heads)
        self.norm, self.pre_norm = nn.LayerNorm(width), pre_norm

    def forward(self, x: Tensor, positions: Tensor, memory: Tensor, key: Tensor, allowed: Tensor) -> Tensor:
        return self._added(x, lambda x: self.multihead_attn(x + positions, key, memory, allowed))


class FFNLayer(Residual):
    """A two-layer MLP per query."""

    def __init__(self, width: int, hidden: int, pre_norm: bool) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm, self.pre_norm = nn.LayerNorm(width), pre_norm
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self._added(x, lambda x: self.linear2(F.relu(self.linear1(x))))


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


@dataclass(frozen=True)
class _Maps:
    """What queries of all kinds look at.

    Attributes:
        memories, keys: per level (B, h * w, width), without and with positions.
        coarse: per level (B, MASK_DIM, h * w), the mask features in its size.
        features: (B, MASK_DIM, h, w) the mask features, stride 4.
        boxes: per level, the pixels (B, Q, h * w) that a query may look at; all of them where absent.
    """

    memories: list[Tensor]
    keys: list[Tensor]
    coarse: list[Tensor]
    features: Tensor
    boxes: list[Tensor] | None = None


class MaskDecoder(nn.Module):
    """Encoded maps and mask features in; class and mask logits of every query after every layer out."""

    levels = 3

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        decoder, head = cfg.MODEL.MASK_FORMER, cfg.MODEL.SEM_SEG_HEAD
        width, pre_norm, depth = decoder.HIDDEN_DIM, decoder.PRE_NORM, range(decoder.DEC_LAYERS - 1)
        sizes, ffn_sizes = (width, decoder.NHEADS, pre_norm), (width, decoder.DIM_FEEDFORWARD, pre_norm)
        self.transformer_self_attention_layers = nn.ModuleList(SelfAttentionLayer(*sizes) for _ in depth)
        self.transformer_cross_attention_layers = nn.ModuleList(CrossAttentionLayer(*sizes) for _ in depth)
        self.transformer_ffn_layers = nn.ModuleList(FFNLayer(*ffn_sizes) for _ in depth)
        self.decoder_norm = nn.LayerNorm(width)
        self.query_feat = nn.Embedding(decoder.NUM_OBJECT_QUERIES, width)
        self.query_embed = nn.Embedding(decoder.NUM_OBJECT_QUERIES, width)
        self.level_embed = nn.Embedding(self.levels, width)
        project = width != head.CONVS_DIM or decoder.ENFORCE_INPUT_PROJ
        self.input_proj = nn.ModuleList(
            nn.Conv2d(head.CONVS_DIM, width, 1) if project else nn.Sequential() for _ in range(self.levels)
        )
        self.class_embed = nn.Linear(width, head.NUM_CLASSES + 1)
        self.mask_embed = MLP([width, width, width, head.MASK_DIM])
        # the last ones, so that the seed draws the same weights for the others with and without them
        if cfg.MODEL.SIM.PROMPTS.ENABLED:
            self.prompts = PromptEncoder(head.NUM_CLASSES, width)
            self.box_noise = cfg.MODEL.SIM.PROMPTS.BOX_NOISE

    def forward(
        self, encoded: list[Tensor], mask_features: Tensor, auxiliary: bool, prompts: Prompts | None
    ) -> tuple[LayerOutputs, LayerOutputs | None]:
        """
        Args:
            encoded: (B, CONVS_DIM, h, w) of strides 32, 16, 8.
            mask_features: (B, MASK_DIM, h, w) of stride 4.
            auxiliary: whether all predictions are asked for, or only the last layer's.
            prompts: boxes whose masks are asked for too.

        Returns:
            {"pred_logits": (B, L, Q, C+1), "pred_masks": (B, L, Q, h, w)} from the queries alone, then after
            each layer; the same of the prompted queries, N for Q, without the first. The learned queries do
            not see them.
        """
        coarse = [_resized(mask_features, level.shape[-2:]) for level in encoded]
        maps = _Maps(*self._memories(encoded), coarse, mask_features)
        batch = mask_features.shape[0]
        query = self.query_feat.weight.expand(batch, -1, -1)
        positions = self.query_embed.weight.expand(batch, -1, -1)
        predictions = self._decoded(query, positions, maps, auxiliary)
        return predictions, self._prompted(prompts, encoded, maps, auxiliary) if prompts else None

    def _prompted(
        self, prompts: Prompts, encoded: list[Tensor], maps: _Maps, auxiliary: bool
    ) -> LayerOutputs:
        """Each looks into its box, from the second layer on at its mask in the box, and at no other query.

        Its mask is empty farther from the box than training moves a side, so that features need not tell
        the object from its likes elsewhere.
        """
        boxes = [pixels_in_boxes(prompts.boxes, *level.shape[-2:]) for level in encoded]
        own = torch.eye(prompts.labels.shape[1], dtype=torch.bool, device=prompts.labels.device)[None]
        # before the first layer all prompts of a class are one and the same query
        query, positions = self.prompts(prompts)
        layers = self._decoded(query, positions, replace(maps, boxes=boxes), auxiliary, own)
        first = int(auxiliary)
        height, width = maps.features.shape[-2:]
        near = pixels_in_boxes(grown(prompts.boxes, self.box_noise), height, width)
        far = ~near.unflatten(2, (height, width))[:, None]
        masks = layers["pred_masks"][:, first:].masked_fill(far, FAR)
        return {"pred_logits": layers["pred_logits"][:, first:], "pred_masks": masks}

    def _decoded(
        self, query: Tensor, positions: Tensor, maps: _Maps, auxiliary: bool, visible: Tensor | None = None
    ) -> LayerOutputs:
        """The predictions of queries (B, Q, width) at their positions.

        ``visible`` (1, Q, Q) bool are the queries that each of them sees, all if there are none.
        """
        queries = [query]
        for i, ffn in enumerate(self.transformer_ffn_layers):
            level = i % self.levels
            box = maps.boxes[level] if maps.boxes else None
            allowed = box if maps.boxes and i == 0 else self._allowed(query, maps.coarse[level], box)
            memory, key = maps.memories[level], maps.keys[level]
            query = self.transformer_cross_attention_layers[i](query, positions, memory, key, allowed)
            query = ffn(self.transformer_self_attention_layers[i](query, positions, visible))
            queries.append(query)
        return self._predictions(queries if auxiliary else queries[-1:], maps.features)

    def _memories(self, encoded: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        memories, keys = [], []
        for i, level in enumerate(encoded):
            height, length = level.shape[-2:]
            memory = self.input_proj[i](level).flatten(2).transpose(1, 2) + self.level_embed.weight[i]
            memories.append(lowered(memory))
            keys.append(lowered(memory + sine_positions(height, length, memory.shape[-1], memory.device)))
        return memories, keys

    def _predictions(self, queries: list[Tensor], mask_features: Tensor) -> LayerOutputs:
        """Those of all layers at once, (B, L, Q, ...), from the queries (B, Q, width) after each."""
        normed = self.decoder_norm(torch.stack(queries, dim=1))
        embedding = self.mask_embed(normed).flatten(1, 2)
        masks = mask_product(embedding, mask_features.flatten(2)).unflatten(2, mask_features.shape[-2:])
        return {"pred_logits": self.class_embed(normed), "pred_masks": masks.unflatten(1, normed.shape[1:3])}

    @torch.no_grad()
    def _allowed(self, query: Tensor, features: Tensor, box: Tensor | None) -> Tensor:
        """The pixels that queries (B, Q, width) may look at, see ``_attention_mask``."""
        return _attention_mask(self.mask_embed(self.decoder_norm(query)), features, box)


@torch.no_grad()
def _resized(mask_features: Tensor, size: torch.Size) -> Tensor:
    """(B, MASK_DIM, h * w): resizing the features is resizing the masks, which are linear in them."""
    return F.interpolate(mask_features, size=size, mode="bilinear", align_corners=False).flatten(2)


@torch.no_grad()
def _attention_mask(embedding: Tensor, features: Tensor, box: Tensor | None = None) -> Tensor:
    """(B, Q, h * w) bool: the pixels of the mask, in the box if there is one; all where the mask has none."""
    logits = embedding @ features
    if box is None:
        return (logits >= 0) | (logits.amax(dim=-1, keepdim=True) < 0)
    mask = (logits >= 0) & box
    return torch.where(mask.any(dim=-1, keepdim=True), mask, box)
