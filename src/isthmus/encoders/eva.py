"""EVA and EVA-02, the towers of EVA-CLIP and of BLIP-2 (arXiv 2211.07636, 2303.11331, 2303.15389).

Official code: baaivision/EVA; weights are read as timm names them.

Differs:
- States are counted as transformers counts them and taken before the final norm. Blocks behind the last state that is
  read are not built: of ViT-g's 40, `layer=-2` keeps 39, as BLIP-2 does.
- The classifier or CLIP projection is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.config import EncoderConfig, Frozen
from isthmus.encoders import Encoder, check_patches, state_index
from isthmus.types import Features

EPSILON = 1e-6
TEMPERATURE = 10000.0


class Shape(Frozen):
    """What distinguishes one EVA from another, under timm's names."""

    patch_size: int = 14
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4 * 2 / 3
    qkv_fused: bool = True
    """One projection for queries, keys and values; keys have no bias either way."""
    swiglu_mlp: bool = False
    scale_mlp: bool = False
    """A norm inside the gated MLP, whose two halves are then apart."""
    scale_attn_inner: bool = False
    """A norm before attention's output projection."""
    use_rot_pos_emb: bool = False
    ref_feat_shape: tuple[int, int] = (16, 16)
    """Rotary positions of any grid span those of this one."""
    use_post_norm: bool = False
    """Norms behind attention and MLP, inside the residual branch."""


_GIANT = {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 6144 / 1408}
_SMALL = {"depth": 12, "swiglu_mlp": True, "use_rot_pos_emb": True}
_SPLIT = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True}
_BASE = {**_SPLIT, "embed_dim": 768, "depth": 12, "num_heads": 12}
_LARGE = {**_SPLIT, "embed_dim": 1024, "depth": 24, "num_heads": 16}
_CLIP = {"scale_attn_inner": True}
_ENORMOUS = {"embed_dim": 1792, "depth": 64, "num_heads": 16, "mlp_ratio": 15360 / 1792, "use_post_norm": True}
SHAPES: dict[str, dict[str, Any]] = {
    "eva_giant_patch14_224": _GIANT,
    "eva_giant_patch14_336": _GIANT,
    "eva_giant_patch14_560": _GIANT,
    "eva_giant_patch14_clip_224": _GIANT,
    "eva02_tiny_patch14_224": {**_SMALL, "embed_dim": 192, "num_heads": 3},
    "eva02_tiny_patch14_336": {**_SMALL, "embed_dim": 192, "num_heads": 3},
    "eva02_small_patch14_224": {**_SMALL, "embed_dim": 384, "num_heads": 6},
    "eva02_small_patch14_336": {**_SMALL, "embed_dim": 384, "num_heads": 6},
    "eva02_base_patch14_224": _BASE,
    "eva02_base_patch14_448": _BASE,
    "eva02_large_patch14_224": _LARGE,
    "eva02_large_patch14_448": _LARGE,
    "eva02_base_patch16_clip_224": {**_BASE, **_CLIP, "patch_size": 16},
    "eva02_large_patch14_clip_224": {**_LARGE, **_CLIP},
    "eva02_large_patch14_clip_336": {**_LARGE, **_CLIP},
    "eva02_enormous_patch14_clip_224": _ENORMOUS,
}


class Attention(nn.Module):
    """Softmax attention over all tokens, with rotary positions where the shape has them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.heads = shape.embed_dim, shape.num_heads
        self.fused = shape.qkv_fused
        if self.fused:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        else:
            self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
            self.k_proj = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width, EPSILON) if shape.scale_attn_inner else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x_NSE: Tensor, turns: tuple[Tensor, Tensor] | None) -> Tensor:
        """[N, S, E] -> [N, S, E]; `turns` are cosines and sines [S, E / heads] of the positions."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self._project(x_NSE))
        if turns is not None:
            q, k = rotate(q, *turns), rotate(k, *turns)
        y_NHSE = F.scaled_dot_product_attention(q, k, v)
        return self.proj(self.norm(y_NHSE.transpose(1, 2).flatten(2)))

    def _project(self, x_NSE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.fused:
            return self.q_proj(x_NSE), self.k_proj(x_NSE), self.v_proj(x_NSE)
        q, k, v = self.qkv(x_NSE).chunk(3, -1)
        return q + self.q_bias, k, v + self.v_bias


class Feed(nn.Module):
    """GELU MLP."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x_NSE: Tensor) -> Tensor:
        """[N, S, E] -> [N, S, E]."""
        return self.fc2(F.gelu(self.fc1(x_NSE)))


class PackedFeed(nn.Module):
    """SwiGLU MLP whose gate and value are one Linear, the gate first."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x_NSE: Tensor) -> Tensor:
        """[N, S, E] -> [N, S, E]."""
        gate, value = self.fc1(x_NSE).chunk(2, -1)
        return self.fc2(F.silu(gate) * value)


class ScaledFeed(nn.Module):
    """SwiGLU MLP with a norm before its last Linear."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1_g, self.fc1_x = nn.Linear(width, inner), nn.Linear(width, inner)
        self.norm = nn.LayerNorm(inner, EPSILON)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x_NSE: Tensor) -> Tensor:
        """[N, S, E] -> [N, S, E]."""
        return self.fc2(self.norm(F.silu(self.fc1_g(x_NSE)) * self.fc1_x(x_NSE)))


class Block(nn.Module):
    """Attention and MLP, each beside a residual path."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.post = shape.embed_dim, shape.use_post_norm
        feed = Feed if not shape.swiglu_mlp else ScaledFeed if shape.scale_mlp else PackedFeed
        self.norm1, self.norm2 = nn.LayerNorm(width, EPSILON), nn.LayerNorm(width, EPSILON)
        self.attn = Attention(shape)
        self.mlp = feed(width, int(width * shape.mlp_ratio))

    def forward(self, x_NSE: Tensor, turns: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[N, S, E] -> [N, S, E]."""
        if self.post:
            x_NSE = x_NSE + self.norm1(self.attn(x_NSE, turns))
            return x_NSE + self.norm2(self.mlp(x_NSE))
        x_NSE = x_NSE + self.attn(self.norm1(x_NSE), turns)
        return x_NSE + self.mlp(self.norm2(x_NSE))


class Eva(Encoder):
    """An EVA tower without its weights; `timm.load` reads them.

    Args:
        config: `layer` and `taps` count states as transformers does: 0 is the embeddings, -2 the penultimate block's.
        shape: the architecture.
        own: side of the square input that the position table is made for.
        processor: the image processor that makes its pixels.
        source: what identifies the weights.

    Raises:
        ConfigError: no such layer, or `image_size` does not divide into patches.
    """

    def __init__(self, config: EncoderConfig, shape: Shape, own: int, processor: Any, source: Mapping[str, str]):
        super().__init__()
        self.shape, self.processor, self.aspect = shape, processor, config.aspect
        self.size, self.width = config.image_size or own, shape.embed_dim
        check_patches(self.size, shape.patch_size)
        self.grid = (self.size // shape.patch_size,) * 2
        self.tap_widths = {str(tap): self.width for tap in config.taps}
        self._own = own // shape.patch_size
        self._kept, self._source = config.class_token == "keep", dict(source)
        self._layer = state_index(config.layer, shape.depth)
        self._taps = {str(tap): state_index(tap, shape.depth) for tap in config.taps}
        built = max(self._layer, *self._taps.values(), 0)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, self.width, shape.patch_size, shape.patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self._own**2, self.width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(built))
        self.unread = ("norm.", "fc_norm.", "head.", *(f"blocks.{index}." for index in range(built, shape.depth)))

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] + self._kept

    def identity(self) -> dict[str, str]:
        chosen = {"layer": str(self._layer), "taps": str(self._taps), "class_token": str(self._kept)}
        return self._source | chosen | self.preprocessing() | {"shape": self.shape.model_dump_json()}

    def forward(self, pixels: Tensor) -> Features:
        """pixels [N, 3, H, W] -> x [N, S, E], rows first; a kept class token comes before them."""
        patches_NSE = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x_NSE = torch.cat([self.cls_token.expand(pixels.shape[0], -1, -1), patches_NSE], 1) + self._positions()
        turns = self._turns(x_NSE.device) if self.shape.use_rot_pos_emb else None
        states = [x_NSE]
        for block in self.blocks:
            states.append(block(states[-1], turns))
        skipped = 0 if self._kept else 1
        taps = {name: states[index][:, skipped:] for name, index in self._taps.items()}
        return Features(states[self._layer][:, skipped:], taps, self.grid)

    @staticmethod
    def translate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors under our names, which are timm's."""
        return dict(tensors)

    def _positions(self) -> Tensor:
        """The table of positions [1, 1 + S, E], resampled where the input is not of its own size."""
        if self.grid[0] == self._own:
            return self.pos_embed
        first, table = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        table_NEHW = table.float().transpose(1, 2).unflatten(2, (self._own, self._own))
        table_NEHW = F.interpolate(table_NEHW, self.grid, mode="bicubic", antialias=True)
        return torch.cat([first, table_NEHW.flatten(2).transpose(1, 2).to(first.dtype)], 1)

    def _turns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1 + S, E / heads]: rows turn the first half of a head, columns the second."""
        head = self.width // self.shape.num_heads
        bands = TEMPERATURE ** -(torch.arange(head // 4, device=device) / (head // 4))
        rows, columns = (
            torch.arange(count, device=device) / count * span
            for count, span in zip(self.grid, self.shape.ref_feat_shape)
        )
        places_S2 = torch.cartesian_prod(rows, columns)
        angles_SE = (places_S2[..., None] * bands).flatten(1).repeat_interleave(2, -1)
        angles_SE = F.pad(angles_SE, (0, 0, 1, 0))  # the class token has no place and does not turn
        return angles_SE.cos(), angles_SE.sin()


def rotate(x_NHSE: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    """Every pair of neighbouring channels turned by its angle, in float32."""
    turned = torch.stack([-x_NHSE[..., 1::2], x_NHSE[..., ::2]], -1).flatten(-2)
    return (x_NHSE * cos_SE + turned * sin_SE).to(x_NHSE.dtype)
