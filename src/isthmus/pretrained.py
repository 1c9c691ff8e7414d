"""Models of transformers with all of their weights: what a folder lacks is named, where transformers would draw it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging

from isthmus.errors import ConfigError, abbreviated


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars over weights on disk: commands show their own. Downloads keep theirs."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def complete(kind: Any, folder: Path, needed: Callable[[str], bool] = bool, **options: Any) -> Any:
    """A model of transformers with its weights, all of which are in the folder: transformers would draw what is not.

    Args:
        kind: the class, or an Auto class.
        folder: where the model is.
        needed: whether the model is of no use without the tensor of a name; all are, unless told.
        options: those of `from_pretrained`.

    Raises:
        ConfigError: files cannot be read; tensors are missing, or of another shape than the config says.
    """
    try:
        with quiet():
            model, told = kind.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except (SafetensorError, OSError) as error:
        remedy = "copy it again" if any(folder.glob("*.safetensors")) else "convert it to safetensors first"
        raise ConfigError(f"{folder}: {str(error).splitlines()[0]}", remedy) from None
    if missing := sorted(filter(needed, told["missing_keys"])):
        raise ConfigError(f"{folder}: the weights lack {abbreviated(missing)}", "copy the checkpoint again")
    if other := sorted(name for name, *_ in told["mismatched_keys"]):
        raise ConfigError(
            f"{folder}: the weights have other shapes than config.json says: {abbreviated(other)}",
            "copy the checkpoint again",
        )
    return model
