"""Peft's folders: what it writes is read, what is written it reads, and whatever else is refused in two lines."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus import lora
from isthmus.exporting import peft_file
from isthmus.graft import at, ungraft
from isthmus.types import ConfigError
from test_lora import low_rank, run, trained
from tiny import llm


@pytest.mark.parametrize("dora", [False, True])
def test_ours_reads_peft_and_has_its_gradients(dora, tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["k_proj", "down_proj"], use_dora=dora, init_lora_weights=False
    )
    torch.manual_seed(1)
    theirs = peft.get_peft_model(llm("qwen2"), config)
    theirs.save_pretrained(tmp_path)
    model = llm("qwen2")
    paths = peft_file.place(model, peft_file.read(tmp_path))
    assert len(paths) == 6 and all(path.endswith(("k_proj", "down_proj")) for path in paths)
    torch.testing.assert_close(run(model), run(theirs), rtol=1e-6, atol=1e-5)
    for each in (model, theirs):
        run(each).square().mean().backward()
    names = {".lora_A.default.weight": "A", ".lora_B.default.weight": "B"}
    names |= {".lora_magnitude_vector.default.weight": "magnitude"} if dora else {}
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert len(gradients) == len(paths) * len(names)
    for path in paths:
        for key, field in names.items():
            mine = getattr(at(model.get_submodule(path))["lora"], field).grad
            torch.testing.assert_close(mine, gradients[f"base_model.model.{path}{key}"], rtol=1e-4, atol=1e-6)


PATTERNS = {
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"layers.1.self_attn.k_proj": 2, "down_proj": 3}},
    "alphas": {"alpha_pattern": {r"layers\.[02]\..*k_proj": 1, "model.layers.1.mlp.down_proj": 9}},
    "all": {"use_rslora": True, "rank_pattern": {"down_proj": 7}, "alpha_pattern": {"down_proj": 5}, "use_dora": True},
}


@pytest.mark.parametrize("case", PATTERNS)
def test_ranks_and_scales_of_their_own_come_from_peft_and_go_back(case, tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["k_proj", "down_proj"], init_lora_weights=False, **PATTERNS[case]
    )
    torch.manual_seed(1)
    theirs = peft.get_peft_model(llm("llama"), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = llm("llama")
    assert len(peft_file.place(model, peft_file.read(tmp_path / "theirs"))) == 6
    torch.testing.assert_close(run(model), run(theirs), rtol=1e-6, atol=1e-5)
    peft_file.write(model, "lora", tmp_path / "ours", base="somewhere/llama")
    back = peft.PeftModel.from_pretrained(llm("llama"), tmp_path / "ours").eval()
    torch.testing.assert_close(run(back), run(theirs), rtol=1e-6, atol=1e-5)
    assert back.peft_config["default"].base_model_name_or_path == "somewhere/llama"
    lora.merge(model)
    torch.testing.assert_close(run(model), run(theirs), rtol=1e-5, atol=1e-4)


def test_adapters_that_peft_cannot_hold_in_one_are_refused(tmp_path):
    model = llm("llama")
    trained(model, "*.q_proj", low_rank(r=2))
    trained(model, "*.k_proj", low_rank(r=2, dora=True))
    with pytest.raises(ConfigError, match="DoRA in some places only"):
        peft_file.write(model, "lora", tmp_path)


def test_round_trip_through_a_folder_is_exact(tmp_path):
    model = llm("llama")
    trained(model, "*.q_proj", low_rank(r=3, alpha=5, dora=True))
    peft_file.write(model, "lora", tmp_path)
    again = llm("llama")
    peft_file.place(again, peft_file.read(tmp_path), "other")
    assert torch.equal(run(again), run(model))


REFUSED = {
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "init_lora_weights": "pissa",
    "peft_type": "IA3",
    "fan_in_fan_out": True,
    "layer_replication": [[0, 2]],
    "an_option_of_next_year": {"any": "thing"},
}


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_would_be_lost_are_refused_by_name(option, tmp_path):
    with pytest.raises(ConfigError, match=f"uses .*{option}"):
        peft_file.read(changed(tmp_path, **{option: REFUSED[option]}))


def changed(folder: Path, **fields) -> Path:
    """A plain adapter of ours with some of peft's options set."""
    model = llm("llama")
    trained(model, "*.q_proj", low_rank(r=2))
    peft_file.write(model, "lora", folder)
    config = json.loads((folder / peft_file.CONFIG).read_text())
    (folder / peft_file.CONFIG).write_text(json.dumps(config | fields))
    return folder


# ---------------------------------------------------------------------------------------------- heads


def adapted(folder: Path, tied: bool = True, saving: dict | None = None, **options):
    """A model of peft's that has moved away from its birth, saved in the folder."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **options)
    model = peft.get_peft_model(llm("llama", tie_word_embeddings=tied), config).eval()
    model.save_pretrained(folder, **(saving or {}))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_on_heads_come_from_peft_and_go_back(dora, tied, tmp_path):
    theirs = adapted(tmp_path / "theirs", tied, target_modules=["lm_head", "v_proj"], use_dora=dora)
    assert f"{peft_file.PREFIX}lm_head.base_layer.weight" in load_file(tmp_path / "theirs" / peft_file.WEIGHTS)
    model = llm("llama", tie_word_embeddings=tied)
    assert "lm_head" in peft_file.place(model, peft_file.read(tmp_path / "theirs"))
    torch.testing.assert_close(run(model), run(theirs), rtol=1e-5, atol=1e-5)
    peft_file.write(model, "lora", tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(llm("llama", tie_word_embeddings=tied), tmp_path / "ours").eval()
    torch.testing.assert_close(run(back), run(theirs), rtol=1e-5, atol=1e-5)


def test_copies_of_the_base_beside_an_adapter_must_be_the_models(tmp_path):
    adapted(tmp_path, saving={"save_embedding_layers": True}, target_modules=["q_proj"])
    embedding = "model.embed_tokens.weight"
    assert peft_file.PREFIX + embedding in load_file(tmp_path / peft_file.WEIGHTS)
    saved = peft_file.read(tmp_path)
    assert len(peft_file.place(llm("llama"), saved)) == 3
    narrow = saved._replace(copies={name: each.bfloat16() for name, each in saved.copies.items()})
    assert len(peft_file.place(llm("llama"), narrow)) == 3
    other = llm("llama")
    with torch.no_grad():
        other.get_submodule("model.embed_tokens").weight[7] += 0.01
    with pytest.raises(ConfigError, match="'lm_head.weight' of its own, which is not the model's"):
        peft_file.place(other, saved)
    assert not any(at(module) for module in other.modules())


@pytest.mark.parametrize(
    "options, cause",
    [
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, r"uses \['modules_to_save'\]"),
        ({"target_modules": ["lm_head"], "ensure_weight_tying": True}, "unknown keys .*embed_tokens.lora_embedding_A"),
        ({"target_modules": ["embed_tokens"]}, "unknown keys .*lora_embedding_A"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}, "uses .'trainable_token_indices'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_changes_words_is_refused_with_the_reason(options, cause, tmp_path):
    adapted(tmp_path, **options)
    with pytest.raises(ConfigError, match=cause) as refusal:
        peft_file.read(tmp_path)
    assert "merge_and_unload" in refusal.value.remedy


# ---------------------------------------------------------------------------------------------- damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Damage that rewrites the tensors."""

    def rewrite(folder: Path) -> None:
        held = load_file(folder / peft_file.WEIGHTS)
        change(held)
        save_file({name: each.contiguous() for name, each in held.items()}, folder / peft_file.WEIGHTS)

    return rewrite


def config(**fields: object) -> Callable[[Path], object]:
    """Damage that rewrites options; None leaves one out."""

    def rewrite(folder: Path) -> None:
        tree = json.loads((folder / peft_file.CONFIG).read_text()) | fields
        kept = {key: value for key, value in tree.items() if value is not None}
        (folder / peft_file.CONFIG).write_text(json.dumps(kept))

    return rewrite


def file(name: str, content: bytes | None) -> Callable[[Path], object]:
    """Damage that replaces a file, or takes it away."""
    return lambda folder: (folder / name).unlink() if content is None else (folder / name).write_bytes(content)


Q = f"{peft_file.PREFIX}model.layers.1.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
WHERE = re.escape(Q.removeprefix(peft_file.PREFIX))
DAMAGE = {
    "no config": (file(peft_file.CONFIG, None), "no adapter_config.json"),
    "no weights": (file(peft_file.WEIGHTS, None), "no adapter_model.safetensors"),
    "broken json": (file(peft_file.CONFIG, b'{"r": '), "adapter_config.json: cannot be read"),
    "deep json": (file(peft_file.CONFIG, b"[" * 10**5), "adapter_config.json: cannot be read"),
    "not utf-8": (file(peft_file.CONFIG, b"\xff"), "adapter_config.json: cannot be read"),
    "a list": (file(peft_file.CONFIG, b"[]"), "not a JSON object"),
    "no safetensors": (file(peft_file.WEIGHTS, b"PK\x03\x04 a pickle"), "safetensors: cannot be read"),
    "empty": (file(peft_file.WEIGHTS, b""), "safetensors: cannot be read"),
    "no rank": (config(r=None), "adapter_config.json: r: Field required"),
    "no alpha": (config(lora_alpha=None), "lora_alpha: Field required"),
    "rank in words": (config(r="two"), "r: Input should be a valid integer"),
    "alpha of no number": (config(lora_alpha=[1]), "lora_alpha: Input should be a valid number"),
    "alpha without end": (config(lora_alpha=1e999), "lora_alpha: Input should be a finite number"),
    "large alpha": (config(lora_alpha=1.7e308, use_rslora=True), "alpha: Input should be a finite number"),
    "dropout": (config(lora_dropout=1.5), "lora_dropout: Input should be less than 1"),
    "patterns": (config(rank_pattern=["q_proj"]), "rank_pattern: Input should be a valid dictionary"),
    "pattern of no number": (config(alpha_pattern={"q_proj": "much"}), "alpha_pattern.q_proj: Input should be a valid"),
    "broken pattern": (config(rank_pattern={"(q_proj": 3}), "Input should be a valid regular expression"),
    "a group repeated": (config(rank_pattern={r"([a-z_.0-9]+)+!": 3}), "repeats a group"),
    "many repeats": (config(alpha_pattern={".*.*.*.*!": 3}), "or more than 3 times something"),
    "another rank": (config(r=3), r"has tensors of shapes \[\[2, 32\], \[32, 2\]\], and its rank is 3"),
    "magnitudes lost": (config(use_dora=True), r"missing or unknown keys .*lora_magnitude_vector"),
    "half": (tensors(lambda held: held.pop(B)), f"missing or unknown keys .*{WHERE}.lora_B"),
    "nothing": (tensors(lambda held: held.clear()), "holds no LoRA"),
    "no prefix": (tensors(lambda held: held.update({"q_proj.lora_A.weight": held.pop(A)})), "missing or unknown keys"),
    "vector": (tensors(lambda held: held.update({A: held[A][0]})), f"{WHERE}' has tensors of shapes"),
    "number": (tensors(lambda held: held.update({B: torch.tensor(1.0)})), f"{WHERE}' has tensors of shapes"),
    "no columns": (tensors(lambda held: held.update({A: held[A][:, :0]})), f"{WHERE}' has tensors of shapes"),
    "convolution": (
        tensors(lambda held: held.update({A: held[A][..., None, None], B: held[B][..., None, None]})),
        f"(?s){WHERE}' has tensors of shapes .*\nonly LoRA and DoRA on Linears",
    ),
    "NaN": (tensors(lambda held: held[A].fill_(torch.nan)), f"{WHERE}' has numbers that are not finite"),
    "another base": (tensors(lambda held: held.update({B: held[B][:16]})), r"is for shape \(16, 32\).* is \(32, 32\)"),
    "another name": (
        tensors(lambda held: held.update({key.replace("q_proj", "q_prj"): held.pop(key) for key in list(held)})),
        "changes 'model.layers.0.self_attn.q_prj', and LlamaForCausalLM has no such Linear; did you mean .*q_proj",
    ),
    "a glob": (
        tensors(lambda held: held.update({key.replace("layers.1", "layers.*"): held.pop(key) for key in (A, B)})),
        "changes 'model.layers.[*].self_attn.q_proj', and LlamaForCausalLM has no such Linear",
    ),
    "of no model": (
        tensors(lambda held: held.update({f"{peft_file.PREFIX}score.weight": torch.zeros(2)})),
        "holds 'score.weight' of its own",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused_in_two_lines(case, tmp_path):
    damage, cause = DAMAGE[case]
    damage(changed(tmp_path))
    model = llm("llama")
    with pytest.raises(ConfigError, match=cause) as refusal:
        peft_file.place(model, peft_file.read(tmp_path))
    assert refusal.value.remedy and str(refusal.value).count("\n") == 1
    assert not any(at(module) for module in model.modules())


def test_random_damage_is_refused_or_does_no_harm(tmp_path):
    chance, model = random.Random(0), llm("llama")
    sound = {name: (changed(tmp_path) / name).read_bytes() for name in (peft_file.CONFIG, peft_file.WEIGHTS)}
    refused = 0
    for turn in range(80):
        for name, content in sound.items():
            (tmp_path / name).write_bytes(content)
        name = chance.choice(list(sound))
        content = bytearray(sound[name])
        start = chance.randrange(min(len(content), 1200))  # headers, mostly
        if chance.random() < 0.3:
            del content[start : start + chance.choice([1, 8, len(content)])]
        else:
            content[start] = chance.randrange(256)
        (tmp_path / name).write_bytes(content)
        try:
            peft_file.place(model, peft_file.read(tmp_path), f"turn_{turn}")
        except ConfigError as refusal:
            refused += 1
            assert refusal.remedy and str(refusal).count("\n") == 1
        else:
            assert run(model).isfinite().all()
            for path in lora.hosts(model, f"turn_{turn}"):
                ungraft(model, path, f"turn_{turn}")
    assert refused > 40
