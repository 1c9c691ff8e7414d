"""Tasks ask what they say, under every condition, and keep and reuse what was answered."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image as Pillow

import composed
from isthmus import config
from isthmus.config import TaskConfig
from isthmus.data import sets
from isthmus.evaluation import answers, catalogue, tasks
from isthmus.evaluation.catalogue import named
from isthmus.evaluation.score import RULE, Scorer
from isthmus.evaluation.tasks import Choice, Cut, Generate, Item, Likelihood, item, run
from isthmus.model import VLM
from isthmus.types import Box, ConfigError, DataError, Image, Sample, Tag, Turn


def sample(place: int, choices: tuple[str, ...] = ("yes", "no", "maybe")) -> Sample:
    picture = Image(Pillow.new("RGB", (4, 4), (place * 20 % 256, 40, 200 - place)))
    return Sample(
        (Turn.say("user", picture, f"Is it {place}?"), Turn.say("assistant", choices[place % len(choices)])),
        id=f"s{place}",
        meta={"choices": choices, "answer": choices[place % len(choices)], "cluster": f"c{place // 2}", "kind": "odd"},
    )


ITEMS = tuple(item(sample(place)) for place in range(6))


@pytest.fixture(scope="module")
def model() -> VLM:
    return composed.stir(composed.model())


def scorer(model: VLM, reply: object = None) -> Scorer:
    return Scorer(model, reply=reply, batch_size=4)  # type: ignore[arg-type]


def test_item_takes_the_answer_out_of_the_prompt() -> None:
    one = item(sample(1))
    assert [turn.role for turn in one.prompt.turns] == ["user"]
    assert (one.answer, one.choices, one.cluster, one.kind) == ("no", ("yes", "no", "maybe"), "c0", "odd")


@pytest.mark.parametrize(
    "broken",
    [
        sample(0).but(turns=sample(0).turns[:1]),
        sample(0).but(meta={"choices": ("a", "b"), "answer": "c"}),
        sample(0).but(meta={"choices": ("a", "a"), "answer": "a"}),
    ],
)
def test_item_refuses_what_cannot_be_scored(broken: Sample) -> None:
    with pytest.raises(DataError, match="s0"):
        item(broken)


def test_plain_shows_all_parts() -> None:
    turn = Turn("user", (Image("x.png"), Tag("cat"), Box((0, 0, 0.5, 1))))
    assert answers.plain(Sample((turn, Turn.say("assistant", "yes")))) == (
        "user: <image> cat [0.000,0.000,0.500,1.000]\nassistant: yes"
    )


def test_choice_predicts_the_likeliest(model: VLM) -> None:
    task = Choice("t", ITEMS, (Cut("T"),))
    found = run(task, scorer(model))
    direct = scorer(model).likelihoods([one.question for one in ITEMS])
    for one, prediction, scores in zip(ITEMS, found, direct, strict=True):
        assert prediction.scores == pytest.approx(scores.values)
        assert prediction.prediction == one.choices[max(range(3), key=lambda n: scores.values[n])]
        assert prediction.right == (prediction.prediction == one.answer)
        assert (prediction.id, prediction.cluster, prediction.kind) == (one.prompt.id, one.cluster, "odd")
        assert prediction.prompt.startswith("user: <image> Is it")
    assert RULE in task.rule


def test_controls_change_the_picture_that_is_scored(model: VLM) -> None:
    task = Choice("t", ITEMS, (Cut("T"),))
    real, blank, other = (run(task, scorer(model), control=c) for c in (None, "blind", "shuffled"))  # type: ignore[arg-type]
    assert {p.control for p in blank} == {"blind"} and {p.control for p in other} == {"shuffled"}
    for one, two, three in zip(real, blank, other):
        assert len({one.scores, two.scores, three.scores}) == 3
        assert one.answer == two.answer == three.answer
    same = [replace(one, prompt=ITEMS[0].prompt.but(id=one.prompt.id)) for one in ITEMS]
    with pytest.raises(DataError, match="same picture"):
        run(Choice("t", tuple(same), (Cut("T"),)), scorer(model), control="shuffled")


def test_joint_alone_leaves_the_llm_out(model: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(model, "think", lambda *_: pytest.fail("the LLM was run"))
        found = run(Choice("t", ITEMS, (Cut("T"),), cosine=True), scorer(model), control="cosine")
    assert all(-1 <= score <= 1 for prediction in found for score in prediction.scores)
    with pytest.raises(ConfigError, match="no choices"):
        run(Likelihood("t", ITEMS, (Cut("T"),)), scorer(model), control="cosine")


def test_likelihood_scores_the_reference_alone(model: VLM) -> None:
    found = run(Likelihood("t", ITEMS, (Cut("T"),)), scorer(model))
    for one, prediction in zip(ITEMS, found, strict=True):
        (only,) = scorer(model).likelihoods([replace(one.question, choices=(one.answer,))])
        assert prediction.scores == pytest.approx(only.values)
        assert prediction.tokens == only.tokens[0] > 1 and prediction.right is None


def test_generate_scores_free_replies_in_three_states(model: VLM) -> None:
    said = iter(["Yes!", "I think no", "perhaps", None, "", "maybe"])

    def reply(samples: Sequence[Sample]) -> list[str | None]:
        assert all(one.turns[-1].role == "user" for one in samples)
        return [next(said) for _ in samples]

    task = Generate("t", ITEMS, (Cut("T"),))
    assert [p.right for p in run(task, scorer(model, reply))] == [True, True, False, None, False, True]
    with pytest.raises(ConfigError, match="free replies"):
        run(task, scorer(model))


def test_free_replies_are_asked_longest_first_and_told_in_order(model: VLM) -> None:
    asked: list[list[str]] = []
    words = ("What?", "What is there? Look once more.", "What is it?", "Where? " * 9)
    items = tuple(
        Item(Sample((Turn.say("user", said),), id=f"p{place}"), "no", (), "", "") for place, said in enumerate(words)
    )

    def reply(samples: Sequence[Sample]) -> list[str]:
        asked.append([one.id for one in samples])
        return [f"no {one.id}" for one in samples]

    found = run(Generate("t", items, (Cut("T"),)), Scorer(model, reply=reply, batch_size=2))
    assert asked == [["p3", "p1"], ["p2", "p0"]]
    assert [one.prediction for one in found] == ["no p0", "no p1", "no p2", "no p3"]


def test_predictions_are_kept_and_reused(model: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    genuine = model.think
    monkeypatch.setattr(model, "think", lambda *args: ran.append(1) or genuine(*args))
    task = Choice("t", ITEMS, (Cut("T"),))
    settings = {"weights": "w1"}
    first = run(task, scorer(model), control="blind", folder=tmp_path, settings=settings)
    assert answers.read(tmp_path / "t.blind.jsonl")[0].settings == settings
    ran.clear()
    heard: list[int] = []
    again = run(task, scorer(model), control="blind", folder=tmp_path, settings=settings, advance=heard.append)
    assert again == first and not ran and sum(heard) == len(ITEMS)
    run(task, scorer(model), control="blind", folder=tmp_path, settings={"weights": "w2"})
    assert ran
    ran.clear()
    fewer = Choice("t", ITEMS[:4], (Cut("T"),))
    assert len(run(fewer, scorer(model), control="blind", folder=tmp_path, settings={"weights": "w2"})) == 4
    assert ran


def test_predictions_of_other_items_are_set_aside_and_found_again(model: VLM, tmp_path: Path) -> None:
    """Two files of one stem, or one under a limit, are tasks of one name: neither overwrites the other's answers."""
    asked: list[int] = []
    listener = scorer(model, lambda samples: [asked.append(1) or "yes" for _ in samples])  # type: ignore[func-returns-value]
    whole, few = (Generate("t", items, (Cut("T"),)) for items in (ITEMS, ITEMS[:2]))
    first = run(whole, listener, folder=tmp_path)
    second = run(few, listener, folder=tmp_path)
    assert len(asked) == 8 and answers.read(tmp_path / "t.jsonl")[1] == second
    (aside,) = (tmp_path / "earlier").iterdir()
    assert answers.read(aside)[1] == first and aside.name == f"t.{answers.read(aside)[0].fingerprint}.jsonl"
    assert run(whole, listener, folder=tmp_path) == first and run(few, listener, folder=tmp_path) == second
    assert len(asked) == 8 and answers.read(tmp_path / "t.jsonl")[1] == second
    (tmp_path / "t.jsonl").write_text("half")  # nobody can use it: it goes
    assert run(whole, listener, folder=tmp_path) == first
    assert sorted(path.name for path in tmp_path.rglob("*.jsonl")) == ["t.jsonl"] and len(asked) == 8


def test_predictions_of_another_kind_of_task_are_not_taken_for_these(model: VLM, tmp_path: Path) -> None:
    """The same questions on another route are asked again."""
    asked: list[int] = []
    listener = scorer(model, lambda samples: [asked.append(1) or "yes" for _ in samples])  # type: ignore[func-returns-value]
    for count, route in enumerate((None, 0, 1), start=1):
        meta = {} if route is None else {"route": route}
        items = [replace(one, prompt=one.prompt.but(meta={**one.prompt.meta, **meta})) for one in ITEMS]
        for _ in range(2):
            run(Generate("t", tuple(items), (Cut("T"),)), listener, folder=tmp_path)
            assert len(asked) == count * len(ITEMS)


@pytest.mark.parametrize("kind", ["free", "choice", "joint alone"])
def test_an_interrupted_task_goes_on_after_its_last_batch(kind: str, model: VLM, tmp_path: Path) -> None:
    """Ctrl-C in the second of three batches, a line cut off in the middle: the first batch is not asked again."""
    heard: list[str] = []

    def reply(samples: Sequence[Sample]) -> list[str]:
        heard.extend(one.id for one in samples)
        return [f"no {one.id}" for one in samples]

    def stop(done: int) -> None:
        counted.append(done)
        if len(counted) == 2:
            raise KeyboardInterrupt

    task = (Generate if kind == "free" else Choice)("t", ITEMS, (Cut("T"),))
    control = "cosine" if kind == "joint alone" else None
    counted: list[int] = []
    listener = Scorer(model, reply=reply, batch_size=2)
    wanted = [replace(one, seconds=0) for one in run(task, listener, control=control)]
    heard.clear()
    with pytest.raises(KeyboardInterrupt):
        run(task, listener, control=control, folder=tmp_path, advance=stop)
    (part,) = tmp_path.glob("t.*.part")
    part.write_text(part.read_text()[:-3])
    heard.clear()
    ran: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        genuine = model.run
        patch.setattr(model, "run", lambda batch, **how: ran.append(len(batch.ids)) or genuine(batch, **how))
        found = run(task, listener, control=control, folder=tmp_path)
    assert [replace(one, seconds=0) for one in found] == wanted
    assert heard == (["s2", "s3", "s4", "s5"] if kind == "free" else [])
    assert sum(ran) in {"free": [0], "choice": [2, 4], "joint alone": [4]}[kind]  # the last was in hand beside it
    assert [path.suffix for path in tmp_path.iterdir()] == [".jsonl"]
    listener.likelihoods([one.question for one in ITEMS])  # not under a task: nothing is kept
    assert [path.suffix for path in tmp_path.iterdir()] == [".jsonl"]


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'counting'"):
        named("countin")


NAMES = (
    *("naming", "naming-options", "naming-free"),
    *("easy-vqa", "presence", "counting", "relation", "colour", "caption"),
)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[config.Source]:
    """Every set that is opened; each holds 700 samples of two kinds."""
    seen: list[config.Source] = []

    def open_set(source: config.Source, seed: int) -> list[Sample]:
        seen.append(source)
        made = [sample(place) for place in range(700)]
        return [one.but(meta={**one.meta, "kind": "yesno" if n % 4 else "open"}) for n, one in enumerate(made)]

    monkeypatch.setattr(sets, "open_set", open_set)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_named_tasks_take_500_items_or_the_limit(name: str, opened: list[config.Source]) -> None:
    task = named(name)(TaskConfig(name=name), 0)
    assert task.name == name and len(task.items) == 500
    assert len(named(name)(TaskConfig(name=name, limit=40), 0).items) == 40
    assert task == named(name)(TaskConfig(name=name), 0)
    assert opened[0].split == ("unseen" if name.startswith("naming") else "test")
    assert task.cosine == (name in {"naming", "naming-options"})


def test_easy_vqa_is_drawn_from_all_of_the_test_set_and_cut_twice(opened: list[config.Source]) -> None:
    task, other = (named("easy-vqa")(TaskConfig(name="easy-vqa", limit=100), seed) for seed in (0, 7))
    places = [int(one.prompt.id[1:]) for one in task.items]
    assert places == sorted(random.Random(0).sample(range(700), 100))
    assert [one.prompt.id for one in other.items] == [one.prompt.id for one in task.items]
    total, without = task.cuts
    assert total.takes("yesno") and total.takes("open") and without.takes("open") and not without.takes("yesno")
    assert set(tasks.TASKS) == set(NAMES) < set(catalogue.TASKS)
