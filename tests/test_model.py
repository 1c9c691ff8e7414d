"""The computation of a VLM piece by piece: embedding, encoding, surgery, and what a call may and may not ask for."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments

import composed
import isthmus
import tiny
from composed import MIX, picture, sample, stir
from isthmus import parts, sites
from isthmus.config import LLMConfig, ObjectiveConfig
from isthmus.model import VLM, VLMConfig
from isthmus.training.step import Step
from isthmus.types import IGNORE, Batch, Context, DataError, Features, Media, Sample, Turn


@pytest.fixture(scope="module")
def model() -> VLM:
    return stir(composed.model("llama"))


def bare(family: str) -> PreTrainedModel:
    return parts.load_llm(LLMConfig(source=str(composed.llm_folder(family))), torch.float32)


def logits(model: VLM, batch: Batch) -> torch.Tensor:
    output = model.run(batch)
    return output.head(output.hidden_BTD)


# ---------------------------------------------------------------------------------------------- run


@torch.no_grad()
def test_run_equals_splicing_by_hand(model):
    """Embeddings with connected vectors written over the placeholders, through the bare LLM."""
    batch = model.processor.collator()([MIX[2]])
    images, llm = batch.media["image"], bare("llama")
    features = model.encoders["image"](images.pixels).x_NSE
    y_NQD = model.connectors["image"].layers(features)
    embeds = llm.get_input_embeddings()(batch.input_ids_BT.clamp(max=tiny.VOCAB - 1))
    for start, y_QD in zip(images.at_N, y_NQD):
        embeds[0, start : start + len(y_QD)] = y_QD
    expected = llm(inputs_embeds=embeds, use_cache=False).logits
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_features_may_come_from_a_cache_and_in_another_dtype(model):
    batch = model.processor.collator()(MIX)
    images = batch.media["image"]
    features = model.encoders["image"](images.pixels)
    cached = replace(batch, media={"image": replace(images, pixels=None, features=features)})
    assert torch.equal(logits(model, cached), logits(model, batch))
    half = features.map(lambda x: x.bfloat16())
    cached = replace(batch, media={"image": replace(images, pixels=None, features=half)})
    torch.testing.assert_close(logits(model, cached), logits(model, batch), atol=0.5, rtol=0.1)


@pytest.mark.parametrize("options", [{}, {"pool": 2}, {"pool": 2, "normalise": True}], ids=str)
def test_a_projector_multiplies_cached_features_in_their_dtype_as_autocast_would_cast_them(options):
    """Cast to the weights' float32 and back to bfloat16, features are the same to the bit, and so are all gradients."""
    model = stir(composed.model("llama", options=options))
    connector = model.connectors["image"]
    batch = model.processor.collator()(MIX)
    images = batch.media["image"]
    half = model.encoders["image"](images.pixels).map(lambda x: x.detach().bfloat16())
    cached = replace(batch, media={"image": replace(images, pixels=None, features=half)})
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode("image", cached.media["image"]).x_NSE.dtype == torch.bfloat16
        found = model.connect(cached)["image"]
        expected = connector(half.map(torch.Tensor.float), Context())
    assert torch.equal(found, expected)
    weights = list(connector.parameters())
    gradients = [torch.autograd.grad(y.float().square().sum(), weights) for y in (found, expected)]
    assert all(map(torch.equal, *gradients))


def test_media_without_pixels_or_features_are_refused(model):
    batch = model.processor.collator()([MIX[0]])
    empty = replace(batch.media["image"], pixels=None)
    with pytest.raises(DataError, match="image without pixels or features"):
        model.run(replace(batch, media={"image": empty}))


def test_placeholders_without_media_and_media_without_placeholders_are_refused(model):
    batch = model.processor.collator()([MIX[2]])
    images = batch.media["image"]
    one = Media(images.row_N[:1], images.segment_N[:1], images.at_N[:1], images.pixels[:1])
    with pytest.raises(DataError, match="32 image placeholders for 16 vectors"):
        model.run(replace(batch, media={"image": one}))
    text = model.processor.collator()([MIX[1]])
    with pytest.raises(DataError, match="0 image placeholders for 16 vectors"):
        model.run(replace(text, media={"image": one}))


def test_placeholders_alone_are_refused(model):
    """Without this, the embedding of id 0 would stand in for the picture."""
    batch = replace(model.processor.collator()([MIX[0]]), media={})
    with pytest.raises(DataError, match="16 image placeholders for 0 vectors"):
        model.run(batch)


def test_the_warm_stage_does_not_run_the_llm(model, monkeypatch):
    batch = model.processor.collator()(MIX)
    monkeypatch.setattr(type(model.llm.base_model), "forward", None)
    output = model.run(batch, need="connected")
    assert output.hidden_BTD is None and output.connected["image"].shape == (3, 16, tiny.WIDTH)
    assert torch.equal(output.embed(torch.tensor([5])), sites.embedding(model.llm)(torch.tensor([5])))


def test_no_autograd_in_a_frozen_tower(model):
    seen: list[bool] = []
    hook = model.encoders["image"].register_forward_hook(lambda _, __, out: seen.append(out.x_NSE.requires_grad))
    batch = model.processor.collator()([MIX[0]])
    assert model.run(batch).hidden_BTD.requires_grad and seen == [False]
    first = next(model.encoders.parameters()).requires_grad_(True)
    model.run(batch)
    first.requires_grad_(False)
    hook.remove()
    assert seen == [False, True]


def test_everything_of_the_base_is_frozen_at_birth():
    model = composed.model("llama")
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"connectors"}
    assert not model.training


def test_new_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    one = isthmus.compose(composed.recipe("llama")).connectors.state_dict()  # composed.model copies one that is kept
    torch.manual_seed(2)
    two = isthmus.compose(composed.recipe("llama")).connectors.state_dict()
    other = isthmus.compose(composed.recipe("llama").but(seed=1)).connectors.state_dict()
    assert all(torch.equal(one[key], two[key]) and not torch.equal(one[key], other[key]) for key in one)


@torch.no_grad()
@pytest.mark.parametrize("aligner", ["llava", "flamingo", "ee_mllm"])
def test_a_copy_is_a_model_of_its_own_and_what_was_composed(aligner):
    """Tests take copies (`composed.model`), and so may you: `copy.deepcopy(model)`."""
    one, other = (stir(composed.model("llama", aligner)) for _ in range(2))
    fresh = stir(isthmus.compose(composed.recipe("llama", aligner)))
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in other.parameters()}
    batch = fresh.processor.collator()(composed.MIX)
    assert torch.equal(logits(one, batch), logits(fresh, batch))
    for parameter in one.parameters():
        parameter.zero_()
    assert torch.equal(logits(other, batch), logits(fresh, batch))


@torch.no_grad()
def test_pictures_of_different_sizes_take_their_own_number_of_tokens(model):
    """A later encoder gives ragged features; rows of y beyond a picture's own length are padding."""
    ids = model.processor.tokenizer.encode("what is it?", add_special_tokens=False)
    lengths, at = (3, 5), [1, 4]
    row = [ids[0], *[model.placeholder("image")] * 3, *[model.placeholder("image")] * 5, *ids]
    ids_BT = torch.tensor([row])
    x = torch.randn(2, 5, tiny.WIDTH)
    features = Features(x, lengths_N=torch.tensor(lengths))
    zeros = torch.zeros(2, dtype=torch.long)
    media = {"image": Media(zeros, zeros + 1, torch.tensor(at), features=features)}
    batch = Batch(ids_BT, torch.ones_like(ids_BT), model.modality(ids_BT), media=media)
    before = logits(model, batch)
    x[0, 3:] = 99
    assert torch.equal(logits(model, batch), before)
    x[1, 4] = 99
    assert not torch.equal(logits(model, batch), before)


@torch.no_grad()
def test_a_past_is_repeated_for_several_continuations(model):
    batch = model.processor.prompts([MIX[0], MIX[2]])
    past = model.run(batch, keep=True).past
    new = torch.tensor([[7], [8], [9], [7], [8], [9]])
    grow = lambda x: F.pad(x.repeat_interleave(3, 0), (0, 1))  # noqa: E731
    more = Batch(new, grow(batch.segment_BT), grow(batch.modality_BT))
    more.segment_BT[:, -1] = 1
    found = model.run(more, past=past.repeat(3))
    for row, (one, token) in enumerate([(one, token) for one in (MIX[0], MIX[2]) for token in (7, 8, 9)]):
        alone = model.processor.prompts([one])
        ids = F.pad(alone.input_ids_BT, (0, 1), value=token)
        whole = replace(
            alone, input_ids_BT=ids, segment_BT=torch.ones_like(ids), modality_BT=F.pad(alone.modality_BT, (0, 1))
        )
        expected = logits(model, whole)[:, -1]
        torch.testing.assert_close(found.head(found.hidden_BTD[row]), expected, atol=1e-5, rtol=1e-5)
    assert past.cache.get_seq_length() == batch.input_ids_BT.shape[1], "the prompt's own past has not grown"


# ---------------------------------------------------------------------------------------------- forward and generate


@torch.no_grad()
def test_logits_to_keep(model):
    inputs = model.processor(images=picture(1).source, text="<image>what is it?")
    whole = model(**inputs).logits
    assert whole.shape[-1] == tiny.VOCAB, "no placeholder can be sampled"
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, whole[:, -2:], atol=1e-5, rtol=1e-5)
    chosen = torch.zeros(whole.shape[1], dtype=torch.bool)
    chosen[[3, 7]] = True
    torch.testing.assert_close(model(**inputs, logits_to_keep=chosen).logits, whole[:, [3, 7]], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_labels_at_placeholders_are_not_learnt(model):
    inputs = model.processor(images=picture(1).source, text="<image>what is it?")
    labels = inputs["input_ids"].clone()
    masked = labels.masked_fill(labels >= model.vocabulary, IGNORE)
    assert (labels != masked).any() and model(**inputs, labels=labels).loss == model(**inputs, labels=masked).loss


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_loss_is_transformers_own_on_text(family):
    model, llm = composed.model(family), bare(family)
    batch = model.processor.collator()([MIX[1]])
    given = {"input_ids": batch.input_ids_BT}
    labels = batch.labels_BT
    if family == "t5":  # transformers shifts labels to the right, ours stand where the decoder reads them
        theirs = llm(**given, labels=batch.labels_BT[:, 1:]).loss
        given["decoder_input_ids"] = batch.decoder_ids_BU
    else:
        theirs = llm(**given, labels=labels).loss
    torch.testing.assert_close(model(**given, labels=labels).loss, theirs, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_the_loss_behind_a_prefix_is_transformers_own():
    model, llm = composed.model("t5"), bare("t5")
    one = sample(picture(1), "what?", answer="the dog is on the left")
    batch, whole = (model.processor.collator(template=way)([one]) for way in ("prefix", "plain"))
    y_NQD = (connected := model.connect(batch))["image"]
    embeds_BTD = model.embed(batch, connected)
    theirs = llm(inputs_embeds=embeds_BTD, attention_mask=batch.segment_BT, labels=batch.labels_BT[:, 1:]).loss
    step = Step(model, [ObjectiveConfig(name="lm")]).eval()
    torch.testing.assert_close(step(batch, step.scales([batch]))[0], theirs, atol=1e-6, rtol=1e-6)
    assert batch.labels_BT.shape[1] < whole.labels_BT.shape[1] and batch.input_ids_BT.shape[1] > len(y_NQD[0])


@torch.no_grad()
def test_forward_continues_a_cache_by_hand(model):
    inputs = model.processor(images=picture(1).source, text="<image>what is it?")
    mask = inputs["attention_mask"]
    first = model(**inputs, use_cache=True)
    assert first.past_key_values.get_seq_length() == mask.shape[1]
    token = torch.tensor([[7]])
    again = model(input_ids=token, attention_mask=F.pad(mask, (0, 1), value=1), past_key_values=first.past_key_values)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
    inputs["attention_mask"] = F.pad(mask, (0, 1), value=1)
    torch.testing.assert_close(again.logits[:, -1], model(**inputs).logits[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "t5"])
@torch.no_grad()
def test_forward_hears_of_the_route_what_run_does(family):
    options = {"queries": 3, "layers": 2, "width": 16, "heads": 2, "inner": 24, "vocabulary": 320, "bottleneck": 4}
    aggregator = {"heads": 2, "inner": 24}
    lion = stir(composed.model(family, "lion", {**options, "aggregator": aggregator}, taps=(2, 1), layer=3)).eval()
    batch = lion.processor.collator()([sample("hi there", route=route) for route in (0, 1)])
    given = {"input_ids": batch.input_ids_BT, "attention_mask": batch.segment_BT}
    if family == "t5":
        given["decoder_input_ids"] = batch.decoder_ids_BU
    expected = logits(lion, batch)
    for route in (batch.route_BT, torch.tensor([[0], [1]]), torch.tensor([0, 1])):
        torch.testing.assert_close(lion(**given, route=route).logits, expected, atol=1e-5, rtol=1e-5)
    for route in (1, torch.tensor(1), torch.tensor([1])):
        torch.testing.assert_close(lion(**given, route=route).logits[1], expected[1], atol=1e-5, rtol=1e-5)
    assert (lion(**given).logits - expected)[1].abs().max() > 1e-2
    with pytest.raises(DataError, match="routes of shape"):
        lion(**given, route=torch.zeros(3, 1, dtype=torch.long))
    del given["attention_mask"]
    for wrong in (7, -1, torch.tensor([0, 2]), torch.full_like(batch.input_ids_BT, 3)):
        for call in (lion, lion.generate):
            with pytest.raises(DataError, match="no kind of task") as raised:
                call(**given, route=wrong)
            assert "0 for a question about the picture as a whole" in raised.value.remedy


@torch.no_grad()
def test_a_cache_is_continued_by_hand_on_the_route_that_it_began_on():
    options = {"queries": 3, "layers": 2, "width": 16, "heads": 2, "inner": 24, "vocabulary": 320, "bottleneck": 4}
    lion = stir(composed.model("llama", "lion", {**options, "aggregator": {"heads": 2, "inner": 24}}, taps=(2, 1)))
    lion.eval()
    batch = lion.processor.collator()([sample("hi there", route=1)])
    ids, expected = batch.input_ids_BT, logits(lion, batch)
    length = ids.shape[1]
    for route in (1, torch.tensor([1]), torch.ones(1, 2, dtype=torch.long), torch.ones(1, length, dtype=torch.long)):
        first = lion(ids[:, :-2], route=1, use_cache=True)
        again = lion(ids[:, -2:], route=route, past_key_values=first.past_key_values)
        torch.testing.assert_close(again.logits, expected[:, -2:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_places_of_pictures_are_told_from_placeholders_where_they_are_not_given(model):
    inputs = model.processor(images=[picture(1).source, picture(2).source], text=["<image><image>a", "b"])
    expected = model(**inputs).logits
    del inputs["image_at"]
    assert torch.equal(model(**inputs).logits, expected)
    with pytest.raises(DataError, match="1 pictures for 2 places"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})


@torch.no_grad()
def test_generate_returns_what_transformers_returns(model):
    batch = model.processor.prompts(MIX)
    width = batch.input_ids_BT.shape[1]
    plain = model.generate(batch, max_new_tokens=3, do_sample=False)
    told = model.generate(batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(plain[:, :width], batch.input_ids_BT) and torch.equal(told.sequences, plain)
    assert len(told.scores) <= 3 and told.scores[0].shape == (3, tiny.VOCAB)
    several = model.generate(batch, max_new_tokens=2, do_sample=True, num_return_sequences=2)
    assert torch.equal(several[:, :width], batch.input_ids_BT.repeat_interleave(2, 0))


@torch.no_grad()
def test_text_alone_generates_as_the_bare_llm(model):
    inputs = model.processor(text=["hi there", "what is it"])
    how = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **how), bare("llama").generate(**inputs, **how))


# ---------------------------------------------------------------------------------------------- structure


def test_surgery_gives_a_pruned_llm_its_shapes(tmp_path):
    """Uneven layers run and come back; transformers alone cannot express them."""
    model = composed.model("llama")
    path = "model.layers.1.mlp"
    shapes = {f"{path}.gate_proj": [40, 32], f"{path}.up_proj": [40, 32], f"{path}.down_proj": [32, 40]}
    config = VLMConfig(**{**model.config.to_dict(), "surgery": shapes, "trained": [f"llm.{path}.*"]})
    pruned = VLM(config, bare("llama"), dict(model.encoders.items()))
    with torch.no_grad():
        for name, keep in (
            ("gate_proj", (slice(40),)),
            ("up_proj", (slice(40),)),
            ("down_proj", (slice(None), slice(40))),
        ):
            weight = model.llm.get_submodule(f"{path}.{name}").weight
            pruned.llm.get_submodule(f"{path}.{name}").weight.copy_(weight[keep])
            mask = torch.zeros_like(weight)
            mask[keep] = 1
            weight *= mask
    pruned.connectors.load_state_dict(model.connectors.state_dict())
    pruned.processor = model.processor
    batch = model.processor.collator()(MIX)
    with torch.no_grad():
        torch.testing.assert_close(logits(pruned, batch), logits(model, batch), atol=1e-5, rtol=1e-5)
        for whole in (False, True):
            pruned.save_pretrained(tmp_path / str(whole), whole=whole)
            again = isthmus.load(tmp_path / str(whole))
            assert again.llm.get_submodule(f"{path}.up_proj").weight.shape == (40, 32)
            assert torch.equal(logits(again, batch), logits(pruned, batch))


def test_an_embedding_larger_than_the_tokenizer_keeps_its_rows_apart_from_placeholders(tmp_path):
    """Real checkpoints pad their vocabulary; the placeholder lies beyond the padded rows."""
    folder = tiny.llm_folder(tmp_path, "llama", vocab_size=tiny.VOCAB + 64)
    model = isthmus.compose(composed.recipe("llama").but(llm=LLMConfig(source=str(folder))))
    assert model.placeholder("image") == tiny.VOCAB + 64
    batch = model.processor.collator()([MIX[0]])
    assert int((batch.input_ids_BT == model.placeholder("image")).sum()) == model.queries("image")
    assert model.run(batch).hidden_BTD.isfinite().all()


def test_conversations_with_pictures_in_several_turns():
    model = stir(composed.model("llama"))
    talk = Sample(
        (
            Turn.say("user", picture(1), "what is it?"),
            Turn.say("assistant", "a cat"),
            Turn.say("user", "and ", picture(2), "?"),
        )
    )
    batch = model.processor.prompts([talk, sample("hi")])
    assert batch.media["image"].row_N.tolist() == [0, 0]
    assert model.generate(batch, max_new_tokens=2, do_sample=False).shape[1] == batch.input_ids_BT.shape[1] + 2


@pytest.mark.parametrize("micros", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_transformers_trainer_accumulates_to_the_same_step(tmp_path, micros):
    """Labels differ in number between the samples, so that a mean of means would be another gradient."""
    newborn = composed.model("llama")
    items = []
    for number in range(4):
        inputs = newborn.processor(images=picture(number).source, text="a cat <image>" + " on the left" * 3)
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= newborn.vocabulary, IGNORE)
        labels[:, : 3 * number] = IGNORE
        items.append(
            {key: inputs[key][0] for key in ("input_ids", "attention_mask", "pixel_values")} | {"labels": labels[0]}
        )

    def trained(batch: int, accumulate: int) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(newborn)
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            learning_rate=1.0,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0,
            report_to=[],
            remove_unused_columns=False,
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=items).train()
        return dict(model.connectors.named_parameters())

    whole, split = trained(4, 1), trained(4 // micros, micros)
    first = dict(newborn.connectors.named_parameters())
    for name, parameter in whole.items():
        assert (parameter - first[name]).norm() > 1e-3
        torch.testing.assert_close(split[name], parameter, atol=1e-5, rtol=1e-4)
