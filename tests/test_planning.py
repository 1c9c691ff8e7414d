"""What `plan` says of a picture's cost, against formulas by hand and against real runs; docs/costs.md is true."""

from __future__ import annotations

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from typer.testing import CliRunner

import composed
from isthmus import cost_table, papers, recipes
from isthmus.aligners.ee_mllm import flops
from isthmus.cli.app import app
from isthmus.cli.plan import _bytes, _flop
from isthmus.config import Stage
from isthmus.costs import BYTES, TEXT, costs, measure
from isthmus.planning import plan
from isthmus.recipes.published import FIGURES
from test_contract import LION, TAPS
from test_papers import ROOT

HEAD = 2 * 4096 * 32000
"""Logits of the last position in Vicuna 7B."""
TOKEN = 32 * 2 * 4096 * BYTES
"""Keys and values of one position in Vicuna 7B."""
LINES = (ROOT / "docs/costs.md").read_text(encoding="utf-8").splitlines()
TABLE = {
    line.split("`")[1]: [cell.strip() for cell in line.split("|")[1:-1]] for line in LINES if line.startswith("| `")
}


# ---------------------------------------------------------------------------------------------- by hand


def test_llava_costs_what_the_formula_says():
    cost = costs(recipes.named("llava-1.5-7b"))
    assert (cost.text, cost.positions) == (TEXT, 576)
    layer = 577 * (8 * 1024**2 + 4 * 1024 * 4096) + 4 * 577**2 * 1024
    assert cost.encoder == 24 * layer + 2 * 576 * 1024 * 3 * 14**2
    assert cost.joint == 2 * 576 * (1024 * 4096 + 4096 * 4096)
    assert cost.llm == flops(4096, 11008, 32, TEXT, 576, "full") + HEAD
    assert cost.text_only == flops(4096, 11008, 32, TEXT, 0, "full") + HEAD
    assert cost.cache == 576 * TOKEN == 288 * 2**20 and cost.aside == 0
    assert cost.total == cost.encoder + cost.joint + cost.llm


@pytest.mark.parametrize(("name", "how"), [("ee-mllm-7b", "self"), ("naavit-7b", "ffn")])
def test_what_is_skipped_is_not_counted(name, how):
    cost = costs(recipes.named(name))
    assert cost.llm == flops(4096, 11008, 32, TEXT, 576, how) + HEAD
    assert cost.cache == 576 * TOKEN  # media's keys and values are kept in every layer all the same


def test_media_that_stay_aside_take_no_place():
    cost = costs(recipes.named("openflamingo-9b"))
    assert cost.positions == cost.cache == 0 and cost.aside == 64 * 1024 * BYTES
    # queries and output of 64 text tokens, keys and values of 64 latents, scores and mixing; feed-forwards run anyway
    looks = 2 * 64 * (2 * 4096 * 512 + 1024 * 1024) + 4 * 64 * 64 * 512
    assert cost.llm - cost.text_only == 8 * looks


def test_an_encoder_decoder_keeps_what_its_decoder_reads():
    cost = costs(composed.recipe("t5"))
    assert cost.positions == 16 and cost.cache == 16 * 3 * 2 * 32 * BYTES


# ---------------------------------------------------------------------------------------------- by running


@pytest.mark.parametrize("joint", ["llava", "cogvlm", "ee_mllm", "flamingo", "llama_adapter", "saisa"])
def test_counts_without_numbers_are_those_of_a_real_run(joint):
    real = composed.model(aligner=joint)
    with sdpa_kernel(SDPBackend.MATH):  # a CPU's flash attention is not counted
        assert measure(real) == costs(composed.recipe(aligner=joint))


@pytest.mark.parametrize(
    ("joint", "options", "change", "encoder"),
    [("ee_mllm", {}, {"visual": "ffn"}, {}), ("lion", {**LION, "visual_input": "both"}, {"shown": "qformer"}, TAPS)],
)
def test_options_that_stages_set_are_those_of_a_joint_that_had_them_from_the_start(joint, options, change, encoder):
    first = Stage(name="first", train={"connectors.*": 1e-3}, budget={"steps": 1}, data=[{"name": "none"}])
    second = first.but(name="second", joint=change)
    staged = composed.recipe("llama", joint, options, **encoder).but(stages=(first, second))
    plain = composed.recipe("llama", joint, {**options, **change}, **encoder).but(stages=(first,))
    assert costs(staged) == costs(plain) != costs(staged.but(stages=(first,)))
    assert plan(staged).tokens == plan(plain).tokens and plan(staged).parts == plan(plain).parts


# ---------------------------------------------------------------------------------------------- the page


def test_every_published_recipe_has_a_row_and_figures_are_of_recipes():
    assert list(TABLE) == list(cost_table.published()) and FIGURES.keys() <= TABLE.keys()
    assert "\n".join(LINES).startswith(cost_table.HEAD.format(text=TEXT, before=cost_table.BEFORE).rstrip())


LEFT_OUT = {"instructblip-vicuna-7b": 2 * 768 * 3072 + 3072 + 768 + 2 * 768}
"""Parameters that are published and that ours leaves out: the last layer's text feed-forward, which nothing reads."""


@pytest.mark.parametrize("name", cost_table.published())
def test_parameters_of_the_page_are_those_of_the_models(name):
    planned = plan(recipes.named(name).but(name=name))
    assert TABLE[name][:5] == cost_table.counted(planned)
    figure = FIGURES.get(name)
    if figure is not None and figure.parameters is not None:
        expected = figure.parameters - LEFT_OUT.get(name, 0)
        assert planned.stages[0].trained == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", cost_table.published())
def test_the_whole_row_is_true(name):
    assert TABLE[name] == cost_table.row(name).cells()


@pytest.mark.parametrize("name", ["llava-1.5-7b", "saisa-7b"])
def test_costs_of_the_page_are_those_of_the_models(name):
    cost = costs(recipes.named(name))
    assert TABLE[name][5:] == [*cost_table.operations(cost), *cost_table.kept(cost, name)]


# ---------------------------------------------------------------------------------------------- the verb


def test_the_verb_takes_one_recipe_or_all(monkeypatch, tmp_path):
    runner = CliRunner()
    for words in ([], ["llava", "--all"], ["llava", "--write"]):
        assert "one recipe or several, or --all" in str(runner.invoke(app, ["plan", *words]).exception)
    told = runner.invoke(app, ["plan", "llava-1.5-7b", "--no-steps"]).output
    assert "576 tokens per image" in told and "288 MiB of keys and values" in told
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(papers, "checkout", lambda: tmp_path)
    monkeypatch.setattr(recipes, "BOOK", {"llava-1.5-7b": recipes.BOOK["llava-1.5-7b"]})
    assert runner.invoke(app, ["plan", "--all", "--write"]).exit_code == 0
    assert (tmp_path / "docs/costs.md").read_text().count("| `llava-1.5-7b` | 576 | 7.063 B |") == 1


@pytest.mark.parametrize(
    ("value", "told"),
    [(0, "0 FLOP"), (41_472, "41.5 kFLOP"), (999_600, "1 MFLOP"), (1.234e12, "1.23 TFLOP"), (4.5e18, "4,500 PFLOP")],
)
def test_operations_are_told_in_three_digits_and_a_unit_that_fits(value, told):
    assert _flop(value) == told


def test_bytes_are_told_in_the_same_way():
    assert [_bytes(value) for value in (700, 1023, 5000, 288 << 20, 3 << 39)] == [
        *("700 B", "0.999 KiB", "4.88 KiB", "288 MiB", "1.5 TiB")
    ]
