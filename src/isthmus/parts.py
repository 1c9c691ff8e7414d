"""Base parts: where a pretrained encoder or LLM comes from, what identifies it, and how it is loaded.

A source is an embedded part's name, a folder, or a model's name on a hub. All three become a local folder, and a
folder's weights are identified by a hash, so that a joint is never put back on another base by mistake.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from isthmus import assets, kernels, quantised
from isthmus.config import EncoderConfig, LLMConfig
from isthmus.encoders import Encoder, hf, lite
from isthmus.types import ConfigError, IsthmusError

EMBEDDED_LLM = "smollm2-135m-instruct"
EMBEDDED_ENCODER = "efficientnet-lite0"
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""Files that are downloaded from a hub; pickles are not among them."""


def folder(source: str, revision: str | None = None) -> Path:
    """The local folder of a part.

    Raises:
        ConfigError: there is no such folder, and no model of that name can be had.
    """
    if source == EMBEDDED_LLM:
        return assets.llm_folder()
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = str(error).splitlines()[0]
        raise ConfigError(
            f"{source!r} is neither a folder nor a model that can be downloaded ({cause})",
            f"name a folder, a hub model, or an embedded part ({EMBEDDED_LLM}, {EMBEDDED_ENCODER})",
        ) from None


def fingerprint(path: Path) -> str:
    """Sixteen hex digits over the names, sizes, headers and both ends of a folder's weight files (or of one file).

    Reading the ends instead of everything keeps this under a second for any size; two checkpoints of one
    architecture differ in them.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path}: no safetensors weights", "convert the checkpoint to safetensors first")
    digest, end = hashlib.sha256(), 1 << 20
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(end))
            stream.seek(max(0, size - end))
            digest.update(stream.read(end))
    return digest.hexdigest()[:16]


def confirm(what: str, path: Path, expected: str | None) -> str:
    """The folder's fingerprint, which must be the expected one if any.

    Raises:
        IsthmusError: the base is not the one that the joint was trained on.
    """
    found = fingerprint(path)
    if expected is not None and found != expected:
        raise IsthmusError(
            f"{what}: the weights in {path} are not those this model was trained with ({found} != {expected})",
            "restore the original base part, or save the model whole with save_pretrained(dir, whole=True)",
        )
    return found


# ---------------------------------------------------------------------------------------------- LLMs


def llm_config(config: LLMConfig) -> PreTrainedConfig:
    """The architecture of an LLM; no weights are read."""
    if config.architecture is not None:
        return AutoConfig.for_model(**config.architecture)
    return AutoConfig.from_pretrained(folder(config.source, config.revision))


def load_llm(config: LLMConfig, dtype: torch.dtype) -> PreTrainedModel:
    """An LLM with its weights; packed ones come from the checkpoint's own numbers, whatever `dtype` is."""
    path = folder(config.source, config.revision)
    architecture = AutoConfig.from_pretrained(path)
    with hf.quiet():
        llm = _auto(architecture).from_pretrained(
            path,
            dtype=dtype if config.bits is None else "auto",
            attn_implementation=_kernel(architecture, config.attention),
            use_safetensors=True,
        )
    if config.bits is not None:
        quantised.quantise(llm, config.bits, dtype)
    return llm


def empty_llm(architecture: PreTrainedConfig, attention: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """An LLM's structure; its weights come from a checkpoint.

    Born in `dtype`, not converted to it: rotary frequencies keep the float32 that they have in a loaded LLM.
    """
    return _auto(architecture).from_config(
        architecture, attn_implementation=_kernel(architecture, attention), dtype=dtype
    )


def tokenizer(config: LLMConfig) -> PreTrainedTokenizerBase:
    """The LLM's own tokenizer and chat template."""
    return AutoTokenizer.from_pretrained(folder(config.source, config.revision))


def vocabulary(source: str) -> str:
    """The JSON of a tokenizer that a connector reads with, so that a saved model carries it along."""
    return AutoTokenizer.from_pretrained(folder(source)).backend_tokenizer.to_str()


def tensors(source: str) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's or hub model's safetensors files, by its name there."""
    files = sorted(folder(source).glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{source}: no safetensors weights", "convert the checkpoint to safetensors first")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _kernel(architecture: PreTrainedConfig, attention: str) -> str:
    """Encoder-decoders add position biases to their scores, which our kernel does not know of."""
    return "sdpa" if attention == kernels.NAME and architecture.is_encoder_decoder else attention


def _auto(architecture: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if architecture.is_encoder_decoder else AutoModelForCausalLM


# ---------------------------------------------------------------------------------------------- encoders


def encoder_architecture(config: EncoderConfig) -> dict[str, Any]:
    """An encoder's architecture as plain values; {} for the embedded one, whose code says it all."""
    if config.architecture is not None:
        return config.architecture
    return {} if config.source == EMBEDDED_ENCODER else hf.architecture(folder(config.source, config.revision))


def encoder_weights(config: EncoderConfig) -> Path:
    """The file or folder that holds an encoder's weights."""
    if config.source == EMBEDDED_ENCODER:
        return assets.lite_weights()
    return folder(config.source, config.revision)


def load_encoder(config: EncoderConfig, dtype: torch.dtype) -> Encoder:
    """An encoder with its weights; packed ones come from the checkpoint's own numbers, whatever `dtype` is.

    Raises:
        ConfigError: `bits` for the embedded encoder, which is made of convolutions.
    """
    if config.bits is not None and config.source == EMBEDDED_ENCODER:
        raise ConfigError(f"{EMBEDDED_ENCODER} is made of convolutions, which stay dense", "leave encoder.bits out")
    path = encoder_weights(config)
    source = {"source": config.source, "weights": fingerprint(path), "dtype": str(dtype)}
    if config.source == EMBEDDED_ENCODER:
        return lite.load(config, path, source).to(dtype)
    if config.bits is None:
        return hf.load(config, path, source, dtype)
    encoder = hf.load(config, path, source | {"bits": str(config.bits)}, "auto")
    quantised.quantise(encoder, config.bits, dtype)
    return encoder


def empty_encoder(
    config: EncoderConfig,
    architecture: dict[str, Any],
    checkpoint: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """An encoder's structure; its weights and processor come from a checkpoint, or it is only planned with."""
    source = {"source": config.source, "weights": str(checkpoint)}
    if config.source == EMBEDDED_ENCODER:
        return lite.EfficientNetLite(config, source).to(dtype)
    return hf.empty(config, architecture, hf.processor(checkpoint) if checkpoint else None, source, dtype)
