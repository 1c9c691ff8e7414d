"""RAM against transformers' Swin and a decoder written out; folders in the release's layout, and faults in them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SwinConfig, SwinModel

from isthmus.config import Source
from isthmus.prepare import tags
from isthmus.prepare.ram import Sizes
from isthmus.prepare.ram_folder import NAMES, THRESHOLDS, WEIGHTS, Folder
from isthmus.prepare.tags import Recogniser, Tagger
from isthmus.types import ConfigError, DataError, Image, Sample, Tag, Turn

WIDTH, DEPTHS, SWIN_HEADS, WINDOW, SIDE = 8, [2, 2], [2, 4], 4, 32
TAGS, LABEL, DECODER, INNER, HEADS = 30, 6, 8, 12, 4
ENDINGS = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.self.relative_position_bias_table": "attn.relative_position_bias_table",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


@pytest.fixture(scope="module")
def swin() -> SwinModel:
    """Swin of transformers, with weights large enough for masks and position tables to matter."""
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=SIDE, embed_dim=WIDTH, depths=DEPTHS, num_heads=SWIN_HEADS, window_size=WINDOW, patch_size=4
    )
    model = SwinModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1) * 0.5)
    return model


@pytest.fixture(scope="module")
def release(swin: SwinModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Everything that a checkpoint of the release holds, by its names; Swin's as it saves itself, renamed by hand."""
    folder = tmp_path_factory.mktemp("swin")
    swin.save_pretrained(folder)
    hub = load_file(folder / "model.safetensors")
    found: dict[str, Tensor] = {}
    for name, tensor in hub.items():
        if not name.startswith("encoder."):
            place, kind = name.rsplit(".", 1)
            known = {
                "embeddings.patch_embeddings.projection": "patch_embed.proj",
                "embeddings.norm": "patch_embed.norm",
            }
            found[f"visual_encoder.{(known | {'layernorm': 'norm'})[place]}.{kind}"] = tensor
            continue
        name = name.removeprefix("encoder.")
        if ".attention.self.query." in name:
            thirds = [hub["encoder." + name.replace("query", part)] for part in ("query", "key", "value")]
            found["visual_encoder." + name.replace("attention.self.query", "attn.qkv")] = torch.cat(thirds)
        elif ".attention.self." not in name or name.endswith("table"):
            ending = next((hub_s for hub_s in ENDINGS if f".{hub_s}" in name), None)
            found["visual_encoder." + (name.replace(ending, ENDINGS[ending]) if ending else name)] = tensor
    for stage in range(2):
        at = f"visual_encoder.layers.{stage}.blocks.1"
        found[f"{at}.attn.relative_position_index"] = torch.zeros(WINDOW**2, WINDOW**2, dtype=torch.long)
        found[f"{at}.attn_mask"] = torch.zeros(4, WINDOW**2, WINDOW**2)
    random = torch.Generator().manual_seed(1)

    def linear(name: str, inputs: int, outputs: int, scale: float = 1.0) -> None:
        found[f"{name}.weight"] = torch.randn(outputs, inputs, generator=random) * scale / inputs**0.5
        found[f"{name}.bias"] = torch.randn(outputs, generator=random) / 5

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"] = torch.rand(width, generator=random) + 0.5
        found[f"{name}.bias"] = torch.randn(width, generator=random) / 5

    linear("image_proj", WIDTH * 2, LABEL, 3.0)
    found["label_embed"] = torch.randn(TAGS, LABEL, generator=random) * 2
    linear("wordvec_proj", LABEL, DECODER)
    linear("fc", DECODER, 1)
    for layer in range(2):
        at = f"tagging_head.encoder.layer.{layer}"
        linear(f"{at}.crossattention.self.query", DECODER, DECODER, 4.0)
        linear(f"{at}.crossattention.self.key", LABEL, DECODER)
        linear(f"{at}.crossattention.self.value", LABEL, DECODER)
        linear(f"{at}.crossattention.output.dense", DECODER, DECODER, 0.5)
        norm(f"{at}.crossattention.output.LayerNorm", DECODER)
        linear(f"{at}.intermediate.dense", DECODER, INNER)
        linear(f"{at}.output.dense", INNER, DECODER)
        norm(f"{at}.output.LayerNorm", DECODER)
        linear(f"tag_encoder.encoder.layer.{layer}.attention.self.query", DECODER, DECODER)
    linear("text_decoder.cls.predictions.transform.dense", DECODER, DECODER)
    return found


def write(folder: Path, release: dict[str, Tensor], thresholds: list[float] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(release, folder / WEIGHTS)
    (folder / NAMES).write_text("\n".join(f"thing {number}" for number in range(TAGS)))
    lines = thresholds or [0.3 + 0.4 * (number % 7) / 6 for number in range(TAGS)]
    (folder / THRESHOLDS).write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.fixture
def folder(release: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    return write(tmp_path / "ram", release)


def by_hand(swin: SwinModel, release: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Logits, the decoder written out."""

    def linear(name: str, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, release[f"{name}.weight"]) + release[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * release[f"{name}.weight"] + release[f"{name}.bias"]

    seen = swin(pixels).last_hidden_state
    image = linear("image_proj", torch.cat([seen.sum(1, keepdim=True) / seen.shape[1], seen], 1))
    names = linear("wordvec_proj", release["label_embed"]).clamp(min=0)[None].repeat(len(pixels), 1, 1)
    for layer in range(2):
        at = f"tagging_head.encoder.layer.{layer}"
        query, key, value = (
            linear(f"{at}.crossattention.self.{part}", x).reshape(len(pixels), -1, HEADS, DECODER // HEADS)
            for part, x in (("query", names), ("key", image), ("value", image))
        )
        weights = (torch.einsum("nthd,nshd->nhts", query, key) / (DECODER // HEADS) ** 0.5).softmax(-1)
        answer = torch.einsum("nhts,nshd->nthd", weights, value).reshape(names.shape)
        names = norm(
            f"{at}.crossattention.output.LayerNorm", names + linear(f"{at}.crossattention.output.dense", answer)
        )
        inner = linear(f"{at}.intermediate.dense", names)
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        names = norm(f"{at}.output.LayerNorm", names + linear(f"{at}.output.dense", inner))
    return linear("fc", names)[..., 0]


def coloured(seed: int) -> Image:
    """Six fields of random colours, wider than high."""
    fields = np.random.default_rng(seed).integers(0, 256, (2, 3, 3), np.uint8)
    return Image(Pillow.fromarray(fields).resize((90, 50), Pillow.Resampling.NEAREST))


def pixels_of(image: Image) -> Tensor:
    """What the release makes of a picture: stretched by Pillow's bilinear filter, then ImageNet's statistics."""
    small = np.asarray(image.source.resize((SIDE, SIDE), Pillow.Resampling.BILINEAR), np.float32) / 255
    scaled = (small - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return torch.from_numpy(scaled).permute(2, 0, 1)


def asked(image: Image) -> Sample:
    return Sample((Turn.say("user", image, "?"), Turn.say("assistant", "a thing")), "one")


def listed(sample: Sample) -> list[Tag]:
    return [part for part in sample.turns[0].parts if isinstance(part, Tag)]


# ---------------------------------------------------------------------------------------------- the network


def test_all_sizes_are_told_by_the_shapes(folder: Path) -> None:
    expected = Sizes(4, WIDTH, (2, 2), (2, 4), WINDOW, TAGS, LABEL, DECODER, INNER, layers=2)
    found = Folder.of(folder)
    assert found.sizes == expected and found.sizes.side == SIDE
    assert found.sizes.shapes().keys() == found.stored.keys()


def test_the_public_checkpoint_has_the_side_and_the_size_that_its_page_says() -> None:
    """Swin-L has 195 million parameters without its classifier, Swin-B 87 (arXiv 2103.14030, table 1)."""
    for width, heads, millions in ((192, (6, 12, 24, 48), 195.2), (128, (4, 8, 16, 32), 86.9)):
        sizes = Sizes(4, width, (2, 2, 18, 2), heads, 12, 4585, 512, 768, 3072, 2)
        counts = {name: np.prod(shape, dtype=int) for name, shape in sizes.shapes().items()}
        assert sizes.side == 384
        assert sum(counts[name] for name in counts if name.startswith("visual")) / 1e6 == pytest.approx(
            millions, abs=0.1
        )


@torch.inference_mode()
def test_swin_sees_what_transformers_own_sees(folder: Path, swin: SwinModel) -> None:
    pixels = torch.randn(3, 3, SIDE, SIDE)
    found = Folder.of(folder).network().swin(pixels).last_hidden_state
    torch.testing.assert_close(found, swin(pixels).last_hidden_state, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_logits_are_those_of_the_decoder_written_out(folder: Path, swin: SwinModel, release: dict[str, Tensor]) -> None:
    pixels = torch.stack([pixels_of(coloured(number)) for number in range(8)])
    expected = by_hand(swin, release, pixels)
    assert expected.std(1).min() > 0.1 and expected.std(0).mean() > 2e-3  # names and pictures differ
    torch.testing.assert_close(Folder.of(folder).network()(pixels), expected, atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("change", ["old names", "half"])
def test_older_names_and_other_dtypes_are_read(change: str, release: dict[str, Tensor], tmp_path: Path) -> None:
    pixels = torch.randn(1, 3, SIDE, SIDE)
    plain = Folder.of(write(tmp_path / "plain", release)).network()
    if change == "old names":
        other = {name.replace("tagging_head", "vision_multi"): tensor for name, tensor in release.items()}
    else:
        other = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in release.items()}
    network = Folder.of(write(tmp_path / "other", other)).network()
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    torch.testing.assert_close(network(pixels), plain(pixels), atol=0.1 if change == "half" else 1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------- tags


@torch.inference_mode()
def test_a_picture_gets_the_names_above_their_thresholds_the_surest_first(
    folder: Path, swin: SwinModel, release: dict[str, Tensor]
) -> None:
    shown = coloured(3)
    (sure,) = by_hand(swin, release, pixels_of(shown)[None]).sigmoid()
    lines = [float(line) for line in (folder / THRESHOLDS).read_text().split()]
    above = {f"thing {n}": p for n, (p, line) in enumerate(zip(sure.tolist(), lines)) if p > line}
    assert 2 < len(above) < TAGS - 2 and any(p > 0.3 for n, p in enumerate(sure) if f"thing {n}" not in above)
    tagger = Tagger.of({"by": "ram", "weights": str(folder), "most": 20}, "here")
    found = listed(tagger(asked(shown)))
    assert [tag.text for tag in found] == sorted(above, key=lambda name: -above[name])[:20]
    assert [tag.score for tag in found] == pytest.approx(sorted(above.values(), reverse=True)[:20], abs=1e-4)
    least = sorted(above.values())[len(above) // 2]
    surer = Tagger.of({"by": "ram", "weights": str(folder), "most": 20, "least": least + 1e-3}, "here")
    assert {tag.text for tag in listed(surer(asked(shown)))} == {n for n, p in above.items() if p > least + 1e-3}


def test_a_set_and_a_look_ahead_at_it_show_each_picture_to_the_network_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "that"}]
    for number in range(5):
        coloured(number).source.save(tmp_path / f"{number}.png")
    records = [{"id": str(n), "image": f"{n}.png", "conversations": talk} for n in range(5)]
    (tmp_path / "my.json").write_text(json.dumps(records))
    source = Source(name=str(tmp_path / "my.json"), split="test", tags={"by": "ram", "weights": str(folder)})
    loads: list[int] = []
    network = Folder.network
    monkeypatch.setattr(Folder, "network", lambda self: loads.append(1) or network(self))
    done: list[tuple[int, int]] = []
    tags.look_ahead([source], 0, lambda *told: done.append(told))
    assert done[-1] == (5, 5) and loads == [1]
    opened = tags.open_set(source, seed=0)
    first = [listed(sample) for sample in opened]
    assert loads == [1] and any(first) and len({tuple(tag.text for tag in found) for found in first}) > 1
    (kept,) = (tmp_path / "home" / "tags").glob("ram-*.jsonl")
    assert len(kept.read_text().splitlines()) == 5
    again = Recogniser(kept.parent, Folder.of(folder))
    monkeypatch.setattr(again, "_classify", lambda images: pytest.fail("seen before"))
    for found, tagged in zip(again.see([sample.media[0] for sample in opened]), first, strict=True):
        assert sorted(found, key=lambda tag: (-tag.score, tag.text))[:10] == tagged


def test_other_thresholds_and_other_names_are_other_taggers(folder: Path, tmp_path: Path) -> None:
    files = {Recogniser(tmp_path, Folder.of(folder)).file}
    (folder / THRESHOLDS).write_text("0.5\n" * TAGS)
    files.add(Recogniser(tmp_path, Folder.of(folder)).file)
    (folder / NAMES).write_text("\n".join(f"chose {number}" for number in range(TAGS)))
    files.add(Recogniser(tmp_path, Folder.of(folder)).file)
    assert len(files) == 3


def test_a_threshold_of_one_bars_a_tag(release: dict[str, Tensor], tmp_path: Path) -> None:
    for line, count in ((1.0, 0), (0.0, 20)):
        folder = write(tmp_path / str(line), release, [line] * TAGS)
        assert [
            len(found) for found in Recogniser(tmp_path, Folder.of(folder)).see([coloured(n) for n in range(5)])
        ] == [count] * 5


def test_it_looks_on_an_accelerator_but_in_forked_workers_and_can_rest(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`meta` stands for an accelerator."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    recogniser = Recogniser(tmp_path, Folder.of(folder))
    network, device = recogniser._awake()
    assert device.type == "meta" and all(parameter.is_meta for parameter in network.parameters())
    assert recogniser._awake()[0] is network
    monkeypatch.setattr(tags, "get_worker_info", lambda: "a worker")
    network, device = recogniser._awake()
    assert device.type == "cpu" and not any(parameter.is_meta for parameter in network.parameters())
    recogniser.rest()
    assert recogniser._awake()[0] is not network


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("options", [{"by": "ram"}, {"by": "record", "weights": "here"}])
def test_weights_belong_to_ram_alone(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tags of here: .*weights: FOLDER"):
        Tagger.of(options, "here")


@pytest.mark.parametrize("name", [WEIGHTS, NAMES, THRESHOLDS])
def test_a_file_that_is_missing_is_named_before_anything_is_looked_at(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=rf"ram: no {name}") as raised:
        Tagger.of({"by": "ram", "weights": str(folder)}, "here")
    assert "docs/systems/lion.md" in raised.value.remedy


Change = Callable[[dict[str, Tensor]], Any]
TABLE = "attn.relative_position_bias_table"
BLOCK, CROSS = "visual_encoder.layers.1.blocks.1", "tagging_head.encoder.layer.1.crossattention"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda t: t.pop("label_embed"), "no tensor 'label_embed', so these are not RAM's"),
        (lambda t: t.pop("visual_encoder.patch_embed.proj.weight"), "no tensor 'visual_encoder.patch_embed.proj"),
        (lambda t: t.pop(f"{BLOCK}.attn.qkv.bias"), rf"are missing: {BLOCK}.attn.qkv.bias$"),
        (lambda t: [t.pop(f"{CROSS}.self.key.{kind}") for kind in ("weight", "bias")], "key.bias and 1 more"),
        (lambda t: t.update(odd=torch.ones(1)), "are unknown: odd$"),
        (lambda t: t.update(fc=torch.ones(1)), "are unknown: fc$"),
        (lambda t: t.update(label_embed=torch.ones(TAGS)), rf"label_embed is of shape \[{TAGS}\]"),
        (lambda t: t.update(label_embed=torch.ones(0, LABEL)), r"label_embed is of shape \[0, 6\]"),
        (lambda t: t.update(label_embed=torch.ones(TAGS, 7)), "not "),
        (lambda t: t.update({f"{BLOCK}.mlp.fc1.bias": torch.ones(5)}), rf"{BLOCK}.* of shape \[5\], not \[64\]"),
        (lambda t: t.update({f"{BLOCK}.{TABLE}": torch.ones(9, 4)}), rf"{TABLE} is of shape \[9, 4\], not \[49, 4\]"),
        (lambda t: t.update(reweight_scale=torch.ones(1)), "RAM\\+\\+'s weights"),
        (lambda t: t.update({"label_embed.weight": t.pop("label_embed")}), "Tag2Text's weights"),
    ],
)  # fmt: skip
def test_weights_that_are_not_rams_are_refused_by_the_tensors_name(
    change: Change, cause: str, release: dict[str, Tensor], tmp_path: Path
) -> None:
    tensors = dict(release)
    change(tensors)
    with pytest.raises(DataError) as raised:
        Folder.of(write(tmp_path / "ram", tensors))
    assert re.search(cause, raised.value.cause), raised.value.cause
    assert WEIGHTS in raised.value.cause and "\n" not in raised.value.cause and raised.value.remedy


def test_heads_that_do_not_divide_a_width_are_refused(release: dict[str, Tensor], tmp_path: Path) -> None:
    tables = {name: torch.ones(49, 3) for name in release if "layers.0." in name and name.endswith(TABLE)}
    with pytest.raises(DataError, match="do not divide"):
        Folder.of(write(tmp_path / "ram", {**release, **tables}))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle in an archive", b"\x08" + b"\0" * 7 + b"not json"])
def test_a_file_that_is_no_safetensors_is_refused(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(DataError, match=f"{WEIGHTS}: cannot be read"):
        Folder.of(folder)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        (NAMES, "dog\n" * (TAGS - 1), f"{TAGS - 1} lines, where {WEIGHTS} has {TAGS} tags"),
        (NAMES, "dog\n" * 3 + "\n" + "dog\n" * (TAGS - 4), "line 4 is empty"),
        (NAMES, "", f"0 lines, where {WEIGHTS} has {TAGS} tags"),
        (NAMES, b"\xff\xfe", "cannot be read"),
        (THRESHOLDS, "0.5\n" * (TAGS + 1), f"{TAGS + 1} lines, where {WEIGHTS} has {TAGS} tags"),
        (THRESHOLDS, "0.5\n" * (TAGS - 1) + "high", f"line {TAGS} is 'high', not a number from 0 to 1"),
        (THRESHOLDS, "65\n" + "0.5\n" * (TAGS - 1), "line 1 is '65'"),
        (THRESHOLDS, "nan\n" + "0.5\n" * (TAGS - 1), "line 1 is 'nan'"),
    ],
)
def test_lists_that_are_damaged_or_of_another_checkpoint_are_refused(
    folder: Path, name: str, content: str | bytes, cause: str
) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as raised:
        Folder.of(folder)
    assert f"{name}: {cause}" in raised.value.cause and raised.value.remedy


def test_a_folder_of_another_model_is_refused(folder: Path, swin: SwinModel, tmp_path: Path) -> None:
    swin.save_pretrained(tmp_path / "swin")
    shutil.copy(tmp_path / "swin" / "model.safetensors", folder / WEIGHTS)
    with pytest.raises(DataError, match="no tensor 'visual_encoder.* so these are not RAM's weights"):
        Folder.of(folder)
