"""What is seen inside a model, against transformers' own states and weights; effects; the page; the verb."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from PIL import Image as Pillow
from PIL import ImageChops, ImageStat
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import composed
import page_checks
from isthmus import sites
from isthmus.cli.app import app
from isthmus.cli.gap import _named
from isthmus.data.media import open_image
from isthmus.evaluation.gap import drawing, effects, page, report, states
from isthmus.evaluation.gap.states import Pair
from isthmus.types import ConfigError, DataError, Image, Modality, Sample, Turn

WORDS = ("a cat", "the dog", "red", "two", "on the left", "a big house", "trees", "nothing")
PAIRS = [Pair(Sample((Turn.say("user", composed.picture(n), "what is it?"),), f"p{n}"), w) for n, w in enumerate(WORDS)]


@pytest.fixture(scope="module")
def llava():
    return composed.stir(composed.model())


@pytest.fixture(scope="module")
def flamingo():
    return composed.model(aligner="flamingo")


# ---------------------------------------------------------------------------------------------- states


def test_states_are_those_of_transformers(llava):
    seen = states.see(llava, PAIRS, keep=3)
    batch = llava.processor.collator()([pair.unseen for pair in PAIRS[:1]])
    own = llava.llm(input_ids=batch.input_ids_BT, output_hidden_states=True).hidden_states
    spoken = states._spoken(llava, batch)[0]
    ids = batch.input_ids_BT[0, spoken]
    assert llava.processor.tokenizer.decode(ids) == WORDS[0]
    for number in range(len(own) - 1):  # transformers' last one is behind the norm
        torch.testing.assert_close(seen.words_ND[number][0], own[number][0, spoken].mean(0), atol=1e-5, rtol=1e-4)
    last = sites.norm(llava.llm)(seen.words_ND[-1][:0])
    assert last.shape == (0, 32) and len(seen.words_ND) == 4


def test_the_first_layer_is_what_the_connector_gives(llava):
    seen = states.see(llava, PAIRS, keep=3)
    torch.testing.assert_close(seen.image_ND[0], seen.joint_ND, atol=1e-5, rtol=1e-4)
    assert [len(x) for x in seen.image_ND] == [8] * 4 and seen.tokens_KQD[2].shape == (3, 16, 32)
    torch.testing.assert_close(seen.tokens_KQD[2].mean(1), seen.image_ND[2][:3])


def test_attention_is_that_of_transformers_and_the_kernel_comes_back(llava):
    before = llava.llm.config._attn_implementation
    batch = llava.processor.prompts([PAIRS[0].prompt])
    told = llava.run(batch).hidden_BTD
    seen = states.see(llava, PAIRS[:4], keep=0)
    (found,) = states.attention_map(llava, PAIRS[0].prompt.turns)
    assert llava.llm.config._attn_implementation == before == "isthmus"
    torch.testing.assert_close(llava.run(batch).hidden_BTD, told, atol=0, rtol=0)
    llava.llm.set_attn_implementation("eager")
    embeds = llava.embed(batch, llava.connect(batch))
    weights = llava.llm.model(inputs_embeds=embeds, output_attentions=True).attentions
    llava.llm.set_attn_implementation(before)
    image = batch.modality_BT[0] == Modality.IMAGE
    by_hand = torch.stack([layer[0, :, -1, image].mean(0) for layer in weights]).mean(0).unflatten(0, (4, 4))
    torch.testing.assert_close(found, by_hand, atol=1e-6, rtol=1e-4)
    mass = torch.stack([layer[0].mean() for layer in seen.mass_NH]).mean()  # the same position, before the answer
    torch.testing.assert_close(mass, found.sum(), atol=1e-6, rtol=1e-4)
    assert seen.places == pytest.approx(16 / batch.input_ids_BT.shape[1], rel=0.01)


def test_every_picture_has_a_map(llava):
    turns = (Turn.say("user", composed.picture(1), "and", composed.picture(2), "do they differ?"),)
    first, second = states.attention_map(llava, turns)
    assert first.shape == second.shape == (4, 4) and not torch.equal(first, second)
    assert 0 < float(first.sum() + second.sum()) < 1


def test_places_are_claimed_only_where_tokens_have_them(llava):
    pooled = composed.model(options={"pool": 2})
    assert states.grid(llava) == (4, 4) and states.grid(pooled) == (2, 2)
    for aligner, options in (("asvr", {"levels": 2, "size": 4, "width": 8, "depth": 1}), ("victor", {"size": 16})):
        smaller = {"pool" if aligner == "asvr" else "grid": 2}
        wrapped, whole = (composed.model(aligner=aligner, options=options | more) for more in (smaller, {}))
        assert states.grid(wrapped) == (2, 2) and states.grid(whole) == (4, 4)
        (found,) = states.attention_map(wrapped, PAIRS[0].prompt.turns)
        assert found.shape == (2, 2) and wrapped.queries("image") == 4
    queries = composed.model(aligner="blip2")
    assert states.grid(queries) is None
    with pytest.raises(ConfigError, match="one for one"):
        states.attention_map(queries, PAIRS[0].prompt.turns)


def test_what_does_not_apply_is_refused(flamingo):
    with pytest.raises(ConfigError, match="beside the LLM's input"):
        states.attention_map(flamingo, PAIRS[0].prompt.turns)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        states.see(composed.model("t5"), PAIRS, 0)


@pytest.mark.usefixtures("embedded")
def test_pairs_are_different_words_about_one_picture():
    found = states.pairs("naming", 12)
    assert len({pair.words for pair in found}) == len(found) == 12
    assert not found[0].unseen.media and found[0].unseen.turns[-1].text == found[0].words
    assert states.pairs("easy-vqa", 10)[0].words.startswith("a ")
    with pytest.raises(DataError, match="the gap needs 8"):
        states.pairs("naming", 3)


def test_pairs_of_a_file_whose_pictures_lie_elsewhere(tmp_path):
    (tmp_path / "pictures").mkdir()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "thing"}]
    rows = []
    for number in range(9):
        Pillow.new("RGB", (4, 4), (20 * number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
        said = [turns[0], {**turns[1], "value": f"thing {number}"}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"no picture 0\.png"):
        states.pairs(str(tmp_path / "mine.json"), 9)
    found = states.pairs(str(tmp_path / "mine.json"), 9, str(tmp_path / "pictures"), {"format": "llava"})
    assert sorted(pair.words for pair in found) == [f"thing {number}" for number in range(9)]


def test_every_picture_is_taken_once(tmp_path):
    """By what it holds: ten pictures under twenty names, each asked about twice."""
    rows = []
    for number in range(20):
        Pillow.new("RGB", (4, 4), (20 * (number // 2), 0, 0)).save(tmp_path / f"{number}.png")
        for twice in range(2):
            said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"thing {number} {twice}"}]
            rows.append({"id": f"{number} {twice}", "image": f"{number}.png", "conversations": said})
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    found = states.pairs(str(tmp_path / "mine.json"), 20)
    assert len({open_image(pair.picture.source).getpixel((0, 0)) for pair in found}) == len(found) == 10
    (tmp_path / "few.json").write_text(json.dumps(rows[:20]))
    with pytest.raises(DataError, match="has 5 different pictures with an answer of its own each; the gap needs 8"):
        states.pairs(str(tmp_path / "few.json"), 20)


def test_a_remedy_names_nothing_that_the_verb_lacks(llava):
    one = [Pair(PAIRS[0].prompt, pair.words) for pair in PAIRS]
    with pytest.raises(DataError, match="8 of 8 items show the same picture") as told:
        effects.effects(llava, one)
    assert "--controls" not in told.value.remedy and "different pictures" in told.value.remedy


# ---------------------------------------------------------------------------------------------- the lens in a model


def test_a_planted_word_is_found_in_the_model(llava):
    for word in (40, 120, 260):
        planted = sites.embedding(llava.llm).weight[word]
        assert report._said(llava, planted[None], 0).argmax().item() == word
        assert report._said(llava, planted[None], 2).argmax().item() == word  # its head is its embedding
    tokens = sites.embedding(llava.llm).weight[[40, 120]].detach()[:, None]
    assert report._ranks(llava, tokens, [{40}, {7, 120}], 2).tolist() == [1, 1]
    assert report._ranks(llava, tokens, [set(), {120}], 2).tolist() == [1]


def speaking(vocabulary, merges=(), normalizer=None, decoder=None):
    """As much of a model as its tokenizer: whole words, or pieces that are merged."""
    ids = {piece: number for number, piece in enumerate(vocabulary)}
    whole = models.WordLevel(ids, unk_token="<unk>")
    inner = Tokenizer(models.BPE(vocab=ids, merges=list(merges)) if merges else whole)
    inner.normalizer, inner.decoder = normalizer, decoder
    inner.pre_tokenizer = None if merges else pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    return SimpleNamespace(processor=SimpleNamespace(tokenizer=tokenizer)), ids


def answered(*words):
    return [Pair(PAIRS[0].prompt, each) for each in words]


def test_a_space_that_is_a_token_of_its_own_is_no_word():
    """As in Llama-2's tokenizer.json, where a text is given a space in front of the one that it begins with."""
    pieces = ["<unk>", "▁", *"catdog", "ca", "cat", "▁cat", "do", "dog", "▁dog"]
    merges = [("c", "a"), ("ca", "t"), ("▁", "cat"), ("d", "o"), ("do", "g"), ("▁", "dog")]
    spaced = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    model, ids = speaking(dict.fromkeys(pieces), merges, spaced, plain)
    assert model.processor.tokenizer.encode(" cat", add_special_tokens=False) == [ids["▁"], ids["▁cat"]]
    assert report.telling(model, answered("a cat", "the dog")) == [{ids["▁cat"]}, {ids["▁dog"]}]


def test_words_that_most_answers_share_tell_no_picture():
    model, ids = speaking(["<unk>", "cat", "dog", "cow", "pig", "is", "on", "left", "right", "red"])
    said = [
        "a cat is on the left red",
        "a dog is on the left red",
        "a cow is on the right",
        "a pig is on the left",
        "red red",
        "on the left",
        "nameless",
    ]
    # of seven answers "is", "on" and "left" stand in four or more, "red" in three
    found = [{"cat", "red"}, {"dog", "red"}, {"cow", "right"}, {"pig"}, {"red"}, set(), set()]
    assert report.telling(model, answered(*said)) == [{ids[word] for word in words} for words in found]
    half = report.telling(model, answered("cat left", "dog left", "cow", "pig"))
    assert half == [{ids["cat"], ids["left"]}, {ids["dog"], ids["left"]}, {ids["cow"]}, {ids["pig"]}]


def test_where_all_answers_share_their_words_no_place_is_claimed(llava):
    alike = [Pair(pair.prompt, "a cat") for pair in PAIRS]
    found = report.measure(llava, "one", "own", alike, pictures=0, cells=2)
    assert {layer.rank for layer in found.layers} == {layer.found for layer in found.layers} == {None}
    text = page.render([found])
    assert "without the place of the right word: no word of the first 16 answers" in text
    assert "<b>Place of the right word</b>" not in text and page_checks.faults(text) == []


# ---------------------------------------------------------------------------------------------- effects


def test_nll_is_the_loss_of_transformers_interface(llava):
    for pair, found in zip(PAIRS[:3], effects.nll(llava, [p.prompt for p in PAIRS[:3]], WORDS[:3]).tolist()):
        batch = llava.processor.collator()([pair.answered])
        media = batch.media["image"]
        at = torch.stack([media.row_N, media.at_N], 1)
        loss = llava(batch.input_ids_BT, pixel_values=media.pixels, image_at=at, labels=batch.labels_BT).loss
        assert found == pytest.approx(loss.item(), rel=1e-4)


def test_a_picture_that_is_not_looked_at_has_no_effect(flamingo, llava):
    _, asleep = effects.effects(flamingo, PAIRS)  # its gates are closed at birth
    assert all(abs(effect.rise) < 1e-6 for effect in asleep.values())
    assert effects.occlusion_map(flamingo, PAIRS[0], 2).abs().max() < 1e-5
    _, awake = effects.effects(llava, PAIRS)
    assert all(abs(effect.rise) > 1e-3 and effect.low < effect.rise < effect.high for effect in awake.values())
    assert effects.occlusion_map(llava, PAIRS[0], 2).abs().min() > 1e-4


def test_effects_are_those_of_an_answer_that_depends_on_one_quarter(monkeypatch):
    """Its NLL falls with the red there: grey takes some, black all, and hiding another quarter changes nothing."""
    reds = (255, 155)
    pictures = [Pillow.new("RGB", (8, 8)) for _ in reds]
    for picture, red in zip(pictures, reds):
        picture.paste((red, 0, 0), (0, 0, 4, 4))
    pairs = [Pair(Sample((Turn.say("user", Image(p), "?"),), f"{n}"), "red") for n, p in enumerate(pictures)]

    def nll(model, prompts, words):
        shown = [open_image(prompt.media[0].source) for prompt in prompts]
        quarters = [[picture.getpixel((x, y))[0] for x in range(4) for y in range(4)] for picture in shown]
        return torch.tensor([1 - sum(quarter) / 16 / 255 for quarter in quarters], dtype=torch.float64)

    monkeypatch.setattr(effects, "nll", nll)
    own, found = effects.effects(None, pairs)
    blank = [(red - 128) / 255 for red in reds]
    assert own == pytest.approx(1 - sum(reds) / 510)
    told = found["blank picture"]
    assert told.rise == pytest.approx(sum(blank) / 2)
    half = 12.7062 * (blank[0] - blank[1]) / 2  # t of one degree, times the error of two values' mean
    assert (told.low, told.high) == pytest.approx((told.rise - half, told.rise + half), rel=1e-4)
    assert found["another’s picture"].rise == pytest.approx(0) and found["patches shuffled"].rise > 0
    hidden = effects.occlusion_map(seeing("pad"), pairs[0], 2)
    assert hidden.flatten().tolist() == pytest.approx([127 / 255, 0, 0, 0])


def seeing(aspect):
    """As much of a model as hiding places asks for."""
    return SimpleNamespace(config=SimpleNamespace(encoder=lambda kind: SimpleNamespace(aspect=aspect)))


@pytest.mark.parametrize(("aspect", "rows"), [("pad", (1, 2)), ("crop", (0, 1, 2, 3)), ("squash", (0, 1, 2, 3))])
def test_what_was_hidden_lies_where_it_is_drawn(aspect, rows, monkeypatch):
    """Of a picture four times as wide as high; the answer's NLL is what of the square has changed."""
    picture, cells = Pillow.new("RGB", (320, 80), (255, 0, 0)), 4
    whole, side = drawing.base(picture, aspect), drawing.SIDE // cells
    met = {}
    for row, column in itertools.product(range(cells), repeat=2):
        hidden = effects.mask(picture, row, column, cells, aspect)
        assert (hidden is not None) == (row in rows)
        if hidden is not None:
            changed = ImageChops.difference(drawing.base(hidden, aspect), whole).convert("L").point(lambda v: v > 40)
            left, top, right, bottom = changed.getbbox()
            assert column * side - 3 <= left < right <= (column + 1) * side + 3
            assert row * side - 3 <= top < bottom <= (row + 1) * side + 3
            met[row, column] = changed.histogram()[1] / side**2
    assert min(met.values()) > (0.4 if aspect == "pad" else 0.9)  # the strip is half as high as two cells

    def nll(model, prompts, words):
        seen = [drawing.base(prompt.media[0].source, aspect) for prompt in prompts]
        return torch.tensor([ImageStat.Stat(ImageChops.difference(one, whole)).sum[0] for one in seen])

    monkeypatch.setattr(effects, "nll", nll)
    pair = Pair(Sample((Turn.say("user", Image(picture), "?"),)), "red")
    found = effects.occlusion_map(seeing(aspect), pair, cells)
    assert [bool(row.min() > 0) for row in found] == [row in rows for row in range(cells)]


def test_hiding_a_place_hides_that_place():
    picture = Pillow.new("RGB", (30, 30), (255, 0, 0))
    masked = effects.mask(picture, 1, 2, 3, "pad")
    grey = [(x, y) for x in range(30) for y in range(30) if masked.getpixel((x, y)) == effects.GREY]
    assert len(grey) == 100 and min(grey) == (20, 10) and max(grey) == (29, 19)


def test_no_tile_stays_where_it_was():
    picture = Pillow.new("RGB", (16, 16))
    for tile in range(16):
        picture.paste((tile, 0, 0), (4 * (tile % 4), 4 * (tile // 4), 4 * (tile % 4) + 4, 4 * (tile // 4) + 4))
    prompt = Sample((Turn.say("user", Image(picture), "?"),))
    moved = effects.shuffle(prompt, 4, seed=0)
    tiles = [moved.getpixel((4 * (tile % 4) + 1, 4 * (tile // 4) + 1))[0] for tile in range(16)]
    assert sorted(tiles) == list(range(16)) and all(found != tile for tile, found in enumerate(tiles))


# ---------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """Whether every tag is closed, nothing is fetched, and every figure has words."""

    VOID = ("meta", "img", "line", "circle", "rect", "polyline", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: dict[str, int] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        self.found[tag] = self.found.get(tag, 0) + 1
        assert (told.get("src") or "data:").startswith("data:") and tag not in ("script", "link")
        assert tag != "img" or told["alt"]
        assert tag != "svg" or told.get("aria-label") or told.get("aria-hidden")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found[tag] = self.found.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_joints_are_measured_as_far_as_they_can_be(llava, flamingo):
    first = report.measure(llava, "one <b>", "own", PAIRS, pictures=1, cells=2)
    aside = report.measure(flamingo, "two", "own", PAIRS, pictures=1, cells=2)
    assert not first.skipped and len(first.layers) == 4 and first.layers[0].mass is None and first.layers[1].mass
    assert set(aside.skipped) == {"centroids", "lens", "attention"} and aside.layers[2].gap is None
    assert -1 <= aside.layers[2].cka <= 1 and aside.shown[0].lens == {} and aside.shown[0].attention is None
    distance = page.render([aside, first]).split("<b>Distance of the centroids</b>")[1].split("</figure>")[0]
    assert 'class="line1"' in distance and 'class="line0"' not in distance  # the second's, as in the key
    text = page.render([first, aside])
    found = Page(text).found
    assert page_checks.faults(text) == []
    assert found["img"] == (1 + len(first.shown[0].lens) + 2) + 2 and found["polyline"] == 8 + 2
    assert "one &lt;b&gt;" in text and "<b>," not in text and "keeps pictures beside" in text
    assert json.loads(json.dumps(first.plain()))["chance_of_neighbours"] == pytest.approx(5 / 7)


def test_a_picture_that_nothing_is_asked_about_has_a_heading_all_the_same(llava):
    bare = [Pair(Sample((Turn("user", pair.prompt.media),), pair.prompt.id), pair.words) for pair in PAIRS]
    text = page.render([report.measure(llava, "one", "own", bare, pictures=2, cells=2)])
    assert page_checks.faults(text) == [] and "<h3></h3>" not in text
    assert "<h3>Picture 2, without a question</h3>" in text


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 0.5, "a blank picture costs the right answer (+0.30 nats per token, +0.10 to +0.50)"),
        (-0.1, 0.7, "whether a blank picture costs the right answer is not decided"),
        (-0.5, -0.1, "the right answer is likelier with a blank picture (-0.30 nats per token"),
    ],
)
def test_the_first_lines_say_what_the_interval_allows(llava, low, high, said):
    found = report.measure(llava, "one", "own", PAIRS, pictures=0, cells=2)
    effect = effects.Effect((low + high) / 2, low, high)
    text = page.render([replace(found, effects={**found.effects, "blank picture": effect})])
    assert said in text.split('class="lead">')[1].split("</p>")[0]


def test_a_model_has_a_name_wherever_the_verb_is_called(tmp_path, monkeypatch):
    (tmp_path / "demo/sft/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "demo/sft")
    assert list(_named(["model", "../sft/model"])) == ["demo-sft A", "demo-sft B"]
    monkeypatch.chdir("model")
    assert list(_named([".", "someone/model"])) == ["demo-sft", "someone"]


@pytest.mark.usefixtures("embedded")
def test_the_verb_writes_a_page_of_two_models(llava, tmp_path):
    llava.save_pretrained(tmp_path / "runs/a/sft/model")
    words = ["gap", *[str(tmp_path / "runs/a/sft/model")] * 2, "--count", "8", "--pictures", "1", "--cells", "2"]
    ran = CliRunner().invoke(app, [*words, "--dtype", "float32", "--out", str(tmp_path / "out")])
    assert ran.exit_code == 0, ran.output
    assert "a-sft A" in ran.output and "a-sft B" in ran.output
    told = json.loads((tmp_path / "out/gap.json").read_text())
    a, b = told["models"]
    assert a["layers"] == b["layers"] and a["fingerprint"] and a["pairs"] == 8
    Page((tmp_path / "out/gap.html").read_text())
    assert len(list((tmp_path / "out/pictures").glob("*.png"))) == 2 * (1 + len(a["shown"][0]["lens"]) + 2)


@pytest.mark.usefixtures("embedded")
def test_a_model_that_cannot_be_followed_is_told_before_another_is_measured(llava, tmp_path):
    llava.save_pretrained(tmp_path / "a")
    composed.model("t5").save_pretrained(tmp_path / "b")
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text('{"model_type": "llama"}')
    for other, cause in (("b", "encoder-decoder"), ("llm", "is a llama model"), ("none", "neither a folder")):
        words = ["gap", str(tmp_path / "a"), str(tmp_path / other), "--count", "8", "--out", str(tmp_path / "out")]
        ran = CliRunner().invoke(app, words)
        assert ran.exit_code != 0 and cause in str(ran.exception)
        assert "states and attention" not in ran.output and not (tmp_path / "out").exists()
