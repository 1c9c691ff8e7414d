"""VDEP's term: which places carry it, what it is there, where its gradient goes, and how the two modes are mixed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vdep_parts import SAMPLES, gradients, prepared, stage, term, with_term

import composed
import isthmus
from composed import picture
from isthmus import fuse, sites
from isthmus.config import LoRA, ObjectiveConfig, Recipe
from isthmus.objectives._places import places
from isthmus.objectives.vdep import collapse
from isthmus.training import combination
from isthmus.training.run import train
from isthmus.types import IGNORE, Batch, ConfigError, Features, Media, Output, Text, Turn

WIDTH = 6
DISTANCES = ("mse", "cosine", "smooth-l1")


def laid_out(rows: Sequence[str], **more: Any) -> Batch:
    """A batch from one letter per position: `t` text, `.` padding, `A`, `B`, ... the places of a picture each."""
    width = max(map(len, rows))
    rows = [row.ljust(width, ".") for row in rows]
    modality = torch.tensor([[int(letter.isupper()) for letter in row] for row in rows])
    segment = torch.tensor([[int(letter != ".") for letter in row] for row in rows])
    begun = {letter: (r, row.index(letter)) for r, row in enumerate(rows) for letter in row if letter.isupper()}
    row_N, at_N = (torch.tensor(found) for found in zip(*dict.fromkeys(begun.values())))
    media = {"image": Media(row_N, torch.ones_like(row_N), at_N)}
    fields = {"labels_BT": torch.where(modality == 0, 5, IGNORE), **more}
    return Batch(torch.zeros_like(segment), segment, modality, media=media, **fields)


def output_of(batch: Batch, longest: int, seed: int = 0) -> Output:
    torch.manual_seed(seed)
    hidden_BTD = torch.randn(*batch.segment_BT.shape, WIDTH, requires_grad=True)
    y_NQD = torch.randn(len(batch.media["image"]), longest, WIDTH, requires_grad=True)
    return Output(hidden_BTD, {"image": y_NQD}, nn.Identity(), nn.Identity())


# ---------------------------------------------------------------------------------------------- the term

ROWS = ("ttAAAAtBBt", "CCCDtt")
"""Two pictures with text between, and two side by side; they differ in length."""


def by_hand(batch: Batch, output: Output, distance: str, shift: int) -> Tensor:
    """The sum, picture by picture and place by place."""
    total = torch.zeros(())
    for number, letter in enumerate("ABCD"):
        row = next(r for r, text in enumerate(ROWS) if letter in text)
        first, length = ROWS[row].index(letter), ROWS[row].count(letter)
        for place in range(length - shift):
            h = output.hidden_BTD[row, first + place].detach()
            e = output.connected["image"][number, place + shift].detach()
            cos = float(h @ e / (h.norm() * e.norm()))
            if distance == "smooth-l1":
                gap = (h / h.norm() - e / e.norm()).abs()
                total += torch.where(gap < 0.01, gap**2 / 0.02, gap - 0.005).mean()
            else:
                total += {"mse": 2 - 2 * cos, "cosine": 1 - cos}[distance]
    return total


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shift", [0, 1])
def test_it_is_the_sum_over_every_pictures_own_places(distance: str, shift: int) -> None:
    batch = laid_out(ROWS)
    output = output_of(batch, 4)
    objective = term(distance=distance, shift=shift)
    found = objective.loss(None, output, batch)
    assert objective.count(batch) == (4 + 2 + 3 + 1) - 4 * shift
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(by_hand(batch, output, distance, shift).item(), rel=1e-4)


@pytest.mark.parametrize("shift", [0, 1])
def test_states_get_a_gradient_at_these_places_and_at_no_others(shift: int) -> None:
    batch = laid_out(ROWS)
    output = output_of(batch, 4)
    term(shift=shift).loss(None, output, batch).backward()
    moved = output.hidden_BTD.grad.abs().sum(-1) > 0
    carry = {0: ("..xxxx.xx.", "xxxx......"), 1: ("..xxx..x..", "xx........")}[shift]
    assert [["." if not m else "x" for m in row] for row in moved.tolist()] == [list(row) for row in carry]


def test_vectors_get_a_gradient_through_the_states_alone_unless_they_are_attached() -> None:
    batch = laid_out(ROWS)
    for detach in (True, False):
        output = output_of(batch, 4)
        term(detach=detach).loss(None, output, batch).backward()
        assert (output.connected["image"].grad is None) == detach
    assert output.connected["image"].grad[0, 0].eq(0).all()  # nothing foretells a picture's first vector
    assert output.connected["image"].grad[0, 1:].ne(0).any(-1).all()


def test_what_follows_from_the_past_is_foretold_and_what_stands_there_is_not() -> None:
    """e[i + 1] = f(e[i]): states that apply f are perfect for shift 1, states that repeat e for shift 0."""
    batch = laid_out(("AAAAAA", "BBBBBB"))
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))).Q
    e_BTD = torch.stack(
        [torch.stack([row @ torch.matrix_power(turn, i) for i in range(6)]) for row in torch.eye(6)[:2]]
    )
    makes = {0: e_BTD, 1: e_BTD @ turn}
    for distance, shift, states in itertools.product(DISTANCES, (0, 1), (0, 1)):
        objective = term(distance=distance, shift=shift)
        loss = objective.loss(None, Output(makes[states], {"image": e_BTD}, nn.Identity(), nn.Identity()), batch)
        assert (loss.item() < 1e-5) == (shift == states), (distance, shift, states)


def test_a_batch_without_pictures_is_zero_with_a_whole_graph() -> None:
    ones = torch.ones(1, 4, dtype=torch.long)
    hidden = torch.randn(1, 4, WIDTH, requires_grad=True)
    batch = Batch(ones, ones, ones * 0, ones)
    loss = term().loss(None, Output(hidden, {}, nn.Identity(), nn.Identity()), batch)
    loss.backward()
    assert loss.item() == 0 and term().count(batch) == 0 and hidden.grad is not None


# ---------------------------------------------------------------------------------------------- figures


def test_figures_tell_a_collapse() -> None:
    same = collapse(torch.ones(9, 4) * 3)
    assert same == pytest.approx({"norm": 6.0, "spread": 0.0, "rank": 1.0})
    assert collapse(torch.eye(5))["rank"] == pytest.approx(4, rel=1e-3)  # five points apart span four dimensions
    line = torch.arange(7.0)[:, None] * torch.tensor([[3.0, 4.0]])
    assert collapse(line)["rank"] == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_copy_baseline_is_the_distance_of_neighbours_in_a_picture(distance: str) -> None:
    batch = laid_out(ROWS)
    output = output_of(batch, 4)
    objective = term(distance=distance)
    assert objective.figures() == {}
    loss = objective.loss(None, output, batch)
    copying = output_of(batch, 4)
    for number, letter in enumerate("ABCD"):  # states that copy: the loss is then the baseline
        row = next(r for r, text in enumerate(ROWS) if letter in text)
        first, length = ROWS[row].index(letter), ROWS[row].count(letter)
        copying.hidden_BTD.data[row, first : first + length] = copying.connected["image"].data[number, :length]
    copied = term(distance=distance).loss(None, copying, batch) / objective.count(batch)
    figures = objective.figures()
    assert figures["copy"] == pytest.approx(copied.item(), rel=1e-5)
    assert figures["distance"] == pytest.approx(loss.item() / objective.count(batch), rel=1e-5)


def test_a_batch_of_the_other_mode_has_no_distance_to_tell() -> None:
    batch = laid_out(ROWS, draw_BT=torch.full((2, 10), 0.75))
    objective = term(ratio=0.5)
    objective.loss(None, output_of(batch, 4), batch)
    assert objective.figures().keys() == {"norm", "spread", "rank", "copy"}


# ---------------------------------------------------------------------------------------------- real models


@pytest.mark.parametrize("rows", ["right", "left", "packed"])
def test_places_are_those_of_the_scatter(rows: str) -> None:
    vlm = composed.model()
    collator = vlm.processor.collator(side="left" if rows == "left" else "right")
    batch = collator.rows([SAMPLES[:3], SAMPLES[3:]] if rows == "packed" else [[one] for one in SAMPLES])
    found = places(batch, "image")
    here = torch.stack([found.row_M, found.column_M], 1)
    assert torch.equal(here, (batch.input_ids_BT == vlm.placeholder("image")).nonzero())
    connected = vlm.connect(batch)
    embeds_BTD = vlm.embed(batch, connected)
    assert torch.equal(embeds_BTD[found.row_M, found.column_M], connected["image"][found.medium_M, found.vector_M])
    assert term().count(batch) == 4 * 15 and term(shift=0).count(batch) == 4 * 16


def test_places_of_pictures_that_differ_in_size_are_those_of_the_scatter() -> None:
    batch = laid_out(ROWS)
    y_NQD = torch.randn(4, 4, WIDTH)
    features = Features(y_NQD, lengths_N=torch.tensor([4, 2, 3, 1]))
    embeds_BTD = fuse.splice(
        torch.zeros(2, 10, WIDTH), batch.modality_BT > 0, fuse.rows(y_NQD, features, lambda s: s), "image"
    )
    found = places(batch, "image")
    assert torch.equal(embeds_BTD[found.row_M, found.column_M], y_NQD[found.medium_M, found.vector_M])


@pytest.mark.parametrize("options", [{"ratio": 0.0}, {"weight": 0.0}, {"ratio": 0.0, "layer": 2, "text": False}])
def test_without_ratio_or_weight_training_is_llava_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    ends = []
    for number, terms in enumerate([("lm",), with_term(**options)]):
        made = composed.recipe().but(stages=(stage(*terms, data=(written(tmp_path),)),), dtype="float32")
        trained = train(made, tmp_path / f"run{number}", torch.device("cpu"))
        assert trained is not None
        ends.append(trained.state_dict())
    newborn = composed.model().state_dict()
    assert any(not torch.equal(ends[0][name], newborn[name]) for name in newborn)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def written(folder: Path) -> str:
    """A file of samples with one small picture each."""
    lines = []
    for number in range(12):
        image = folder / f"{number}.png"
        picture(number).source.save(image)
        user = {"role": "user", "content": [{"type": "image", "image": str(image)}, {"type": "text", "text": "what?"}]}
        answer = {"role": "assistant", "content": f"number {number}"}
        lines.append(json.dumps({"id": str(number), "messages": [user, answer]}))
    (folder / "some.jsonl").write_text("\n".join(lines))
    return str(folder / "some.jsonl")


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("options", [{}, {"detach": False, "distance": "cosine"}, {"layer": "before"}, {"layer": 1}])
def test_split_packed_and_recomputed_gradients_are_the_same(shift: int, options: dict[str, Any]) -> None:
    leg = stage(*with_term(ratio=1.0, shift=shift, **options))
    step = prepared(leg)
    collator = step.vlm.processor.collator()
    whole = gradients(step, [collator(SAMPLES)])
    again = prepared(leg)
    again.recompute()
    again.ready()
    assert all(torch.equal(found, whole[name]) for name, found in gradients(again, [collator(SAMPLES)]).items())
    for split in ([collator([one]) for one in SAMPLES], [collator.rows([SAMPLES[2:], SAMPLES[:2]])]):
        found = gradients(step, split)
        assert found.keys() == whole.keys()
        for name in whole:
            torch.testing.assert_close(found[name], whole[name], rtol=1e-3, atol=1e-5)


def test_questions_that_share_a_picture_carry_its_term_once() -> None:
    step = prepared(stage(*with_term(ratio=1.0)))
    collate, terms = step.vlm.processor.collator(), step.terms["vdep"]
    one = SAMPLES[0]
    other = (Turn("user", (*one.media, Text("is it big?"))), Turn.say("assistant", "no"))
    values = []
    for some in (one, one.but(branches=(other,))):
        batch = collate([some])
        values.append(terms.loss(step, step.vlm.run(batch), batch).item())
        assert terms.count(batch) == 15
    assert batch.branch_BT is not None and values[1] == pytest.approx(values[0], rel=1e-5)


def test_layers_are_named_as_transformers_counts_them() -> None:
    vlm = composed.model()
    batch = vlm.processor.collator()(SAMPLES[:1])
    with sites.states(vlm.llm, {1, 3, -1}) as states:
        output = vlm.run(batch)
    embeds = vlm.embed(batch, vlm.connect(batch))
    expected = vlm.llm.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[1], expected[1])
    assert torch.equal(states[3], states[-1])
    assert torch.equal(sites.norm(vlm.llm)(states[-1]), output.hidden_BTD)
    with pytest.raises(ConfigError, match="layer 4 of an LLM that has 3"):
        prepared(stage(*with_term(layer=4)))


def test_lora_learns_it_and_the_frozen_rest_stays() -> None:
    leg = stage(ObjectiveConfig(name="vdep"), train={"llm.*v_proj": {"mode": LoRA(r=2)}})
    step = prepared(leg)
    before = {name: p.detach().clone() for name, p in step.named_parameters()}
    adam = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=1e-2)
    batch = step.vlm.processor.collator()(SAMPLES)
    first = None
    for _ in range(12):
        loss, _ = step(batch, step.scales([batch]))
        first = loss.item() if first is None else first
        loss.backward()
        adam.step()
        adam.zero_grad()
    assert loss.item() < 0.97 * first
    moved = {name for name, p in step.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in step.named_parameters() if p.requires_grad} and moved


# ---------------------------------------------------------------------------------------------- refusals

REFUSED = [
    ("llama", "flamingo", {"latents": 5, "depth": 2, "heads": 2, "head_width": 8}, 0, "has no places of pictures"),
    ("llama", "saisa", {"inner": 16}, 0, "has no places of pictures"),
    ("t5", "llava", {}, 0, "an encoder-decoder's decoder has no places"),
    ("llama", "ee_mllm", {}, 1, "see themselves alone"),
    ("opt", "ee_mllm", {"compute": "rule"}, 1, "see themselves alone"),
    ("llama", "ee_mllm", {"visual": "ffn"}, 1, "see themselves alone"),
    ("llama", "ee_mllm", {"visual": "keys"}, 0, "stay what was put in"),
    ("llama", "ee_mllm", {"visual": "keys", "layers": [0, 1, 2]}, 0, "stay what was put in"),
    ("llama", "llava", {"pool": 1}, 1, "each image is a single vector"),
    ("llama", "blip2", {"queries": 1, "layers": 2, "width": 16, "heads": 2, "inner": 24}, 1, "is a single vector"),
]
CARRIED = [
    ("llama", "ee_mllm", {}, 0),
    ("llama", "ee_mllm", {"free": True}, 1),
    ("llama", "ee_mllm", {"layers": [1]}, 1),
    ("llama", "llava", {"pool": 1}, 0),
    ("opt", "cogvlm", {}, 1),
]


@pytest.mark.parametrize(("family", "joint", "options", "shift", "reason"), REFUSED)
def test_a_joint_that_has_no_such_states_is_refused_before_anything_runs(
    family: str, joint: str, options: dict[str, Any], shift: int, reason: str
) -> None:
    made = composed.recipe(family, joint, options).but(stages=(stage(*with_term(shift=shift)),))
    with pytest.raises(ConfigError, match=f"stage sft: objective vdep with the joint {joint}: .*{reason}") as refused:
        combination.check(made, isthmus.compose(made, torch.float32), torch.device("cpu"))
    assert refused.value.remedy


def test_a_stage_is_checked_with_the_options_that_it_gives_the_joint(tmp_path: Path) -> None:
    """`free` has full attention in training, and so a past; told before the stage in front of it runs."""

    def made(free: bool, then: bool) -> Recipe:
        legs = stage(name="align", data=(file,)), stage(*with_term(), data=(file,), joint={"free": then})
        return composed.recipe("llama", "ee_mllm", {"free": free}).but(stages=legs, dtype="float32")

    file = str(composed.questions(tmp_path, 8))
    with pytest.raises(ConfigError, match="stage sft: .*see themselves alone"):
        train(made(free=True, then=False), tmp_path / "refused", torch.device("cpu"))
    assert not (tmp_path / "refused" / "align").exists()
    trained = train(made(free=False, then=True), tmp_path / "run", torch.device("cpu"))
    assert trained is not None and trained.aligner.options.free


@pytest.mark.parametrize(("family", "joint", "options", "shift"), CARRIED)
def test_a_joint_that_has_them_learns(family: str, joint: str, options: dict[str, Any], shift: int) -> None:
    step = prepared(stage(*with_term(shift=shift, ratio=1.0)), composed.model(family, joint, options))
    batch = step.vlm.processor.collator()(SAMPLES)
    assert any(gradient.any() for gradient in gradients(step, [batch]).values())


@pytest.mark.parametrize("layer", [1, 2, 3, "before", "last"])
@pytest.mark.parametrize("layers", [None, [0, 1, 2], [0], [0, 1], [1, 2], []])
def test_it_is_refused_where_an_earlier_vector_changes_no_later_state(
    layers: list[int] | None, layer: int | str
) -> None:
    vlm = composed.model("llama", "ee_mllm", {"layers": layers})
    batch = vlm.processor.collator()(SAMPLES[:1])
    found = places(batch, "image")
    states = []
    for change in (0.0, 1.0):
        embeds = vlm.embed(batch, vlm.connect(batch))
        embeds[0, found.column_M[3]] += change
        past, number = isthmus.types.Past(None), layer if isinstance(layer, int) else -1
        with sites.states(vlm.llm, {number}) as after:
            hidden = vlm.think(embeds, batch.segment_BT, batch.modality_BT, None, past)[0]
        states.append((hidden if layer == "last" else after[number])[0, found.column_M])
    changed = (states[0] != states[1]).any(-1).tolist()
    prepared(stage(*with_term(shift=0, layer=layer)), vlm)
    if changed == [place == 3 for place in range(16)]:
        with pytest.raises(ConfigError, match="see themselves alone") as refused:
            prepared(stage(*with_term(shift=1, layer=layer)), vlm)
        assert ("behind a layer in which they see more" in refused.value.remedy) == (layer in (1, 2))
    else:
        assert changed == [place >= 3 for place in range(16)]
        prepared(stage(*with_term(shift=1, layer=layer)), vlm)
