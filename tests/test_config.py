"""What a recipe from somebody else's file may say: names that are no paths, numbers that are numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isthmus.config import Budget, LoRA, Recipe, Source, read
from isthmus.data import formats
from isthmus.overrides import ELSEWHERE, fields, parse_value
from isthmus.recipes import BOOK
from isthmus.types import ConfigError, Route

STAGE = "stages: [{{name: one, data: [scenes], train: {{'connectors.*': 1e-3}}, budget: {{steps: 1}}, {field}}}]"


def refused(folder: Path, text: str) -> str:
    file = folder / "theirs.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read(file)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/x", "..", ".", "a/b", "a\\\\b", ".hidden", "-rf", " x", "", "a\\0b", "a\\nb", "n" * 101],
)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    """Runs are kept in a folder of the recipe's name."""
    assert "name: String should" in refused(tmp_path, f'name: "{name}"')


@pytest.mark.parametrize("name", ["llava-1.5_7b", "it's mine", "größe 2", "模型", "a..b", "x" * 100])
def test_a_name_is_one_folder_below_where_runs_are_kept(tmp_path: Path, name: str) -> None:
    file = tmp_path / "mine.yaml"
    Recipe(name=name).save(file)
    folder = tmp_path / read(file).name
    folder.mkdir()
    assert folder.resolve().parent == tmp_path.resolve()


def test_a_file_may_be_named_by_a_text(tmp_path: Path) -> None:
    Recipe(name="mine").save(tmp_path / "mine.yaml")
    assert read(str(tmp_path / "mine.yaml")).name == "mine"
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi!"}]}]
    (tmp_path / "my.json").write_text(json.dumps(rows))
    assert len(formats.load(str(tmp_path / "my.json"), str(tmp_path))) == 1


def test_an_unknown_field_of_a_changed_copy_is_told_as_in_a_file() -> None:
    with pytest.raises(ConfigError, match="Recipe: unknown key 'encodr'; did you mean 'encoder'"):
        Recipe().but(encodr="lite0")
    with pytest.raises(ConfigError, match="Recipe: unknown key 'learning_rate'; it is called 'stages.NAME.lr' here"):
        Recipe().but(learning_rate=1e-3)


def test_names_of_the_book_are_kept() -> None:
    for name in ("llava", "vdep", "lion", "flamingo"):
        assert BOOK[name]().name


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("field", ["lr", "clip", "warmup", "mixing", "evaluate_every", "save_every"])
def test_a_number_that_is_none_is_refused(tmp_path: Path, field: str, value: str) -> None:
    assert f"stages.one.{field}: Input should be a finite number" in refused(
        tmp_path, STAGE.format(field=f"{field}: {value}")
    )


@pytest.mark.parametrize(
    "field",
    ["evaluate_every: 0", "evaluate_every: 1.01", "save_every: 0", "save_every: 2", "clip: 0", "clip: -1", "lr: 0"]
    + ["betas: [0.9, 1]", "betas: [-0.1, 0.9]", "warmup: 1", "batch_size: 0"],
)
def test_a_number_out_of_bounds_is_refused(tmp_path: Path, field: str) -> None:
    assert "Input should be" in refused(tmp_path, STAGE.format(field=field))
    assert read_one(tmp_path, "warmup: 0.5").stages[0].warmup == 0.5


def read_one(folder: Path, field: str) -> Recipe:
    file = folder / "ours.yaml"
    file.write_text(STAGE.format(field=field), encoding="utf-8")
    return read(file)


@pytest.mark.parametrize("budget", ["{minutes: .inf}", "{epochs: .nan}", "{epochs: .inf}", "{steps: -1}"])
def test_a_budget_ends(tmp_path: Path, budget: str) -> None:
    text = STAGE.format(field="lr: 1e-3").replace("{steps: 1}", budget)
    assert "stages.one.budget" in refused(tmp_path, text)


# ---------------------------------------------------------------------------------------------- overrides and faults


def of(**fields: object) -> Recipe:
    stage = {"name": "sft", "data": ["scenes"], "train": {"connectors.*": 1e-3}, "budget": {"epochs": 1}, **fields}
    return Recipe.model_validate({"stages": [{**stage, "name": "align"}, stage]})


def fault(*assignments: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        of().override(assignments)
    return caught.value


def test_a_route_is_one_of_those_that_there_are(tmp_path: Path) -> None:
    for kind in Route:
        assert Source(name="scenes", route=int(kind)).route == kind
    for wrong in (-1, len(Route), "region"):
        data = f"data: [{{name: scenes, route: {wrong}}}]"
        told = refused(tmp_path, STAGE.format(field="batch_size: 2").replace("data: [scenes]", data))
        assert "data.scenes.route: Input should be" in told


def test_an_override_of_one_unit_takes_the_place_of_another() -> None:
    assert of().override(["stages.sft.budget.steps=2"]).stage("sft").budget == Budget(steps=2)
    assert of().override(["stages.1.budget.steps=2", "stages.sft.budget.minutes=3"]).stages[1].budget.minutes == 3
    assert of().override(["stages.sft.budget={samples: 9}"]).stage("sft").budget == Budget(samples=9)
    assert of().override(["stages.sft.budget.steps=2"]).stage("align") == of().stage("align")
    two = fault("stages.sft.budget={steps: 2, epochs: 1}")
    assert "stages.sft.budget: a budget is one of steps, samples, epochs, minutes; got ['steps', 'epochs']" in two.cause
    assert (
        "'stages.sft.budget.step'; did you mean 'stages.sft.budget.steps'?" in fault("stages.sft.budget.step=2").cause
    )
    assert "got none" in fault("stages.sft.budget.epochs=null").cause


def test_a_value_without_its_form_is_told_how_it_is_written(tmp_path: Path) -> None:
    assert fault("stages.sft.budget=2").remedy == "write stages.sft.budget={steps: 2}"
    assert fault("stages.sft.data=mine.json").remedy == "write stages.sft.data=[mine.json]"
    assert "write budget: {steps: 3}" in refused(tmp_path, STAGE.format(field="lr: 1e-3").replace("{steps: 1}", "3"))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("learning_rate", "stages.sft.lr"),
        ("per_device_train_batch_size", "stages.sft.batch_size"),
        ("gradient_accumulation_steps", "stages.sft.accumulate"),
        ("max_steps", "stages.sft.budget.steps"),
        ("num_train_epochs", "stages.sft.budget.epochs"),
        ("gradient_checkpointing", "stages.sft.recompute"),
        ("lora_r", "stages.sft.train.KEY.mode.r"),
        ("image_folder", "stages.sft.data.NAME.images"),
        ("vision_tower", "encoder.source"),
        ("bf16", "dtype"),
    ],
)
def test_names_of_other_toolkits_are_told_their_name_here(theirs: str, ours: str) -> None:
    assert (
        fault(f"stages.sft.{theirs}=1").cause
        == f"override: unknown key 'stages.sft.{theirs}'; it is called {ours!r} here"
    )


def test_what_others_count_in_steps_is_told_to_be_a_share_here() -> None:
    for theirs, ours in (("warmup_steps", "warmup"), ("eval_steps", "evaluate_every"), ("save_steps", "save_every")):
        assert fault(f"stages.sft.{theirs}=1").cause.endswith(f"'stages.sft.{ours}' here, and is a share of all steps")


def test_every_name_of_another_toolkit_has_one_here() -> None:
    paths = [path for path, _ in fields(Recipe)]
    for end in map(tuple, (name.split(".") for name in set(ELSEWHERE.values()))):
        assert any(path[-len(end) :] == end for path in paths), end
    assert not set(ELSEWHERE) & {path[-1] for path in paths}


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("epochs: 1", "unknown key 'stages.one.epochs'; did you mean 'budget: {epochs: 1}'?"),
        ("learning_rate: 1e-3", "unknown key 'stages.one.learning_rate'; it is called 'lr' here"),
        ("lora_r: 8", "unknown key 'stages.one.lora_r'; it is called 'train: {KEY: {mode: {r: 8}}}' here"),
        ("btach_size: 8", "unknown key 'stages.one.btach_size'; did you mean 'batch_size'?"),
        ("seed: 8", "unknown key 'stages.one.seed'; did you mean 'seed'?"),
        ("zzzzzz: 8", "unknown key 'stages.one.zzzzzz'\n"),
    ],
)
def test_an_unknown_key_of_a_file_is_told_the_whole_way(tmp_path: Path, field: str, told: str) -> None:
    assert told in refused(tmp_path, STAGE.format(field=field))


def test_a_key_at_the_top_is_told_where_it_belongs(tmp_path: Path) -> None:
    assert "unknown key 'epochs'; did you mean 'stages.NAME.budget.epochs'?" in refused(tmp_path, "epochs: 1")


def test_a_fault_inside_a_union_is_told_once(tmp_path: Path) -> None:
    text = STAGE.format(field="lr: 1e-3").replace("'connectors.*': 1e-3", "'llm.*': {mode: {rank: 8, lora_alpha: 3}}")
    told = refused(tmp_path, text).splitlines()[0].split(": ", 1)[1]
    assert "stages.one.train.llm.*.mode.lora_alpha'; it is called 'alpha' here" in told and "Input should" not in told


def test_a_glob_is_a_key_though_it_has_dots() -> None:
    made = of().override(["stages.sft.train.connectors.*=2e-3", "stages.align.train.connectors.*.mode.r=4"])
    assert made.stage("sft").train["connectors.*"].lr == 2e-3
    assert made.stage("align").train["connectors.*"].mode == LoRA(r=4)


def test_a_file_that_is_not_there_is_told_so(tmp_path: Path) -> None:
    of().save(tmp_path / "mine.yaml")
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "mien.yaml")
    assert caught.value.cause == f"no file {tmp_path / 'mien.yaml'}; did you mean 'mine.yaml'?"
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "nowhere/mine.yaml")
    assert caught.value.cause == f"no file {tmp_path / 'nowhere/mine.yaml'}"


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-.5e+2", -50.0),
        ("2.e3", 2000.0),
        ("[1e-3, {a: 2e4}, '3e5']", [1e-3, {"a": 2e4}, "3e5"]),
        ("1.5", 1.5),
        ("007", 7),
        ('"5"', "5"),
        ("'007'", "007"),
        ('"2024"', "2024"),
        ('"1e-3"', "1e-3"),
        ("2024-13-45", "2024-13-45"),
        ("0b_", "0b_"),
        ("e5", "e5"),
        ("1e5x", "1e5x"),
        ("1e", "1e"),
        ("[" * 3000, "[" * 3000),
    ],
)
def test_a_value_is_what_is_written(text: str, value: object) -> None:
    found = parse_value(text)
    assert found == value and type(found) is type(value)


def test_a_quoted_number_is_a_name_and_is_kept(tmp_path: Path) -> None:
    for name in ("2024", "1e5", "1.5E-3"):
        recipe = of().override([f'name="{name}"'])
        for file in (tmp_path / "mine.yaml", tmp_path / "mine.json"):
            recipe.save(file)
            assert read(file) == recipe and recipe.name == name


@pytest.mark.parametrize("value", ["2024-13-45", "0b_", "!!int ''", "!!timestamp x", "!!bool x", "[" * 3000])
def test_a_value_that_cannot_be_read_is_told_of_its_file(tmp_path: Path, value: str) -> None:
    assert "theirs.yaml: cannot be read as YAML or JSON (" in refused(tmp_path, f"name: {value}")


def test_numbers_of_a_file_may_have_exponents_at_every_depth(tmp_path: Path) -> None:
    stage = read_one(tmp_path, "betas: [9e-1, 99e-2]").stages[0]
    assert stage.betas == (0.9, 0.99) and stage.train["connectors.*"].lr == 1e-3
    assert read_one(tmp_path, "joint: {scale: 1e-2}").stages[0].joint == {"scale": 0.01}


# ---------------------------------------------------------------------------------------------- what is there twice


ONE = "{{name: {name}, data: [scenes], train: {{'connectors.*': 1e-3}}, budget: {{steps: 1}}}}"


def test_a_key_that_is_there_twice_is_refused_with_its_lines(tmp_path: Path) -> None:
    """The latter of two blocks of stages would be trained alone."""
    blocks = [f"stages:\n  - {ONE.format(name=name)}\n" for name in ("align", "sft")]
    assert "the key 'stages' stands in line 2 and again in line 4\n" in refused(tmp_path, "seed: 1\n" + "".join(blocks))
    inner = STAGE.format(field="\n  lr: 1e-3,\n  lr: 2e-3")
    assert "the key 'lr' stands in line 2 and again in line 3" in refused(tmp_path, inner)
    file = tmp_path / "theirs.json"
    file.write_text('{"name": "mine",\n "seed": 1,\n "seed": 2}')
    with pytest.raises(ConfigError) as caught:
        read(file)
    assert caught.value.cause == f"{file}: the key 'seed' stands in line 2 and again in line 3"
    told = fault("stages.sft.budget={steps: 1, steps: 2}").cause
    assert told.startswith("stages.sft.budget={steps: 1, steps: 2}: the key 'steps' stands in line 1")


def test_what_is_merged_into_a_mapping_may_be_overruled_there(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    head = f"stages:\n  - &one {ONE.format(name='align')}\n"
    file.write_text(head + "  - &two {<<: *one, name: sft}\n  - {<<: *two, name: last}\n")
    recipe = read(file)
    assert [stage.name for stage in recipe.stages] == ["align", "sft", "last"]
    assert recipe.last.budget == Budget(steps=1)


# ---------------------------------------------------------------------------------------------- what nothing feeds


def test_an_encoder_of_another_kind_is_refused_until_data_can_feed_it(tmp_path: Path) -> None:
    """Its newborn connector would train on nothing."""
    assert "more_encoders: no data feed an encoder of audio" in refused(tmp_path, "more_encoders: {audio: whisper}")
    told = fault("more_encoders={video: lite0}")
    assert told.cause.startswith("override: more_encoders: no data feed an encoder of video")
    assert "frames of a video are pictures" in (told.remedy or "")
    with pytest.raises(ConfigError, match="no data feed"):
        Recipe().but(more_encoders={"video": "lite0"}).override([])
    assert Recipe().override([]).encoders.keys() == {"image"}
