"""What two GGUF files compute: the LLM through transformers' own reader of them, what sees by the file's graph alone.

The graph is written down from llama.cpp's (`tools/mtmd/models/llava.cpp`), and knows nothing of the model it came from.
Differs: GELU is exact here; llama.cpp takes its tanh approximation, from a table of half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

from isthmus.exporting import Trial
from isthmus.exporting.gguf_file import tensors
from isthmus.exporting.gguf_llm import FREQUENCIES
from isthmus.pretrained import quiet


@torch.inference_mode()
def logits(llm: Path, sight: Path, trial: Trial) -> Tensor:
    """Logits [rows, T, V] of a trial, from the two files alone."""
    model = _llm(llm)
    words = model.get_input_embeddings()(trial.words)
    seen = Sight(sight)(trial.pixels)
    given = torch.cat([words[:, :1], seen, words[:, 1:]], 1)
    return model(inputs_embeds=given).logits[..., : trial.shared]


def _llm(file: Path) -> Any:
    reader, where = GGUFReader(file), {"gguf_file": file.name}
    with quiet(), redirect_stderr(StringIO()):  # its bar of tensors has no other switch
        config = AutoConfig.from_pretrained(file.parent, **where)
        # transformers reads neither a head's width in every family, nor the frequencies below
        config.head_dim = _field(reader, f"{_field(reader, 'general.architecture')}.attention.key_length")
        exact = GgufConfig(dequantize=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, **where, config=config, quantization_config=exact, dtype=torch.float32
        )
    frequencies = tensors(reader, FREQUENCIES)
    if frequencies:
        model.base_model.rotary_emb.inv_freq /= frequencies[FREQUENCIES]
    return model.eval()


def _field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


class Sight:
    """Encoder and joint as a file describes them.

    Args:
        file: an `mmproj` file of the kind `mlp`.
    """

    def __init__(self, file: Path):
        reader = GGUFReader(file)
        self.tensors = tensors(reader)
        self.fields = {name.removeprefix("clip."): field.contents() for name, field in reader.fields.items()}

    def __call__(self, pixels: Tensor) -> Tensor:
        """pixels [N, 3, H, W] -> y [N, Q, D]."""
        x = self._embedded(pixels)
        (deepest,) = self.fields["vision.feature_layer"]
        for block in range(deepest):
            x = self._block(x, f"v.blk.{block}")
        x = x[:, 1:] if "v.class_embd" in self.tensors else x
        return self._linear(F.gelu(self._linear(x, "mm.0")), "mm.2")

    def _embedded(self, pixels: Tensor) -> Tensor:
        weight, bias = self.tensors["v.patch_embd.weight"], self.tensors.get("v.patch_embd.bias")
        x = F.conv2d(pixels, weight, bias, stride=self.fields["vision.patch_size"]).flatten(2).mT
        if "v.class_embd" in self.tensors:
            x = torch.cat([self.tensors["v.class_embd"].expand(len(x), 1, -1), x], 1)
        x = x + self.tensors["v.position_embd.weight"]
        return self._norm(x, "v.pre_ln") if "v.pre_ln.weight" in self.tensors else x

    def _block(self, x: Tensor, name: str) -> Tensor:
        normed = self._norm(x, f"{name}.ln1")
        heads = (self.fields["vision.attention.head_count"], -1)
        q, k, v = (self._linear(normed, f"{name}.attn_{each}").unflatten(-1, heads).transpose(1, 2) for each in "qkv")
        x = x + self._linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), f"{name}.attn_out")
        inner = self._linear(self._norm(x, f"{name}.ln2"), f"{name}.ffn_up")
        return x + self._linear(self._active(inner), f"{name}.ffn_down")

    @property
    def _active(self) -> Callable[[Tensor], Tensor]:
        if self.fields.get("use_gelu"):
            return partial(F.gelu, approximate="tanh")
        return lambda x: x * torch.sigmoid(1.702 * x)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.fields["vision.attention.layer_norm_epsilon"])

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])
