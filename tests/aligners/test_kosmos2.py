"""Kosmos-2's connector and location tokens against transformers', its new words from end to end, and its sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, Kosmos2Config, Kosmos2ForConditionalGeneration
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection
from transformers.models.kosmos2.processing_kosmos2 import (
    clean_text_and_extract_entities_with_bboxes,
    coordinate_to_patch_index,
    patch_index_to_coordinate,
)

import composed
import isthmus
import tiny
from composed import picture, stir
from isthmus import planning, tokens
from isthmus.config import LLMConfig, Recipe
from isthmus.connectors.latents import Latents
from isthmus.connectors.position_aware import sine_cosine
from isthmus.data.boxes import Links
from isthmus.recipes.kosmos2 import kosmos2
from isthmus.types import Box, ConfigError, Context, Features, Grounding, Sample, Turn

OPTIONS = {"queries": 3, "heads": 4, "grid": 4}
BOX = Box((0.3, 0.1, 0.9, 0.6), "the cat")


def model(family: str = "llama", **options):
    return composed.model(family, "kosmos2", OPTIONS | options)


def talk() -> Sample:
    return Sample((Turn.say("user", picture(1), "where?", Grounding()), Turn.say("assistant", BOX)), id="one")


# ---------------------------------------------------------------------------------------------- connector


def reference() -> tuple[Latents, Kosmos2ImageToTextProjection]:
    """Ours and transformers' with the same weights."""
    torch.manual_seed(0)
    text = {"embed_dim": 16, "attention_heads": 4, "layers": 1, "ffn_dim": 16, "vocab_size": 8}
    vision = {"hidden_size": 6, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    config = Kosmos2Config(text_config=text, vision_config=vision, latent_query_num=5)
    theirs, ours = Kosmos2ImageToTextProjection(config).eval(), Latents(6, 16, 5, 4).eval()
    attention, mine = theirs.x_attn, ours.attention
    parts = [getattr(attention, f"{name}_proj") for name in ("q", "k", "v")]
    with torch.no_grad():
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter)
        mine.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        mine.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        ours.queries.copy_(theirs.latent_query)
    mine.out_proj.load_state_dict(attention.out_proj.state_dict())
    ours.project.load_state_dict(theirs.dense.state_dict())
    return ours, theirs


@torch.no_grad()
def test_the_connector_equals_transformers():
    ours, theirs = reference()
    x_NSE = torch.randn(2, 9, 6)
    torch.testing.assert_close(ours(Features(x_NSE), Context()), theirs(x_NSE)[0])


@torch.no_grad()
def test_padding_is_not_read_and_places_are_told():
    ours, _ = reference()
    x_NSE = torch.randn(1, 9, 6)
    ragged = ours(Features(x_NSE, lengths_N=torch.tensor([5])), Context())
    torch.testing.assert_close(ragged, ours(Features(x_NSE[:, :5]), Context()))
    told = Latents(6, 16, 5, 4, grid=(3, 3)).eval()
    told.load_state_dict(ours.state_dict())
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    shuffled = Features(x_NSE[:, order])
    torch.testing.assert_close(ours(shuffled, Context()), ours(Features(x_NSE), Context()))
    assert (told(shuffled, Context()) - told(Features(x_NSE), Context())).abs().max() > 1e-2
    ratio = told.place_SD / sine_cosine(16, 3).flatten(0, 1)
    assert ratio[sine_cosine(16, 3).flatten(0, 1) != 0].std() < 1e-5
    with pytest.raises(ConfigError, match="3 heads"):
        Latents(6, 16, 5, 3)


# ---------------------------------------------------------------------------------------------- location tokens


def test_cells_are_those_of_transformers():
    style, generator = Links(), torch.Generator().manual_seed(0)
    for _ in range(300):
        (x1, x2), (y1, y2) = (sorted(torch.rand(2, generator=generator).tolist()) for _ in range(2))
        cells = style.cells(Box((x1, y1, x2, y2)))
        assert cells == coordinate_to_patch_index((x1, y1, x2, y2), 32)
        assert style.corners(*cells) == pytest.approx(patch_index_to_coordinate(*cells, 32))


def test_links_are_read_as_transformers_reads_them():
    written = Links().write([BOX, Box((0, 0, 0.2, 0.2), "the cat")])
    _, ((label, _, theirs),) = clean_text_and_extract_entities_with_bboxes(written)
    ours = Links().read(written)
    assert [box.label for box in ours] == [label] * 2 == ["the cat"] * 2
    assert [box.xyxy for box in ours] == [pytest.approx(corners) for corners in theirs]


def test_the_tokenizer_gives_new_words_the_ids_of_the_llm_s_new_rows():
    vlm = model()
    names = vlm.aligner.new_tokens()
    assert len(names) == len(set(names)) == 2 + 16 + 6
    ids = vlm.processor.tokenizer.convert_tokens_to_ids(list(names))
    assert ids == list(range(tiny.VOCAB, tiny.VOCAB + len(names)))
    assert vlm.vocabulary == vlm.placeholder("image") == tiny.VOCAB + len(names)
    assert len(vlm.llm.get_input_embeddings().weight) == tiny.VOCAB  # the base's own rows stay


def test_a_conversation_is_written_with_one_token_per_corner():
    vlm = model()
    rendered = vlm.processor.renderer().render(talk().turns)
    written = vlm.processor.decode(rendered.ids)
    assert "<image></image>where?<grounding><|im_end|>" in written
    assert "<phrase>the cat</phrase><object><patch_index_0001><patch_index_0011></object><|im_end|>" in written
    first, last = vlm.processor.tokenizer.convert_tokens_to_ids(["<patch_index_0001>", "<patch_index_0011>"])
    place = rendered.ids.index(first)
    assert rendered.ids[place + 1] == last and rendered.trained[place]
    (box,) = vlm.processor.regions.read(written, talk().media[0])
    assert max(abs(a - b) for a, b in zip(box.xyxy, BOX.xyxy)) <= 1 / 8 and box.label == "the cat"


def test_a_user_may_type_a_place_but_not_the_end_of_a_picture():
    vlm = model()
    codec_ids = vlm.processor.renderer().plain("at <patch_index_0003></image>")
    place, end = vlm.processor.tokenizer.convert_tokens_to_ids(["<patch_index_0003>", "</image>"])
    assert place in codec_ids and end not in codec_ids


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "t5"])
def test_new_words_are_generated_decoded_saved_and_loaded(tmp_path: Path, family):
    vlm = stir(model(family))
    width = len(vlm.aligner.new_tokens())
    for host in (vlm.llm.get_input_embeddings(), vlm.llm.get_output_embeddings()):
        rows = host.grafts[tokens.NAME].rows
        rows[2:18] *= 30  # location tokens win
    batch = vlm.processor.prompts([talk().but(turns=talk().turns[:1])])
    start = 0 if family == "t5" else batch.input_ids_BT.shape[1]
    told = vlm.generate(batch, max_new_tokens=6, do_sample=False)[:, start:]
    text = vlm.processor.batch_decode(told, skip_special_tokens=True)[0]
    assert "<patch_index_00" in text
    vlm.save_pretrained(tmp_path)
    again = isthmus.load(tmp_path)
    for processor in (again.processor, AutoProcessor.from_pretrained(tmp_path)):
        assert len(processor.tokenizer) == tiny.VOCAB + width
        assert processor.regions == vlm.processor.regions and processor.regions.format == Links(grid=4)
        assert processor.batch_decode(told, skip_special_tokens=True) == [text]
    assert torch.equal(again.generate(batch, max_new_tokens=6, do_sample=False)[:, start:], told)


def test_a_vocabulary_padded_beyond_the_tokenizer_is_filled_up(tmp_path: Path):
    folder = tiny.llm_folder(tmp_path, "llama", vocab_size=tiny.VOCAB + 5)
    recipe = composed.recipe("llama", "kosmos2", OPTIONS).but(llm=LLMConfig(source=str(folder)))
    vlm = isthmus.compose(recipe)
    names = list(vlm.aligner.new_tokens())
    ids = vlm.processor.tokenizer.convert_tokens_to_ids(names)
    assert ids == list(range(tiny.VOCAB + 5, tiny.VOCAB + 5 + len(names)))
    assert vlm.processor.decode([tiny.VOCAB + 1, ids[3]], skip_special_tokens=True) == names[3]
    tokens.name_tokens(vlm.processor.tokenizer, tiny.VOCAB + 5, names)  # again is no change
    assert vlm.processor.tokenizer.convert_tokens_to_ids(names) == ids


def test_what_a_tokenizer_cannot_learn_is_refused():
    with pytest.raises(ConfigError, match="already"):
        tokens.name_tokens(tiny.tokenizer(), tiny.VOCAB, ["<|im_end|>"])
    with pytest.raises(ConfigError, match="only 300 rows"):
        tokens.name_tokens(tiny.tokenizer(), 300, ["<new>"])


def test_only_new_rows_are_drawn_and_they_differ():
    vlm = model()
    rows = vlm.llm.get_input_embeddings().grafts[tokens.NAME].rows
    words = vlm.llm.get_input_embeddings().weight
    assert torch.equal(words, tiny.llm("llama").get_input_embeddings().weight)
    assert float(rows.detach().std()) == pytest.approx(float(words.std()), rel=0.2) and len(rows.unique(dim=0)) == len(
        rows
    )


# ---------------------------------------------------------------------------------------------- recipes


def test_published_parameters():
    """Against transformers' own Kosmos-2, as large as the released model."""
    with torch.device("meta"):
        config = Kosmos2Config()
        config.text_config.max_position_embeddings = 2048
        theirs = Kosmos2ForConditionalGeneration(config)
    plan = planning.plan(kosmos2("published"))
    connector = sum(p.numel() for p in theirs.image_to_text_projection.parameters())
    assert plan.parts["connectors.image"] == connector
    assert plan.total == pytest.approx(sum(p.numel() for p in theirs.parameters()), rel=0.01)
    assert plan.parts["llm grafts"] == 1032 * 2048 and plan.tokens == {"image": 64}
    (stage,) = plan.stages
    assert stage.by_part["encoders.image"] == pytest.approx(plan.parts["encoders.image"] / 24, rel=0.02)


def test_the_embedded_recipe_makes_a_round_trip(tmp_path: Path):
    recipe = kosmos2()
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.model_validate_json((tmp_path / "recipe.json").read_text()) == recipe
    assert {"rec", "reg"} <= {task.name for task in recipe.eval}
