"""`isthmus import` and `export` with peft's adapters, and `--device`: what is not here is refused in two lines."""

from __future__ import annotations

import peft
import pytest
import torch
from typer.testing import CliRunner

import composed
import isthmus
from composed import stir
from isthmus import exporting, lora
from isthmus.cli.app import app
from isthmus.cli.options import on
from isthmus.config import LoRA
from isthmus.exporting import peft_file
from isthmus.exporting.peft import export_adapters, import_adapter
from isthmus.types import ConfigError
from tiny import llm, vision

IDS = torch.arange(20, 36).reshape(2, 8)
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def isthmus_does(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_every_adapter_of_a_model_is_read_by_peft_and_comes_back(tmp_path):
    model = composed.model("llama")
    model.add_lora(["llm.*.q_proj"], LoRA(r=2, alpha=3), "first")
    model.add_lora(["llm.*.mlp.*", "encoders.*layers.*.fc1"], LoRA(r=3, dora=True), "second")
    stir(model).save_pretrained(tmp_path / "model")
    said = isthmus_does("export", tmp_path / "model", tmp_path / "out", "--to", "peft")
    assert "out/llm/first: LoRA on 3 Linears" in said and "out/encoders.image/second: LoRA on 3 Linears" in said
    theirs = peft.PeftModel.from_pretrained(llm("llama"), tmp_path / "out/llm/first", adapter_name="first")
    theirs.load_adapter(tmp_path / "out/llm/second", "second")
    theirs.base_model.set_adapter(["first", "second"])
    torch.testing.assert_close(theirs(input_ids=IDS).logits, model.llm(IDS).logits, rtol=1e-5, atol=1e-4)
    tower = peft.PeftModel.from_pretrained(vision("clip"), tmp_path / "out/encoders.image/second")
    seen, own = (each(pixel_values=PIXELS).last_hidden_state for each in (tower, model.encoders["image"].tower))
    torch.testing.assert_close(own, seen, rtol=1e-5, atol=1e-4)
    base = theirs.peft_config["first"].base_model_name_or_path
    assert base == model.config.llm["config"]["source"]

    bare = composed.model("llama")
    bare.connectors.load_state_dict(model.connectors.state_dict())
    bare.save_pretrained(tmp_path / "0")
    steps = [("llm", "first"), ("llm", "second"), ("encoders.image", "second")]
    for number, (part, name) in enumerate(steps):
        into, name_there = tmp_path / str(number + 1), f"{name}_{number}"
        onto = ["--onto", tmp_path / str(number), "--part", part, "--name", name_there]
        said = isthmus_does("import", tmp_path / "out" / part / name, into, *onto)
        assert f"LoRA '{name_there}' on" in said
    again, trial = isthmus.load(tmp_path / "3"), exporting.Trial.of(model)
    expected = trial.logits(model, model.placeholder("image"))
    torch.testing.assert_close(trial.logits(again, again.placeholder("image")), expected, rtol=1e-5, atol=1e-5)


def test_an_imported_adapter_with_ranks_of_its_own_is_saved_and_loaded(tmp_path):
    config = peft.LoraConfig(
        r=4, target_modules=["k_proj"], rank_pattern={"layers.1.*k_proj": 2}, use_rslora=True, init_lora_weights=False
    )
    theirs = peft.get_peft_model(llm("llama"), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    composed.model("llama").save_pretrained(tmp_path / "model")
    import_adapter(tmp_path / "adapter", tmp_path / "model", tmp_path / "out")
    ours = isthmus.load(tmp_path / "out")
    torch.testing.assert_close(ours.llm(IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    assert sorted(each["r"] for each in ours.config.lora) == [2, 4]


def test_what_cannot_be_exchanged_is_refused_with_the_reason(tmp_path):
    model = composed.model("llama")
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="has no LoRA"):
        export_adapters(tmp_path / "bare", tmp_path / "out")
    model.add_lora(["connectors.*"], LoRA(r=2), "joint")
    model.save_pretrained(tmp_path / "joint")
    with pytest.raises(ConfigError, match="lies on connectors.image.layers.0"):
        export_adapters(tmp_path / "joint", tmp_path / "out")
    changed = composed.model("llama")
    changed.add_lora(["llm.*.q_proj"], LoRA(r=2), "first")
    changed.add_lora(["llm.*.v_proj"], LoRA(r=2), "second")
    changed.merge_lora("first")
    changed.save_pretrained(tmp_path / "changed")
    with pytest.raises(ConfigError, match="q_proj.weight was trained beside LoRA 'second', and peft keeps LoRA alone"):
        export_adapters(tmp_path / "changed", tmp_path / "out")
    lora.attach(plain := llm("llama"), "*.q_proj", LoRA(r=2))
    peft_file.write(plain, "lora", tmp_path / "adapter")
    with pytest.raises(ConfigError, match="did you mean 'encoders.image'"):
        import_adapter(tmp_path / "adapter", tmp_path / "bare", tmp_path / "out", part="encoder.image")
    with pytest.raises(
        ConfigError, match="changes 'model.layers.0.self_attn.q_proj', and CLIPVisionModel has no such Linear"
    ):
        import_adapter(tmp_path / "adapter", tmp_path / "bare", tmp_path / "out", part="encoders.image")
    with pytest.raises(ConfigError, match="--onto MODEL"):
        CliRunner().invoke(app, ["import", str(tmp_path / "adapter"), str(tmp_path / "out")], catch_exceptions=False)
    result = CliRunner().invoke(app, ["export", str(tmp_path / "bare"), str(tmp_path / "out"), "--to", "tflite"])
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "xpu"])
def test_a_device_that_is_not_here_is_refused(device, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"sees no {device[:3]}.* device here, not {device}"):
        on(device)
    model = composed.model("llama")
    model.save_pretrained(tmp_path)
    verbs = [["chat", tmp_path, "-p", "hello"], ["eval", tmp_path], ["train", "llava", "--out", tmp_path / "run"]]
    for verb in verbs:
        with pytest.raises(ConfigError, match="install the build of torch for that device"):
            CliRunner().invoke(app, [*map(str, verb), "--device", device], catch_exceptions=False)
    assert not (tmp_path / "run").exists()


def test_devices_that_are_here_and_names_that_are_none(monkeypatch):
    assert on("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no kind of device is called 'gpu'"):
        on("gpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert on("auto") == on("cuda") == torch.device("cuda") and on("cuda:1").index == 1
    with pytest.raises(ConfigError, match="sees 2 cuda devices here, not cuda:2"):
        on("cuda:2")
    with pytest.raises(ConfigError, match="sees no mps device here"):
        on("mps")
