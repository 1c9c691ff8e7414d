"""Base parts: where a pretrained encoder or LLM comes from, what identifies it, and how it is loaded.

A source is an embedded part's name, a folder, or a model's name on a hub. All three become a local folder, and a
folder's weights are identified by a hash, so that a joint is never put back on another base by mistake.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any, Literal

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

from isthmus import assets, kernels, quantised, sites
from isthmus.config import EncoderConfig, LLMConfig
from isthmus.encoders import Encoder, hf, lite, nfnet, several, timm
from isthmus.errors import abbreviated
from isthmus.pretrained import complete
from isthmus.types import ConfigError, IsthmusError

EMBEDDED_LLM = "smollm2-135m-instruct"
EMBEDDED_ENCODER = "efficientnet-lite0"
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""Files that are downloaded from a hub; pickles are not among them."""
AGAIN = "copy it again, or use an earlier checkpoint"
"""What to do about a damaged file of a saved model."""


def folder(source: str, revision: str | None = None) -> Path:
    """The local folder of a part.

    Raises:
        ConfigError: there is no such folder, and no model of that name can be had; or its index leads elsewhere.
    """
    if source == EMBEDDED_LLM:
        return assets.llm_folder()
    if Path(source).is_dir():
        return _own_shards(Path(source))
    try:
        return _own_shards(Path(snapshot_download(source, revision=revision, allow_patterns=WANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = "" if isinstance(error, HFValidationError) else f" ({str(error).splitlines()[0]})"  # no hub's name
        raise ConfigError(
            f"{source!r} is neither a folder nor a model that can be downloaded{cause}",
            f"name a folder, a hub model, or an embedded part ({EMBEDDED_LLM}, {EMBEDDED_ENCODER})",
        ) from None


def read_object(file: Path) -> dict[str, Any]:
    """What a JSON file of a model's directory holds.

    Raises:
        IsthmusError: it is missing or damaged.
    """
    if not file.is_file():
        raise IsthmusError(f"{file}: missing", AGAIN)
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise IsthmusError(f"{file}: damaged (not a JSON object)", AGAIN)
    return tree


def _own_shards(path: Path) -> Path:
    """The folder, whose index names safetensors files in it alone: transformers would open whatever else it names.

    Asking transformers for safetensors chooses the index, and not what the index leads to.
    """
    for index in path.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            strange = [shard for shard in shards if Path(shard).name != shard or not shard.endswith(".safetensors")]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{index}: damaged ({error})", "fetch or save the model again") from None
        if strange:
            raise ConfigError(
                f"{index} leads to {min(strange)!r}, which is no safetensors file beside it",
                "convert the checkpoint to safetensors first",
            )
        if missing := sorted(shard for shard in shards if not (path / shard).is_file()):
            raise ConfigError(f"{path}: {abbreviated(missing)} of its index are not there", "copy the checkpoint again")
    return path


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
    """The architecture of an LLM; no weights are read.

    Raises:
        ConfigError: the source is no language model, or one that is multimodal already.
    """
    if config.architecture is not None:
        return AutoConfig.for_model(**config.architecture)
    architecture = AutoConfig.from_pretrained(folder(config.source, config.revision))
    _check_llm(architecture, config.source)
    return architecture


def load_llm(config: LLMConfig, dtype: torch.dtype) -> PreTrainedModel:
    """An LLM with its weights; packed ones come from the checkpoint's own numbers, whatever `dtype` is.

    Raises:
        ConfigError: it is no language model, or one that is multimodal already; or it does not run on the kernel; or
            tensors are missing.
    """
    path = folder(config.source, config.revision)
    architecture = AutoConfig.from_pretrained(path)
    _check_llm(architecture, config.source)
    llm = complete(
        _auto(architecture),
        path,
        dtype=dtype if config.bits is None else "auto",
        attn_implementation=_kernel(architecture, config.attention),
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


def vocabulary(source: str | None) -> str | None:
    """The JSON of a tokenizer that a connector reads with, so that a saved model carries it along.

    None stands for the LLM's.
    """
    return None if source is None else AutoTokenizer.from_pretrained(folder(source)).backend_tokenizer.to_str()


def check_vocabulary(llm: PreTrainedModel, source: str | None, held: int, own: int = 0) -> None:
    """Refuse a text half that cannot hold every word of the LLM, where it reads those.

    Args:
        llm: the LLM.
        source: whose vocabulary the text half reads; None is the LLM's.
        held: entries of the text half.
        own: entries among them that stand for no word of a text, such as one that starts a caption.

    Raises:
        ConfigError: there are too few, with the number that is needed.
    """
    needed = len(sites.embedding(llm).weight) + own
    if source is None and held < needed:
        raise ConfigError(
            f"the text half holds {held} words; it reads the LLM's vocabulary and needs {needed}",
            f"set aligner.options.vocabulary={needed}, or name a tokenizer of its own",
        )


def tensors(source: str) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's or hub model's safetensors files, by its name there."""
    files = sorted(folder(source).glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{source}: no safetensors weights", "convert the checkpoint to safetensors first")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _check_llm(architecture: PreTrainedConfig, source: str) -> None:
    """Refuse what is no language model, or more than one."""
    if architecture.model_type == "isthmus":
        raise ConfigError(
            f"{source} is a model of Isthmus, with an encoder and a joint of its own",
            f"go on from it with start={source}, or name the LLM that it was made of",
        )
    if architecture.get_text_config() is not architecture:
        raise ConfigError(
            f"{source}: {architecture.model_type} is a multimodal model, with a tower and a joint of its own",
            "choose the text-only checkpoint of the family, or save its language model to a folder of its own",
        )
    if type(architecture) not in _auto(architecture)._model_mapping:
        raise ConfigError(
            f"{source}: {architecture.model_type} is not a language model that transformers knows",
            "choose a decoder-only or an encoder-decoder LLM",
        )
    if getattr(architecture, "hidden_size_per_layer_input", None):
        raise ConfigError(
            f"{source}: every layer of {architecture.model_type} looks each token's id up, which a picture has none of",
            "choose a family without embeddings per layer",
        )
    if "past_key_values" not in inspect.signature(_class(architecture).forward).parameters:
        raise ConfigError(
            f"{source}: {architecture.model_type} keeps no keys and values of what it has read, to which decoding with "
            "pictures could go back",
            "choose an LLM whose layers attend",
        )
    if not _class(architecture)._supports_default_dynamic_cache():
        raise ConfigError(
            f"{source}: {architecture.model_type} keeps what it has read in a cache of its own, not in transformers'",
            "choose another LLM",
        )


def _kernel(architecture: PreTrainedConfig, attention: str) -> str | None:
    """What transformers is to call; None is its own choice.

    That stands for our kernel where it would not do: encoder-decoders add position biases to their scores, which it
    does not know of, and older families call no kernel at all.

    Raises:
        ConfigError: the LLM caps its attention scores, and the kernel would not; or it runs on no such kernel.
    """
    if attention == "sdpa" and getattr(architecture, "attn_logit_softcapping", None) is not None:
        raise ConfigError(
            f"{architecture.model_type} caps its attention scores, which sdpa cannot",
            f"set llm.attention to {kernels.NAME}, eager or flex_attention",
        )
    kind = _class(architecture)
    if (
        attention == "sdpa"
        and not kind._supports_sdpa
        or attention == "flex_attention"
        and not kind._supports_flex_attn
    ):
        raise ConfigError(
            f"{architecture.model_type} does not run on {attention}", f"set llm.attention to {kernels.NAME} or eager"
        )
    own = architecture.is_encoder_decoder or not kernels.takes(architecture)
    return None if attention == kernels.NAME and own else attention


def _class(architecture: PreTrainedConfig) -> Any:
    return _auto(architecture)._model_mapping[type(architecture)]


def _auto(architecture: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if architecture.is_encoder_decoder else AutoModelForCausalLM


# ---------------------------------------------------------------------------------------------- encoders


def encoder_architecture(config: EncoderConfig) -> dict[str, Any]:
    """An encoder's architecture as plain values; {} for the embedded one, whose code says it all."""
    if config.also:
        return {"members": [encoder_architecture(one) for one in several.members(config)]}
    if config.architecture is not None:
        return config.architecture
    if config.source == EMBEDDED_ENCODER:
        return {}
    path = folder(config.source, config.revision)
    return timm.architecture(path) or hf.architecture(path)


def encoder_weights(config: EncoderConfig) -> Path:
    """The file or folder that holds the weights of one encoder."""
    if config.source == EMBEDDED_ENCODER:
        return assets.lite_weights()
    return folder(config.source, config.revision)


def encoder_fingerprint(config: EncoderConfig) -> str:
    """The fingerprints of all encoders that a config names, joined by `+`."""
    return "+".join(fingerprint(encoder_weights(one)) for one in several.members(config))


def confirm_encoder(kind: str, config: EncoderConfig, expected: str) -> None:
    """Check that the weights of all encoders that a config names are those that a joint was trained on.

    Raises:
        IsthmusError: one of them is not.
    """
    for one, known in zip(several.members(config), expected.split("+"), strict=True):
        confirm(f"{kind} encoder", encoder_weights(one), known)


def load_encoder(config: EncoderConfig, dtype: torch.dtype) -> Encoder:
    """An encoder with its weights; packed ones come from the checkpoint's own numbers, whatever `dtype` is.

    Raises:
        ConfigError: `bits` for an encoder that is made of convolutions; encoders that cannot be joined.
    """
    if config.also:
        return several.Several([load_encoder(one, dtype) for one in several.members(config)], config.join)
    path = encoder_weights(config)
    source = {"source": config.source, "weights": fingerprint(path), "dtype": str(dtype)}
    if config.bits is None:
        return _load_encoder(config, path, source, dtype)
    encoder = _load_encoder(config, path, source | {"bits": str(config.bits)}, "auto")
    if isinstance(encoder, lite.EfficientNetLite | nfnet.NFNet):
        raise ConfigError(f"{config.source} is made of convolutions, which stay dense", "leave encoder.bits out")
    quantised.quantise(encoder, config.bits, dtype)
    return encoder


def _load_encoder(
    config: EncoderConfig, path: Path, source: dict[str, str], dtype: torch.dtype | Literal["auto"]
) -> Encoder:
    if config.source == EMBEDDED_ENCODER:
        encoder = lite.load(config, path, source)
        return encoder if dtype == "auto" else encoder.to(dtype)
    load = hf.load if timm.architecture(path) is None else timm.load
    return load(config, path, source, dtype)


def empty_encoder(
    config: EncoderConfig,
    architecture: dict[str, Any],
    checkpoint: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """An encoder's structure; its weights and processor come from a checkpoint, or it is only planned with."""
    source = {"source": config.source, "weights": str(checkpoint)}
    processor = hf.processor(checkpoint) if checkpoint else None
    if not config.also:
        return _empty_encoder(config, architecture, processor, source, dtype)
    configs = several.members(config)
    looks = processor.members if processor else [None] * len(configs)
    described = zip(configs, architecture["members"], looks, strict=True)
    return several.Several([_empty_encoder(*one, source, dtype) for one in described], config.join)


def _empty_encoder(
    config: EncoderConfig, architecture: dict[str, Any], processor: Any, source: dict[str, str], dtype: torch.dtype
) -> Encoder:
    if config.source == EMBEDDED_ENCODER:
        return lite.EfficientNetLite(config, source).to(dtype)
    if "architecture" in architecture:
        return timm.empty(config, architecture, source).to(dtype)
    return hf.empty(config, architecture, processor, source, dtype)
