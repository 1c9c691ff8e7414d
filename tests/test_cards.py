"""The card of every directory says what the run's own files say, and is read by the hub's own reader."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image as Pillow
from rich.console import Console

import composed
import isthmus
from isthmus import cards
from isthmus.config import LoRA, Stage
from isthmus.data.sets import open_set
from isthmus.errors import ConfigError
from isthmus.experiment import experiment
from isthmus.exporting import llava, peft
from isthmus.training.toy import toy


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run with everything that a card tells of: two stages on a file, LoRA, a report."""
    folder = tmp_path_factory.mktemp("carded")
    made = toy(folder / "parts", rows=12)
    task = {"name": "exact", "limit": 4, "options": {"data": made.stages[0].data[0].model_dump(mode="json")}}
    stages = [{**each.model_dump(), "budget": {"steps": 2}, "save_every": None} for each in made.stages]
    recipe = type(made).model_validate({**made.model_dump(), "stages": stages, "eval": [task]})
    assert experiment(recipe, folder / "run", torch.device("cpu"), Console(quiet=True)) is not None
    return folder / "run"


def lines(card: ModelCard, section: str) -> list[list[str]]:
    """The rows of a section's table."""
    text = card.text.split(f"## {section}\n", 1)[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if "|" in line][2:]


def test_a_card_says_what_the_run_did(run: Path) -> None:
    model, noted, report = (
        ModelCard.load(run / "tune/model/README.md"),
        json.loads((run / "run.json").read_text()),
        json.loads((run / "report.json").read_text()),
    )
    assert f"Recipe {noted['fingerprint']}, seed {noted['recipe']['seed']}" in model.text
    stages = lines(model, "Training")
    assert [row[0] for row in stages] == ["align", "tune"]
    for row in stages:
        manifest = json.loads((run / row[0] / "manifest.json").read_text())
        assert row[3] == str(manifest["steps"]) == "2" and row[4] == str(manifest["run"]["batch_size"])
    assert "`llm.*self_attn.*` LoRA r 2 at 0.01" in stages[1][1]
    assert [row[5] for row in stages] == ["0.01", "0.001, 0.01"]
    sources = [each for name in ("align", "tune") for each in json.loads((run / name / "data.json").read_text())]
    assert [row[5] for row in lines(model, "Data")] == [each["hash"] for each in sources]
    assert [row[3] for row in lines(model, "Data")] == [str(each["size"]) for each in sources]
    after = report["rows"][0]["cells"]["after"]
    assert lines(model, "Figures")[0][4] == f"{after['value']:.3f} ({after['low']:.3f} – {after['high']:.3f})"
    assert report["data_hash"] in model.text
    assert model.data.eval_results[0].metric_value == after["value"]
    config = json.loads((run / "tune/model/config.json").read_text())
    told = {row[0]: row for row in lines(model, "Parts")}
    assert told["LLM"][3] == config["llm"]["weights"]
    assert told["image encoder"][3] == config["encoders"]["image"]["weights"]


def test_a_stage_before_the_last_claims_neither_what_came_later_nor_its_figures(run: Path) -> None:
    cards.refresh(run / "align/model")
    card = ModelCard.load(run / "align/model/README.md")
    assert [row[0] for row in lines(card, "Training")] == ["align"] and "## Figures" not in card.text


def test_no_path_of_this_machine_is_told(run: Path) -> None:
    assert str(run.parent) not in (run / "tune/model/README.md").read_text()


def test_the_front_matter_is_what_a_hub_asks_for(run: Path, tmp_path: Path) -> None:
    data = ModelCard.load(run / "tune/model/README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("isthmus", "image-text-to-text", "other")
    config = json.loads((run / "tune/model/config.json").read_text())
    config["llm"]["config"] |= {"source": "smollm2-135m-instruct"}
    config["encoders"]["image"]["config"] |= {"source": "efficientnet-lite0"}
    (tmp_path / "README.md").write_text(cards.card(config, cards.Lineage()))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "apache-2.0" and card.data.base_model[0] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "quantised by QuantFactory" in card.text and cards.EMBEDDED["efficientnet-lite0"].sha256 in card.text


def test_exported_directories_carry_the_lineage_on(run: Path, tmp_path: Path) -> None:
    source = run / "tune/model"
    found = peft.export_adapters(source, tmp_path / "peft")
    for folder in found:
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == "peft" and len(lines(card, "Training")) == 2
    assert {row[3] for row in lines(card, "Parts") if row[0] == "LoRA"} == {"in this directory"}
    plain = composed.model("llama", aspect="crop")
    plain.add_lora(["llm.*.q_proj"], LoRA(r=2), "sft")
    plain.add_lora(["encoders.*.fc1", "llm.*.v_proj"], LoRA(r=2), "both")
    plain.save_pretrained(tmp_path / "plain")
    parity = llava.export(tmp_path / "plain", tmp_path / "theirs")
    card = ModelCard.load(tmp_path / "theirs/README.md")
    assert card.data.library_name == "transformers"
    assert f"LlavaForConditionalGeneration, largest difference of logits {parity.difference:.1e}" in card.text
    merged = ["merged into the LLM", "merged into the LLM and the encoder"]
    assert [row[3] for row in lines(card, "Parts") if row[0] == "LoRA"] == merged


def test_a_figure_that_is_none_is_a_dot(run: Path) -> None:
    source = run / "tune/model"
    config, told = json.loads((source / "config.json").read_text()), cards.lineage(source)
    assert told.report is not None
    report = json.loads(json.dumps(told.report))
    report["rows"][0]["cells"]["after"] |= {"value": None, "low": None, "high": None}
    card = ModelCard(cards.card(config, replace(told, report=report)))
    assert lines(card, "Figures")[0][4] == "·" and len(lines(card, "Figures")) == len(report["rows"])
    assert len(card.data.eval_results or []) == len(report["rows"]) - 1


def test_a_link_to_a_model_has_its_lineage(run: Path, tmp_path: Path) -> None:
    (tmp_path / "best").symlink_to(run / "tune/model")
    assert cards.lineage(tmp_path / "best") == cards.lineage(run / "tune/model")
    assert len(cards.lineage(tmp_path / "best").stages) == 2


def test_figures_are_left_out_where_they_do_not_hold(run: Path) -> None:
    source = run / "tune/model"
    config, told = json.loads((source / "config.json").read_text()), cards.lineage(source)
    plain = cards.Export("GGUF", "gguf", "code", 1e-6)
    kept, left = (
        ModelCard(cards.card(config, told, each)) for each in (plain, replace(plain, caveats=("it pads pictures",)))
    )
    assert kept.data.eval_results and "## Figures" in kept.text
    assert not left.data.eval_results and "## Figures" not in left.text and "\nit pads pictures.\n" in left.text
    assert lines(left, "Licences and attributions") == lines(kept, "Licences and attributions")


def test_a_hubs_name_is_told_from_a_path_that_is_not_found(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--openai--clip").mkdir()
    config = json.loads((run / "tune/model/config.json").read_text())
    config["llm"]["config"] |= {"source": "exported/llava"}
    config["encoders"]["image"]["config"] |= {"source": "openai/clip"}
    card = ModelCard(cards.card(config, cards.Lineage()))
    assert card.data.base_model == ["openai/clip"]
    assert [row[1] for row in lines(card, "Parts")[:2]] == ["openai/clip", "llava (not found from here)"]
    assert "exported/" not in card.content


def test_a_card_that_is_somebody_elses_stays(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "tune/model", tmp_path / "model"))
    (folder / "README.md").write_text("mine")
    model = isthmus.load(folder)
    model.save_pretrained(folder)
    cards.refresh(folder)
    assert (folder / "README.md").read_text() == "mine"


@pytest.mark.parametrize("whole", [False, True], ids=["delta", "whole"])
def test_a_model_that_is_loaded_and_saved_again_is_the_same_bytes(tmp_path: Path, whole: bool) -> None:
    model = composed.stir(composed.model("qwen2"))
    model.add_lora(["llm.*.q_proj"], LoRA(r=2), "sft")
    model.save_pretrained(tmp_path / "one", whole=whole)
    isthmus.load(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one.keys() == two.keys() >= {"README.md", "model.safetensors", "tokenizer.json"}
    assert {name for name in one if one[name] != two[name]} == set()


def test_a_note_of_an_older_version_is_completed_and_then_holds(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    Pillow.new("RGB", (2, 2)).save(tmp_path / "pictures" / "cat" / "0.png")
    source = {"name": str(tmp_path / "pictures")}
    tree = {"name": "sft", "data": [source], "budget": {"steps": 1}, "train": {"connectors.*": 1e-3}}
    stage = Stage.model_validate(tree)
    opened = [open_set(stage.data[0], 0).card]
    (tmp_path / cards.STEPS).touch()
    old = {**source, "size": 1, "hash": "then", "content": ["of its names alone"]}
    (tmp_path / cards.DATA).write_text(json.dumps([old]))
    cards.note_data(tmp_path, stage, opened, 0)
    (noted,) = json.loads((tmp_path / cards.DATA).read_text())
    assert noted["hash"] == "then" and len(noted[cards.CONTENT]) == 1
    (tmp_path / "pictures" / "cat").rename(tmp_path / "pictures" / "bird")
    with pytest.raises(ConfigError, match="has changed since stage"):
        cards.note_data(tmp_path, stage, opened, 0)
