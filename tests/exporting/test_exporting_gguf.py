"""GGUF for llama.cpp: every number as it was under llama.cpp's names, the vocabulary, and refusals by name.

What real llama.cpp answers from such files is measured by benchmarks/gguf_vs_llamacpp.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Stored
from gguf import GGUFReader, TokenType
from tokenizers import Regex, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

import composed
import isthmus
import tiny
import tiny_voices
from composed import stir
from isthmus import exporting, lora
from isthmus.cli.app import app
from isthmus.config import LoRA
from isthmus.data.template import FALLBACK
from isthmus.exporting import gguf, gguf_file, gguf_llm
from isthmus.exporting.gguf_file import Content
from isthmus.model import VLM
from isthmus.types import ConfigError, IsthmusError


def exported(model: VLM, folder: Path) -> tuple[GGUFReader, GGUFReader]:
    """Both files of a model."""
    model.save_pretrained(folder / "ours")
    gguf.export(folder / "ours", folder / "out")
    return GGUFReader(folder / "out/model.gguf"), GGUFReader(folder / "out/mmproj.gguf")


def tensor(reader: GGUFReader, name: str) -> Tensor:
    (found,) = (each for each in reader.tensors if each.name == name)
    assert found.tensor_type == Stored.F32  # random weights fit into nothing smaller
    return torch.from_numpy(found.data.copy())


def field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def test_clip_and_llama_lie_under_llama_cpps_names_bit_for_bit(tmp_path: Path) -> None:
    model = stir(composed.model("llama"))
    llm, sight = exported(model, tmp_path)
    tower, joint = model.encoders["image"].tower, model.connectors["image"].layers
    same = {
        "v.class_embd": tower.embeddings.class_embedding,
        "v.patch_embd.weight": tower.embeddings.patch_embedding.weight,
        "v.position_embd.weight": tower.embeddings.position_embedding.weight,
        "v.pre_ln.bias": tower.pre_layrnorm.bias,
        "v.blk.1.attn_v.weight": tower.encoder.layers[1].self_attn.v_proj.weight,
        "v.blk.1.attn_out.bias": tower.encoder.layers[1].self_attn.out_proj.bias,
        "v.blk.0.ln2.weight": tower.encoder.layers[0].layer_norm2.weight,
        "v.blk.0.ffn_up.weight": tower.encoder.layers[0].mlp.fc1.weight,
        "v.blk.0.ffn_down.weight": tower.encoder.layers[0].mlp.fc2.weight,
        "mm.0.weight": joint[0].weight,
        "mm.2.bias": joint[2].bias,
    }
    for name, expected in same.items():
        assert torch.equal(tensor(sight, name), expected), name
    assert (field(sight, "clip.vision.block_count"), field(sight, "clip.vision.feature_layer")) == (2, [2])
    names = {each.name for each in sight.tensors}
    assert not any(name.startswith(("v.blk.2", "v.post_ln")) for name in names)
    own = model.llm.model.layers[1]
    assert torch.equal(tensor(llm, "blk.1.attn_v.weight"), own.self_attn.v_proj.weight)
    assert torch.equal(tensor(llm, "blk.1.ffn_gate.weight"), own.mlp.gate_proj.weight)
    assert torch.equal(tensor(llm, "blk.1.attn_q.weight")[:4], own.self_attn.q_proj.weight[[0, 4, 1, 5]])
    assert torch.equal(tensor(llm, "blk.1.attn_k.weight")[8:12], own.self_attn.k_proj.weight[[8, 12, 9, 13]])
    assert "output.weight" not in {each.name for each in llm.tensors}  # tied
    assert field(llm, "llama.attention.key_length") == 8 and field(llm, "llama.attention.head_count_kv") == 2


def test_one_linear_becomes_two_of_the_same_function_over_siglip_and_qwen2(tmp_path: Path) -> None:
    model = stir(composed.model("qwen2", "llava", {"projector": "linear"}, "siglip", layer="-1"))
    llm, sight = exported(model, tmp_path)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    inner = F.linear(x, tensor(sight, "mm.0.weight"), tensor(sight, "mm.0.bias"))
    for approximate in ("none", "tanh"):  # llama.cpp's is the second
        found = F.linear(
            F.gelu(inner, approximate=approximate), tensor(sight, "mm.2.weight"), tensor(sight, "mm.2.bias")
        )
        torch.testing.assert_close(found, model.connectors["image"].layers[0](x), atol=1e-5, rtol=1e-4)
    assert (field(sight, "clip.use_gelu"), field(sight, "clip.vision.feature_layer")) == (True, [3])
    attention = model.llm.model.layers[2].self_attn
    assert torch.equal(tensor(llm, "blk.2.attn_q.weight"), attention.q_proj.weight)
    assert torch.equal(tensor(llm, "blk.2.attn_q.bias"), attention.q_proj.bias)
    assert torch.equal(tensor(llm, "output.weight"), model.llm.lm_head.weight)


def test_the_verb_merges_lora_and_tells_of_the_class_token(tmp_path: Path) -> None:
    model = composed.model("qwen3")
    model.add_lora(["llm.*.q_proj", "encoders.*layers.0.*.fc1"], LoRA(r=2), "sft")
    stir(model).save_pretrained(tmp_path / "ours")
    words = ["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "gguf"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "largest difference of logits" in result.output and "issue 25814" in result.output
    assert "note: llama.cpp pads pictures to a square" in result.output and "trained with" not in result.output
    for name in exporting.adapters(model):
        lora.merge(model, name)
    own = model.llm.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(tensor(GGUFReader(tmp_path / "out/model.gguf"), "blk.0.attn_q.weight"), own)
    card = (tmp_path / "out/README.md").read_text()
    assert "library_name: gguf" in card and "issue 25814" in card and "Figures of the model do not hold there" in card
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["README.md", "mmproj.gguf", "model.gguf"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["ours", "out"]


def test_words_keep_their_ids_kinds_and_ends(tmp_path: Path) -> None:
    model = composed.model("llama")
    tokenizer = model.processor.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    llm, _ = exported(model, tmp_path)
    words, kinds = field(llm, "tokenizer.ggml.tokens"), field(llm, "tokenizer.ggml.token_type")
    assert [words.index(piece) for piece in ("<|im_end|>", "Ġthe")] == tokenizer.convert_tokens_to_ids(
        ["<|im_end|>", "Ġthe"]
    )
    assert kinds[tokenizer.eos_token_id] == TokenType.CONTROL and kinds[words.index("Ġthe")] == TokenType.NORMAL
    assert len(words) == tiny.VOCAB and field(llm, "tokenizer.ggml.merges")[2] == "h e"
    ends = [field(llm, f"tokenizer.ggml.{which}_token_id") for which in ("eos", "padding")]
    assert ends == [tokenizer.eos_token_id] * 2
    assert field(llm, "tokenizer.ggml.pre") == "qwen2" and field(llm, "tokenizer.chat_template") == tiny.CHATML
    assert field(llm, "tokenizer.ggml.add_bos_token") is False


@pytest.mark.parametrize("aspect", ["crop", "squash"])
def test_another_aspect_than_llama_cpps_is_told(tmp_path: Path, aspect: str) -> None:
    composed.model("llama", aspect=aspect).save_pretrained(tmp_path / "ours")
    written = gguf.export(tmp_path / "ours", tmp_path / "out")
    assert f"trained with `aspect: {aspect}`: give it squares of 32 pixels" in written.pictures
    assert written.pictures in (tmp_path / "out/README.md").read_text()


def test_a_missing_chat_template_is_the_one_that_was_used(tmp_path: Path) -> None:
    model = composed.model("llama")
    model.processor.tokenizer.chat_template = model.processor.chat_template = None
    llm, _ = exported(model, tmp_path)
    assert field(llm, "tokenizer.chat_template") == FALLBACK


LLAMA_3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip


def test_llama_3s_slower_frequencies_are_written(tmp_path: Path) -> None:
    tiny.llm_folder(tmp_path / "llm", "llama", rope_parameters=LLAMA_3)
    model = isthmus.compose(composed.recipe("llama").but(llm={"source": str(tmp_path / "llm")}))
    llm, _ = exported(model, tmp_path)
    slowed = tensor(llm, "rope_freqs.weight")
    assert slowed[0] == pytest.approx(1) and slowed[-1] == pytest.approx(8)


SPLITS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(tiny.WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


@pytest.mark.parametrize("name", SPLITS)
def test_ways_of_splitting_text_are_named_or_refused(name: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[name])
    tokenizer.backend_tokenizer.model.ignore_merges = name == "llama-bpe"
    assert gguf_llm.splitting(tokenizer) == name
    tokenizer.backend_tokenizer.model.ignore_merges = name != "llama-bpe"
    with pytest.raises(ConfigError, match="no name that we know"):
        gguf_llm.splitting(tokenizer)


REFUSED = {
    "joint": (("llama", "flamingo"), {}, "its joint is flamingo"),
    "pool": (("llama", "llava", {"pool": 2}), {}, "not one or two Linears"),
    "dinov2": (("llama", "llava", {}, "dinov2"), {}, "its encoder is dinov2"),
    "class token": (("llama",), {"class_token": "keep"}, "keeps the class token"),
    "embeddings": (("llama",), {"layer": "0"}, "before the first block"),
    "family": (("opt",), {}, "its LLM is opt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_express_is_refused(tmp_path: Path, case: str) -> None:
    parts, encoder, reason = REFUSED[case]
    composed.model(*parts, **encoder).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError, match=reason):
        gguf.export(tmp_path / "ours", tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["ours"]


def test_sentencepieces_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="SentencePiece"):
        gguf_llm.splitting(tiny_voices.VOICES["mistral"]())


def test_nothing_is_written_when_logits_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    composed.model("llama").save_pretrained(tmp_path / "ours")
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(IsthmusError, match="logits differ"):
        gguf.export(tmp_path / "ours", tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["ours"]


def test_numbers_are_stored_as_small_as_they_fit_and_a_changed_one_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    held = {"a": x, "b": x.bfloat16(), "c": x.half(), "d": x[0].bfloat16(), "v.position_embd.weight": x.bfloat16()}
    content = Content("clip", lambda writer: None, held)
    gguf_file.write(tmp_path / "one.gguf", content)
    found = {each.name: each.tensor_type for each in GGUFReader(tmp_path / "one.gguf").tensors}
    assert [found[name] for name in held] == [Stored.F32, Stored.BF16, Stored.F16, Stored.F32, Stored.F32]
    read = gguf_file.tensors

    def damaged(reader: GGUFReader) -> dict[str, Tensor]:
        return {name: each.nextafter(torch.tensor(9.0)) for name, each in read(reader).items()}

    monkeypatch.setattr(gguf_file, "tensors", damaged)
    with pytest.raises(IsthmusError, match="a was not read back"):
        gguf_file.write(tmp_path / "two.gguf", content)
