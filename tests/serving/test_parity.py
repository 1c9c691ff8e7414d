"""Parity between a saved model, its export and a server: what is equal is found equal, and what is not is found."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch
from http_server import KEY, NAME, running
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, LlavaForConditionalGeneration
from typer.testing import CliRunner

import chat_server
import composed
import tiny
from composed import picture, stir
from isthmus import parity, storage
from isthmus.cli.app import app
from isthmus.config import LoRA
from isthmus.data.media import open_image
from isthmus.data.template import FALLBACK
from isthmus.exporting import llava
from isthmus.files import sha256
from isthmus.speakers.wire import messages
from isthmus.types import ConfigError, Sample

ASKED = parity.Question("what is it?", picture(1))
STEPS = ["prepared picture", "token ids of the prompt", "logits", "first 64 greedy tokens"]
STEPS += ["its log-probabilities", "greedy text"]
SERVED = [True, True, None, True, True, True]
"""Of an endpoint: all but logits."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of ours, and its export."""
    folder = tmp_path_factory.mktemp("forms")
    stir(composed.model("llama", aspect="crop")).save_pretrained(folder / "ours")
    llava.export(folder / "ours", folder / "theirs")
    return folder / "ours", folder / "theirs"


def compared(one: Path | str, other: Path | str, question: parity.Question = ASKED, **more: str) -> dict:
    checks = parity.compare(parity.form(str(one)), parity.form(str(other), **more), question)
    assert [each.what for each in checks] == STEPS
    return {each.what: each.equal for each in checks}


@pytest.mark.parametrize("asked", [ASKED, parity.Question("hi there")], ids=["picture", "text"])
def test_a_saved_model_equals_its_export(folders: tuple[Path, Path], asked: parity.Question) -> None:
    found = compared(*folders, asked)
    assert found["prepared picture"] is (True if asked.image else None)
    assert [found[step] for step in STEPS[1:]] == [True, True, True, None, True]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_model_without_a_chat_template_of_its_own_equals_its_export(tmp_path: Path, family: str) -> None:
    model = stir(composed.model(family, aspect="crop"))
    model.processor.tokenizer.chat_template = model.processor.chat_template = None
    model.save_pretrained(tmp_path / "ours")
    llava.export(tmp_path / "ours", tmp_path / "theirs")
    for asked in (ASKED, parity.Question("hi there")):
        found = compared(tmp_path / "ours", tmp_path / "theirs", asked)
        assert [found[step] for step in STEPS[1:]] == [True, True, True, None, True]
    assert FALLBACK in AutoTokenizer.from_pretrained(tmp_path / "theirs").chat_template


def test_an_export_never_says_its_own_marker(folders: tuple[Path, Path]) -> None:
    theirs = LlavaForConditionalGeneration.from_pretrained(folders[1])
    with torch.no_grad():  # a head that likes no word at all
        theirs.lm_head.weight[: theirs.config.image_token_id] = -theirs.lm_head.weight[:1].abs()
    ids = torch.tensor([[5, 6, 7]])
    told = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert theirs.config.image_token_id not in told[0].tolist()


def test_one_wrong_weight_is_found_behind_equal_inputs(folders: tuple[Path, Path], tmp_path: Path) -> None:
    ours, theirs = folders
    model = LlavaForConditionalGeneration.from_pretrained(theirs)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight[0] += 1
    model.save_pretrained(tmp_path)
    for file in theirs.glob("*.json*"):
        if file.name not in ("config.json", "generation_config.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for file in theirs.glob("*.jinja"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    found = compared(ours, tmp_path)
    assert [found[step] for step in STEPS[:3]] == [True, True, False]


def test_another_way_of_preparing_pictures_is_found_with_its_size(folders: tuple[Path, Path], tmp_path: Path) -> None:
    ours, _ = folders
    stir(composed.model("llama", aspect="squash")).save_pretrained(tmp_path)
    wide = parity.Question(
        "what is it?", composed.Image(composed.Pillow.new("RGB", (64, 40), "orange").resize((64, 40)))
    )
    wide.image.source.putpixel((0, 0), (0, 0, 255))
    found = parity.compare(parity.form(str(ours)), parity.form(str(tmp_path)), wide)
    assert found[0].equal is False and "largest difference" in found[0].note and found[1].equal


def test_other_words_are_found_and_logits_of_other_prompts_not_compared(folders: tuple[Path, Path]) -> None:
    class Shouting:
        def __init__(self, form: parity.Form) -> None:
            self.form = form

        def see(self, question: parity.Question) -> parity.Seen:
            return self.form.see(parity.Question(question.prompt.upper(), question.image))

    form = parity.form(str(folders[0]))
    checks = {each.what: each for each in parity.compare(form, Shouting(form), ASKED)}
    assert checks["prepared picture"].equal is True and checks["token ids of the prompt"].equal is False
    assert "the first that differs is number" in checks["token ids of the prompt"].note
    assert checks["logits"].equal is None and checks["logits"].note.startswith("of different prompts")


def test_a_server_equals_the_directory_it_serves(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    form = parity.form(str(folders[0]))
    assert isinstance(form, parity.Ours)
    monkeypatch.setenv("PARITY_KEY", KEY)
    with running(form.model) as (_, address):
        checks = parity.compare(form, parity.form(f"{address}/v1", NAME, "PARITY_KEY"), ASKED)
        other = parity.Ours(stir(composed.model("llama", aspect="crop", options={"projector": "linear"})))
        served = parity.form(f"{address}/v1", NAME, "PARITY_KEY")
        apart = parity.compare(other, served, ASKED)
        told = parity.form(f"{address}/v1", NAME, "PARITY_KEY").see(ASKED)
    assert [each.what for each in checks] == STEPS and [each.equal for each in checks] == SERVED
    assert checks[0].note.startswith("behind encoder and joint") and checks[1].note == f"{form.see(ASKED).length}"
    seen = form.see(ASKED)
    assert checks[3].note == f"{len(seen.tokens)}" and told.tokens == seen.tokens
    assert torch.allclose(told.vector, seen.vector, atol=1e-5) and len(told.ids) == len(seen.ids)
    assert apart[0].equal is apart[-1].equal is False and " and " in apart[-1].note


def test_a_models_own_penalty_parts_none_of_its_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stir(composed.model("llama", aspect="crop"))
    plain = parity.Ours(model).see(ASKED)
    model.generation_config.repetition_penalty = 1.3
    model.save_pretrained(tmp_path / "ours")
    llava.export(tmp_path / "ours", tmp_path / "theirs")
    assert GenerationConfig.from_pretrained(tmp_path / "theirs").repetition_penalty == 1.3
    ours, theirs = (parity.form(str(tmp_path / folder)) for folder in ("ours", "theirs"))
    assert ours.see(ASKED).tokens == theirs.see(ASKED).tokens == plain.tokens
    monkeypatch.setenv("PARITY_KEY", KEY)
    with running(model) as (_, address):
        served = parity.form(f"{address}/v1", NAME, "PARITY_KEY")
        assert [each.equal for each in parity.compare(ours, served, ASKED)] == SERVED


def test_an_export_that_is_asked_never_says_its_own_marker(folders: tuple[Path, Path]) -> None:
    form = parity.form(str(folders[1]))
    assert isinstance(form, parity.Native)
    asked, head = parity.Question("hi there"), form.model.lm_head.weight
    tokens = form.see(asked).tokens
    with torch.no_grad():  # the marker is likelier than the likeliest word
        head[form.model.config.image_token_id] = 100 * head[tokens[0]]
    assert form.see(asked).tokens == tokens


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint takes requests for embeddings, too."""
    monkeypatch.setattr(chat_server, "faults", lambda *_: [])


@pytest.mark.usefixtures("lenient")
def test_an_endpoint_that_answers_alike_and_weighs_otherwise_is_found(folders: tuple[Path, Path]) -> None:
    form = parity.form(str(folders[0]))
    seen = form.see(ASKED)
    with chat_server.running() as server:
        server.reply = lambda body: seen.text
        server.usage = {"prompt_tokens": seen.length + 1, "completion_tokens": 1}
        served = parity.form(server.endpoint, NAME)
        untold = parity.compare(form, served, ASKED)
        content = [{"token": "", "logprob": value + 0.01} for value in seen.logprobs]
        choice = {"message": {"content": seen.text}, "logprobs": {"content": content}}
        server.acts = [chat_server.Act(), chat_server.Act(body={"choices": [choice]})]
        apart = parity.compare(form, parity.form(server.endpoint, NAME), ASKED)
    assert [each.equal for each in untold] == [None, False, None, None, None, True]
    assert [each.equal for each in apart] == [None, None, None, None, False, True]
    assert "1.0e-02" in apart[4].note


def of_endpoint(form: parity.Form, seen: parity.Seen, **told) -> list[parity.Check]:
    """The comparison with an endpoint that answers alike and tells this beside it, asked with `return_token_ids`."""
    choice = {"message": {"content": seen.text}} | {name: told.pop(name) for name in ("logprobs",) if name in told}
    choice |= {"token_ids": told.pop("token_ids")} if "token_ids" in told else {}
    with chat_server.running() as server:
        server.reply = lambda body: seen.text
        refused = [chat_server.refusal(400, "unknown field")] if told.pop("strict", False) else []
        vector = chat_server.Act(body={"data": [{"embedding": told.pop("vector", "none")}]})
        server.acts = [chat_server.Act(), *refused, chat_server.Act(body={"choices": [choice]} | told), vector]
        checks = parity.compare(form, parity.form(server.endpoint, NAME), ASKED)
        assert [body.get("return_token_ids") for body in server.bodies[:2]] == [None, True]
        return checks


@pytest.mark.usefixtures("lenient")
def test_token_ids_that_an_endpoint_tells_are_compared(folders: tuple[Path, Path]) -> None:
    form = parity.form(str(folders[0]))
    seen = form.see(ASKED)
    ids = [700 if each == parity.PICTURE else each for each in seen.ids]
    same = of_endpoint(form, seen, prompt_token_ids=ids, token_ids=list(seen.tokens), vector=seen.vector.tolist())
    assert [each.equal for each in same] == [True, True, None, True, None, True]
    place, turned = seen.ids.index(parity.PICTURE), (-seen.vector).tolist()
    moved = [*ids[:place], ids[place - 1], *ids[place + 1 :]]  # a word where the picture begins
    other = [seen.tokens[0] + 1, *seen.tokens[1:]]
    apart = of_endpoint(form, seen, prompt_token_ids=moved, token_ids=other, vector=turned)
    assert [each.equal for each in apart] == [False, False, None, False, None, True]
    assert "number 1:" in apart[3].note and "behind encoder and joint" in apart[0].note


@pytest.mark.usefixtures("lenient")
def test_without_ids_the_answers_tokens_are_compared_by_their_bytes(folders: tuple[Path, Path]) -> None:
    form = parity.form(str(folders[0]))
    seen = form.see(ASKED)
    assert any(seen.spelled) and len(seen.spelled) == len(seen.tokens)

    def told(spelled):
        content = [
            {"token": "", "logprob": value, "bytes": None if raw is None else list(raw)}
            for value, raw in zip(seen.logprobs, spelled)
        ]
        return of_endpoint(form, seen, logprobs={"content": content}, strict=True)

    same, apart = told(seen.spelled), told([b"?", *seen.spelled[1:]])
    assert [each.equal for each in same] == [None, None, None, True, True, True] and "bytes" in same[3].note
    assert apart[3].equal is False and "number 1:" in apart[3].note
    assert told(seen.spelled[:-2])[3].equal is False


def test_a_trained_model_equals_what_was_saved_exported_and_served_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stir(composed.model("llama", aspect="crop"))
    model.add_lora(["llm.*.q_proj"], LoRA(r=2), "mine")
    learner = torch.optim.SGD(model.requires_grad_(True).train().parameters(), lr=0.1)
    batch = model.processor.prompts([Sample((ASKED.turn,))])
    for _ in range(2):  # so that LoRA's B leaves zero
        output = model.run(batch)
        output.head(output.hidden_BTD).square().mean().backward()
        learner.step()
    trained = parity.Ours(model.eval())
    model.save_pretrained(tmp_path / "saved")
    llava.export(tmp_path / "saved", tmp_path / "exported")
    monkeypatch.setenv("PARITY_KEY", KEY)
    with running(model) as (_, address):
        served = parity.form(f"{address}/v1", NAME, "PARITY_KEY")
        assert [each.equal for each in parity.compare(trained, served, ASKED)] == SERVED
    saved, exported = (parity.form(str(tmp_path / folder)) for folder in ("saved", "exported"))
    assert [each.equal for each in parity.compare(trained, saved, ASKED)] == [True] * 6
    assert [each.equal for each in parity.compare(trained, exported, ASKED)] == [True] * 4 + [None, True]


def test_a_large_picture_reaches_a_server_in_its_own_size(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    form = parity.form(str(folders[0]))
    assert isinstance(form, parity.Ours)
    large = parity.Question("what is it?", composed.Image(picture(3, 1500).source.crop((0, 0, 1500, 1100))))
    monkeypatch.setenv("PARITY_KEY", KEY)
    with running(form.model) as (_, address):
        served = parity.form(f"{address}/v1", NAME, "PARITY_KEY")
        assert parity.compare(form, served, large)[-1].equal
    assert isinstance(served, parity.Served)
    (turn,) = messages([large.turn], served.remote.config.picture)
    _, _, data = turn["content"][0]["image_url"]["url"].partition(",")
    assert open_image(base64.b64decode(data)).size == (1500, 1100)


def test_the_verb_tells_and_its_exit_code_says_whether_they_are_equal(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    picture(1).source.save(tmp_path / "one.png")
    words = ["parity", *map(str, folders), "--image", str(tmp_path / "one.png")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and result.output.count("equal") == 5
    ours = tmp_path / "ours"
    stir(composed.model("llama", aspect="crop")).save_pretrained(ours)
    file = ours / "model.safetensors"
    weights = load_file(file)
    weights["connectors.image.layers.0.weight"][0] += 1
    save_file(weights, file)
    (ours / storage.MANIFEST).write_text(json.dumps({file.name: sha256(file)}))
    result = CliRunner().invoke(app, ["parity", str(folders[0]), str(ours), *words[3:], "--json"])
    told = {each["what"]: each["equal"] for each in json.loads(result.output)}
    assert result.exit_code == 1 and told["logits"] is False and told["token ids of the prompt"] is True


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ConfigError, match="which model there"):
        parity.form("http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match="not a model that can be asked"):
        parity.form(str(tiny.vision_folder(composed.HOME / "parity-vision")))
