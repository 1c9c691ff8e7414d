"""RAM (Recognize Anything), a tagger of 4,585 names: the network, and what its public checkpoint calls its weights.

Zhang et al. 2023, arXiv 2306.03514. Official code: github.com/xinyu1205/recognize-anything. A Swin Transformer (Liu et
al. 2021, arXiv 2103.14030) looks at the picture. Every name, as an embedding that CLIP once made of it, then asks what
Swin saw, and a last number says how well it fits.

Differs:
- only the tagger is here: neither the half that writes captions from tags, nor names that a checkpoint does not hold.
  RAM++, which weighs 51 descriptions of every name anew for each picture, is refused
- all sizes, the side of the pictures among them, are told by the shapes of the weights; position tables are not
  stretched to another side
- pictures are upright, and white where they are transparent; the release takes their pixels as they are stored
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SwinConfig, SwinModel

from isthmus.pretrained import quiet

HEADS, EPSILON = 4, 1e-12
"""Of the decoder: what no tensor's shape tells."""
EXPANSION = 4
"""Of the MLPs inside Swin."""
VISUAL = "visual_encoder."
"""What the names of Swin's tensors begin with."""
SWIN = {  # to the names of Swin checkpoints on the hub, which transformers reads whatever its own are
    f"{VISUAL}patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    f"{VISUAL}patch_embed.norm.": "embeddings.norm.",
    f"{VISUAL}layers.": "encoder.layers.",
    f"{VISUAL}norm.": "layernorm.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".attn.relative": ".attention.self.relative",
    ".attn.proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}
DECODER = {  # to ours
    "tagging_head.encoder.layer.": "layers.",
    "crossattention.self.": "",
    "crossattention.output.dense.": "out.",
    "crossattention.output.LayerNorm.": "out_norm.",
    "intermediate.dense.": "expand.",
    "output.dense.": "contract.",
    "output.LayerNorm.": "contract_norm.",
    "image_proj.": "image.",
    "wordvec_proj.": "word.",
    "label_embed": "labels_TW",
    "fc.": "score.",
}


@dataclass(frozen=True)
class Sizes:
    """What distinguishes one checkpoint from another."""

    patch: int
    width: int
    """Of Swin's first stage; every further one is twice as wide."""
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    tags: int
    label: int
    """Of a name's embedding, and of the picture's tokens when they are asked."""
    decoder: int
    inner: int
    layers: int

    @property
    def seen(self) -> int:
        """Width of Swin's last stage."""
        return self.width << (len(self.depths) - 1)

    @property
    def side(self) -> int:
        """Of the square pictures, in pixels: a window spans Swin's last stage."""
        return self.patch * self.window << (len(self.depths) - 1)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the network has, by the name of the release."""
        alone: dict[str, tuple[int, ...]] = {"label_embed": (self.tags, self.label)}
        pairs: dict[str, tuple[int, ...]] = {  # a weight of this shape, and a bias
            f"{VISUAL}patch_embed.proj": (self.width, 3, self.patch, self.patch),
            f"{VISUAL}patch_embed.norm": (self.width,),
            f"{VISUAL}norm": (self.seen,),
            "image_proj": (self.label, self.seen),
            "wordvec_proj": (self.decoder, self.label),
            "fc": (1, self.decoder),
        }
        for stage, (depth, heads) in enumerate(zip(self.depths, self.heads)):
            at, width = f"{VISUAL}layers.{stage}", self.width << stage
            for block in (f"{at}.blocks.{number}" for number in range(depth)):
                alone[f"{block}.attn.relative_position_bias_table"] = ((2 * self.window - 1) ** 2, heads)
                pairs |= {f"{block}.norm1": (width,), f"{block}.norm2": (width,)}
                pairs |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
                pairs |= {
                    f"{block}.mlp.fc1": (EXPANSION * width, width),
                    f"{block}.mlp.fc2": (width, EXPANSION * width),
                }
            if width < self.seen:
                alone[f"{at}.downsample.reduction.weight"] = (2 * width, 4 * width)
                pairs[f"{at}.downsample.norm"] = (4 * width,)
        for at in (f"tagging_head.encoder.layer.{layer}" for layer in range(self.layers)):
            for part, inputs in (("query", self.decoder), ("key", self.label), ("value", self.label)):
                pairs[f"{at}.crossattention.self.{part}"] = (self.decoder, inputs)
            pairs |= {f"{at}.crossattention.output.dense": (self.decoder, self.decoder)}
            pairs |= {f"{at}.{part}.LayerNorm": (self.decoder,) for part in ("crossattention.output", "output")}
            pairs |= {f"{at}.intermediate.dense": (self.inner, self.decoder)}
            pairs |= {f"{at}.output.dense": (self.decoder, self.inner)}
        both = ((f"{name}.{kind}", shape) for name, whole in pairs.items() for kind, shape in _pair(whole))
        return alone | dict(both)


def _pair(shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from (("weight", shape), ("bias", shape[:1]))


class Layer(nn.Module):
    """The names ask the picture, not each other; then a feed-forward. A LayerNorm stands behind either sum."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.query = nn.Linear(sizes.decoder, sizes.decoder)
        self.key, self.value = (nn.Linear(sizes.label, sizes.decoder) for _ in range(2))
        self.out, self.out_norm = nn.Linear(sizes.decoder, sizes.decoder), nn.LayerNorm(sizes.decoder, EPSILON)
        self.expand, self.contract = nn.Linear(sizes.decoder, sizes.inner), nn.Linear(sizes.inner, sizes.decoder)
        self.contract_norm = nn.LayerNorm(sizes.decoder, EPSILON)

    def forward(self, x_NTD: Tensor, image_NSW: Tensor) -> Tensor:
        """Names [N, T, D] and the picture's tokens [N, S, W] -> [N, T, D]."""
        asked = (self.query(x_NTD), self.key(image_NSW), self.value(image_NSW))
        query, key, value = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in asked)
        answer_NTD = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x_NTD = self.out_norm(x_NTD + self.out(answer_NTD))
        return self.contract_norm(x_NTD + self.contract(F.gelu(self.expand(x_NTD))))


class Decoder(nn.Module):
    """From what Swin saw to a logit per name."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.image = nn.Linear(sizes.seen, sizes.label)
        self.labels_TW = nn.Parameter(torch.empty(sizes.tags, sizes.label))
        self.word = nn.Linear(sizes.label, sizes.decoder)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.score = nn.Linear(sizes.decoder, 1)

    def forward(self, seen_NSE: Tensor) -> Tensor:
        """Swin's last states [N, S, E] -> logits [N, T]; the mean of the states is a token, too."""
        image_NSW = self.image(torch.cat([seen_NSE.mean(1, keepdim=True), seen_NSE], 1))
        x_NTD = F.relu(self.word(self.labels_TW)).expand(len(seen_NSE), -1, -1)
        for layer in self.layers:
            x_NTD = layer(x_NTD, image_NSW)
        return self.score(x_NTD).squeeze(-1)


class RAM(nn.Module):
    """The tagger in fp32, ready for inference.

    Args:
        sizes: of the checkpoint.
        tensors: the weights, by the names of the release; exactly those of `Sizes.shapes`.
    """

    def __init__(self, sizes: Sizes, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        config = SwinConfig(
            image_size=sizes.side,
            patch_size=sizes.patch,
            embed_dim=sizes.width,
            depths=list(sizes.depths),
            num_heads=list(sizes.heads),
            window_size=sizes.window,
            mlp_ratio=float(EXPANSION),
        )
        with quiet():
            loaded: Any = SwinModel.from_pretrained(
                None,
                config=config,
                state_dict=dict(_swin(tensors)),
                add_pooling_layer=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
        self.swin: SwinModel = loaded[0]
        assert not loaded[1]["missing_keys"] and not loaded[1]["unexpected_keys"], loaded[1]
        with torch.device("meta"):
            self.decoder = Decoder(sizes)
        rest = {name: tensor.float() for name, tensor in tensors.items() if not name.startswith(VISUAL)}
        self.decoder.load_state_dict({_renamed(name, DECODER): each for name, each in rest.items()}, assign=True)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [N, 3, H, W] -> logits [N, T], of which each has a sigmoid of its own."""
        return self.decoder(self.swin(pixels).last_hidden_state)


def _swin(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Swin's tensors under the hub's names; queries, keys and values apart."""
    for name, tensor in tensors.items():
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), tensor.float().chunk(3)):
                yield _renamed(name.replace(".attn.qkv.", f".attention.self.{part}."), SWIN), rows.clone()
        elif name.startswith(VISUAL):
            yield _renamed(name, SWIN), tensor.float()


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for theirs, ours in table.items():
        name = name.replace(theirs, ours)
    return name
