"""Fetching against a real pip and a package made here; reading weights against torch's own writer."""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from isthmus import assets
from isthmus.assets import packages
from isthmus.assets.packages import Package
from isthmus.errors import ConfigError, DataError, IsthmusError
from isthmus.torchfile import read_tensors

FILES = {"tiny/data/a.txt": b"alpha", "tiny/data/b.txt": b"beta", "tiny/code.py": b"raise SystemExit('executed')"}


def wheel(folder: Path, files: dict[str, bytes], members: tuple[str, ...]) -> Package:
    """A wheel that pip accepts, and its pin."""
    path = folder / "tiny_isthmus_part-1.0-py3-none-any.whl"
    info = "tiny_isthmus_part-1.0.dist-info"
    extra = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-isthmus-part\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (files | extra).items():
            archive.writestr(name, content)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Package("tiny-isthmus-part", "1.0", "pip", digest, path.stat().st_size, members, 100, "MIT", "us")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and the folder that pip looks in instead of any network."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


def offer(monkeypatch: pytest.MonkeyPatch, package: Package) -> None:
    monkeypatch.setitem(packages.GROUPS, "tiny", (package,))


def test_fetch_keeps_the_wanted_files_and_is_idempotent(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = wheel(index, FILES, ("tiny/data/*.txt",))
    offer(monkeypatch, package)
    seen: list[tuple[str, int, int]] = []
    assert assets.missing("tiny") == ["tiny-isthmus-part"]
    assets.fetch("tiny", lambda what, done, total: seen.append((what, done, total)))
    kept = {str(path.relative_to(package.folder)) for path in package.folder.rglob("*") if path.is_file()}
    assert kept == {"tiny/data/a.txt", "tiny/data/b.txt"}
    assert assets.locate(package, "tiny/data/a.txt").read_bytes() == b"alpha"
    assert seen[-1][1:] == (package.size, package.size)
    (index / "tiny_isthmus_part-1.0-py3-none-any.whl").unlink()
    assets.fetch("tiny")  # nothing is asked of pip again
    assert assets.missing("tiny") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "not the pinned one"),
        ({"members": ("tiny/none.txt",)}, "no member 'tiny/none.txt'"),
        ({"unpacked": 8}, "is refused"),
        ({"version": "2.0"}, "could not download"),
    ],
)
def test_a_wrong_package_leaves_nothing_behind(
    index: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    package = replace(wheel(index, FILES, ("tiny/data/*.txt",)), **change)
    offer(monkeypatch, package)
    with pytest.raises(IsthmusError, match=message) as caught:
        assets.fetch("tiny")
    assert caught.value.remedy
    assert not list((packages.home() / "packages").iterdir())


def test_a_member_cannot_leave_its_folder(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = wheel(index, {"tiny/../../evil.txt": b"x"}, ("tiny/*",))
    offer(monkeypatch, package)
    with pytest.raises(DataError, match="is refused"):
        assets.fetch("tiny")
    assert not list(packages.home().rglob("evil.txt"))


def test_links_in_a_tarball_are_passed_over(tmp_path: Path) -> None:
    path, target = tmp_path / "part.tgz", tmp_path / "out"
    with tarfile.open(path, "w:gz") as tarball:
        link = tarfile.TarInfo("package/link.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tarball.addfile(link)
    package = Package("part", "1", "npm", "", 0, ("package/link.json",), 10, "MIT", "us")
    with pytest.raises(DataError, match="no member"):
        assets._keep(package, path, target)
    assert not target.exists()


def test_what_was_not_fetched_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path))
    with pytest.raises(IsthmusError, match="isthmus data fetch demo"):
        assets.llm_folder()
    with pytest.raises(IsthmusError, match="isthmus data fetch styles"):
        assets.locate(packages.NOTO, "package/icons.json")
    with pytest.raises(ConfigError, match="no group"):
        assets.fetch("dmeo")


# ---------------------------------------------------------------------------------------------- weights


def save_legacy(path: Path, value: object) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


def test_tensors_are_those_that_torch_wrote(tmp_path: Path) -> None:
    base = torch.randn(6, 8, 3)
    state = OrderedDict(
        plain=base,
        permuted=base.permute(2, 0, 1),
        window=base[2:5, ::2],
        counter=torch.tensor(7),
        wide=torch.arange(10),
        empty=torch.zeros(0, 4),
    )
    found = read_tensors(save_legacy(tmp_path / "x.pth", state))
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.numpy().dtype
        np.testing.assert_array_equal(found[name], tensor.numpy())


def test_nothing_but_tensors_is_read(tmp_path: Path) -> None:
    header = save_legacy(tmp_path / "x.pth", {}).read_bytes()
    start = header.index(b"}q\x00.", 100)  # the empty state dict
    call = b"cposix\nsystem\n(X\x04\x00\x00\x00truetR."
    cases = {
        "global 'posix system' is refused": header[: start - 2] + b"\x80\x02" + call,
        "opcode INST is refused": header[: start - 2] + b"\x80\x02(X\x04\x00\x00\x00trueiposix\nsystem\n.",
    }
    for message, content in cases.items():
        path = tmp_path / "bad.pth"
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_tensors(path)
    with pytest.raises(DataError, match="not a tensor"):
        read_tensors(save_legacy(tmp_path / "y.pth", {"lr": 3}))
    with pytest.raises(DataError, match="refused"):
        read_tensors(save_legacy(tmp_path / "z.pth", {"half": torch.zeros(3, dtype=torch.float16)}))


def test_a_truncated_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = save_legacy(tmp_path / "x.pth", {"w": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="truncated"):
        read_tensors(path)
    torch.save({"w": torch.randn(3)}, path)  # the newer zip format
    with pytest.raises(DataError, match=str(path)):
        read_tensors(path)


def test_the_encoder_file_converts_completely(embedded: None) -> None:
    tensors = load_file(assets.lite_weights())
    counted = sum(t.numel() for name, t in tensors.items() if "running" not in name and "tracked" not in name)
    assert len(tensors) == 296
    assert counted == 4_652_008  # parameters of EfficientNet-Lite0 as published


def test_the_llm_folder_is_complete_and_speaks_its_template(embedded: None) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = assets.llm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.num_hidden_layers, config.vocab_size) == ("llama", 30, len(tokenizer))
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    # SmolLM splits digits before bytes, so that the line breaks before a digit stay one token.
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]


def test_llm_weights_are_the_dequantised_values(embedded: None) -> None:
    """Q4_1 by hand: 32 weights are a scale, a minimum and 16 bytes, whose low halves come first."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(packages.LLM.folder / packages.LLM.members[0])
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.3.ffn_up.weight")
    blocks = np.frombuffer(tensor.data.tobytes(), np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]))
    codes = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], 1).astype(np.float32)
    exact = codes * blocks["d"].astype(np.float32)[:, None] + blocks["m"].astype(np.float32)[:, None]
    with safe_open(assets.llm_folder() / "model.safetensors", "pt") as ours:
        found = ours.get_tensor("model.layers.3.mlp.up_proj.weight").numpy()
    np.testing.assert_array_equal(found, exact.reshape(found.shape))
