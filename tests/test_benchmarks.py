"""Every figure's script runs end to end at a tiny size, and what stands before its numbers can refuse them."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from isthmus.assets import packages

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def read(file: Path) -> dict:
    found = json.loads(file.read_text())
    assert {"processor", "threads", "versions", "date", "command"} <= found["machine"].keys()
    return found


# ---------------------------------------------------------------------------------------------- attention


def test_attention_measures_all_kernels(tmp_path):
    attention = importlib.import_module("attention")
    assert attention.main(["--tiny", "--repeats", "2", "--json", str(tmp_path / "a.json")]) == 0
    cases = read(tmp_path / "a.json")["cases"]
    assert [case["dtype"] for case in cases] == ["bfloat16", "float32"]
    for case in cases:
        for kind in ("forward", "both"):
            assert {kernel: spread["repeats"] for kernel, spread in case[kind].items()} == dict.fromkeys(
                attention.KERNELS, 2
            )


def test_attention_refuses_a_wrong_kernel(tmp_path, monkeypatch):
    attention = importlib.import_module("attention")
    right = attention.kernels.attention

    def wrong(module, query, key, value, mask, **options):
        out, _ = right(module, query, key, value, mask, **options)
        return out * 1.05, None

    monkeypatch.setattr(attention.kernels, "attention", wrong)
    assert attention.main(["--tiny", "--repeats", "1", "--json", str(tmp_path / "a.json")]) == 1
    for case in read(tmp_path / "a.json")["cases"]:
        assert "refused" in case and "both" not in case
        for kind in attention.KINDS:
            assert case["errors"][f"isthmus {kind}"] == pytest.approx(0.05, rel=0.2)


# ---------------------------------------------------------------------------------------------- decoding


def test_decoding_measures_both_linears_and_refuses_a_wrong_one(tmp_path, monkeypatch):
    decoding = importlib.import_module("decoding")
    words = ["--tiny", "--repeats", "2", "--steps", "1", "--json", str(tmp_path / "a.json")]
    assert decoding.main(words) == 0
    cases = read(tmp_path / "a.json")["cases"]
    assert [(case["rows"], case["ratio"]["repeats"]) for case in cases] == [(1, 2), (7, 2)]
    right = decoding.kernels_linear.few_rows
    monkeypatch.setattr(decoding.kernels_linear, "few_rows", lambda *given: right(*given) * 1.05)
    assert decoding.main(words) == 1
    assert ["refused" in case for case in read(tmp_path / "a.json")["cases"]] == [True, False]


# ---------------------------------------------------------------------------------------------- encoding


@pytest.mark.slow
def test_encoding_measures_every_way(tmp_path, embedded):
    encoding = importlib.import_module("encoding")
    assert encoding.main(["--tiny", "--repeats", "1", "--json", str(tmp_path / "e.json")]) == 0
    for case in read(tmp_path / "e.json")["cases"]:
        assert case["speeds"].keys() == set(encoding.WAYS)


def test_encoding_refuses_other_features(tmp_path, embedded, monkeypatch):
    encoding = importlib.import_module("encoding")
    right = encoding.FeatureCache._pixels
    monkeypatch.setattr(encoding.FeatureCache, "_pixels", lambda self, media: 1.5 * right(self, media))
    assert encoding.main(["--tiny", "--repeats", "1", "--json", str(tmp_path / "e.json")]) == 1
    for case in read(tmp_path / "e.json")["cases"]:
        assert "refused" in case and "speeds" not in case


# ---------------------------------------------------------------------------------------------- batching


def test_batching_measures_every_way_and_refuses_one_that_differs(tmp_path, monkeypatch):
    batching = importlib.import_module("batching")
    arguments = ["--tiny", "--repeats", "1", "--json", str(tmp_path / "b.json")]
    assert batching.main(arguments) == 0
    for case in read(tmp_path / "b.json")["cases"]:
        assert case["samples_per_second"].keys() == batching.WAYS.keys()
        assert case["padding"]["packed"] == 0 < case["padding"]["bucketed"] < case["padding"]["padded"]
    borders = batching.kernels.borders
    monkeypatch.setattr(batching.kernels, "borders", lambda segment: borders(torch.ones_like(segment)))  # leaks
    assert batching.main(arguments) == 1
    (refused,) = (case for case in read(tmp_path / "b.json")["cases"] if case["dtype"] == "float32")
    assert "refused" in refused and "samples_per_second" not in refused


# ---------------------------------------------------------------------------------------------- roofline


def test_the_ceiling_counts_every_product_of_a_step():
    roofline = importlib.import_module("roofline")
    aten = torch.ops.aten
    layer, x = torch.nn.Linear(8, 4), torch.randn(2, 3, 8, requires_grad=True)
    heads = torch.randn(2, 2, 16, 8, requires_grad=True)
    with roofline.Products() as seen:
        layer(x).sum().backward()
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).sum().backward()
    by_operator: dict = {}
    for (operator, _, _), count in seen.counts.items():
        by_operator[operator] = by_operator.get(operator, 0) + count
    assert by_operator[aten.addmm.default] == 1 and by_operator[aten.mm.default] == 2  # dx and dW
    assert by_operator[aten.bmm.default] == 6  # two forward, four backward
    assert 0 < roofline.best_seconds(lambda: layer(x).sum().backward()) < 0.1


def test_operators_are_grouped_by_what_they_do():
    roofline = importlib.import_module("roofline")
    expected = {
        "aten::addmm": "matrix products",
        "aten::baddbmm": "matrix products",
        "aten::_softmax_backward_data": "softmax and loss",
        "aten::silu_backward": "activation",
        "aten::copy_": "copies and casts",
        "aten::mul": "by element",
        "aten::linalg_vector_norm": "sums and norms",
        "aten::view": "host",
        "MmBackward0": "host",
    }
    assert {operator: roofline.group_of(operator) for operator in expected} == expected


@pytest.mark.usefixtures("embedded")
@pytest.mark.slow
def test_roofline_accounts_for_a_step(tmp_path):
    roofline = importlib.import_module("roofline")
    assert roofline.main(["--tiny", "--stage", "sft", "--json", str(tmp_path / "r.json")]) == 0
    (found,) = read(tmp_path / "r.json")["stages"]
    assert found["share"] == pytest.approx(found["ceiling"] / found["step"]["median"])
    alone = sum(row["times"] * row["best_ms"] for row in found["products"]) / 1e3
    assert found["ceiling"] == pytest.approx(alone)
    low_rank = [row for row in found["products"] if any(16 in shape for shape in row["shapes"])]
    assert low_rank and found["groups"]["matrix products"] > 0 and found["groups"]["optimizer"] > 0


# ---------------------------------------------------------------------------------------------- startup


def test_startup_measures_in_fresh_processes(tmp_path, monkeypatch):
    startup = importlib.import_module("startup")
    seconds = startup.importing("json")
    assert 0 <= seconds < 5
    answers = {("torch",): 1.0, ("torch", "transformers"): 1.5, ("isthmus",): 2.5}
    monkeypatch.setattr(startup, "importing", lambda *names: answers[names])
    assert startup.main(["--tiny", "--json", str(tmp_path / "s.json")]) in (0, 1)  # --help is measured here
    found = read(tmp_path / "s.json")
    assert found["seconds"]["import isthmus, own share"]["median"] == pytest.approx(1.0)
    assert found["seconds"]["isthmus --help"]["median"] > 0
    answers["isthmus",] = 9.0
    assert startup.main(["--tiny", "--json", str(tmp_path / "s.json")]) == 1
    assert read(tmp_path / "s.json")["met"]["import isthmus, own share"] is False


# ---------------------------------------------------------------------------------------------- resume


@pytest.mark.slow
def test_resume_goes_on_and_refuses_to_be_slow(tmp_path, monkeypatch):
    resume = importlib.import_module("resume")
    assert resume.main(["--tiny", "--json", str(tmp_path / "r.json")]) == 0
    found = read(tmp_path / "r.json")
    assert found["fresh"]["steps"] == 3 and 0 < found["resumed"]["median"] < resume.TARGET and found["met"]
    monkeypatch.setattr(resume, "TARGET", 0.0)
    monkeypatch.setattr(resume.harness, "child", lambda script, job: {"first step": 1.0, "peak MiB": 1.0, "steps": 1})
    assert resume.main(["--tiny", "--json", str(tmp_path / "r.json")]) == 1


@pytest.mark.slow
def test_streaming_measures_every_kind_of_shard(tmp_path):
    streaming = importlib.import_module("streaming")
    assert streaming.main(["--tiny", "--json", str(tmp_path / "s.json")]) == 0
    found = read(tmp_path / "s.json")
    assert [(one["kind"], one["rows"]) for one in found["results"]] == [(kind, 20_000) for kind in streaming.KINDS]
    for one in found["results"]:  # one in fifty, by its id, is held out
        assert 0.95 * one["rows"] < one["first"]["samples"] == one["resume"]["samples"] < one["rows"]
        assert "own MiB at a tenth" in one["first"].keys() - one["resume"].keys()  # what is known is not read again


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.usefixtures("embedded")
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "sft"])
def test_training_agrees_with_its_peers_and_is_timed(tmp_path, stage):
    pytest.importorskip("trl", reason="the bench extra is not installed")
    train = importlib.import_module("train_vs_peers")
    assert train.main(["--tiny", "--stages", stage, "--repeats", "1", "--json", str(tmp_path / "t.json")]) == 0
    found = read(tmp_path / "t.json")
    checked = found["checks"][stage]
    assert checked["holds"] and len(checked["losses"]["HF Trainer"]) == checked["steps"]
    assert checked["agreements"].keys() == {"TRL", "ours", "ours, cache"}
    (setting,) = found["settings"].values()
    rows = setting["rows"]
    assert all(row["agreement"]["holds"] for row in rows) and {row["batching"] for row in rows} >= {"packed"}
    best = [row["ratio"]["median"] for row in rows if row["side"] == "trainer" and row["dtype"] == "float32"]
    assert max(best) == 1.0
    for row in rows:
        assert len(row["seconds_per_step"][0]) == len(row["losses"]) - 2 and 0 < row["ceiling_share"]["median"] < 1.5


def test_quick_training_changes_only_what_was_not_given():
    train = importlib.import_module("train_vs_peers")
    quick, longer = (train.options_of(["--quick", *more]) for more in ([], ["--lengths", "256", "--steps", "3"]))
    assert (quick.sizes, quick.lengths, quick.steps, quick.repeats) == (["small"], [64], 5, 2)
    assert (longer.sizes, longer.lengths, longer.steps, longer.repeats) == (["small"], [256], 3, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("embedded")
def test_training_quotes_no_speed_when_losses_differ(tmp_path, capsys):
    pytest.importorskip("trl", reason="the bench extra is not installed")
    train = importlib.import_module("train_vs_peers")
    arguments = ["--tiny", "--stages", "align", "--repeats", "1", "--perturb", "0.01"]
    assert train.main([*arguments, "--json", str(tmp_path / "t.json")]) == 1
    found = read(tmp_path / "t.json")
    assert not found["checks"]["align"]["holds"] and found["settings"] == {}
    assert "samples/s" not in (said := capsys.readouterr().out) and "REFUSED" in said


def test_a_variant_that_differs_keeps_its_row_without_a_speed():
    train = importlib.import_module("train_vs_peers")
    variants = [train.BOTH[0], train.BOTH[2]]
    bench = train.Bench.__new__(train.Bench)
    bench.steps, bench.distinct, bench.batch = 6, 3, 2
    bench.made = {"bucketed": {"widths": [4] * 3, "supervised": 9, "tokens": 30}}
    run = {"losses": [2.0] * 6, "seconds": [0.5] * 4, "peak_mib": 100.0, "ceiling_seconds": 0.1}
    runs = iter([run, run | {"losses": [2.0] * 5 + [2.001], "seconds": [0.1] * 4}])
    bench.run = lambda variant, ceiling: next(runs)
    rows = train.measure(bench, variants, 1)
    assert rows[0]["samples_per_second"].median == pytest.approx(2 / 0.5)
    assert rows[0]["supervised_tokens_per_second"].median == pytest.approx(3 / 0.5)
    assert rows[0]["tokens_per_second"].median == pytest.approx(10 / 0.5)
    assert rows[0]["ceiling_share"].median == pytest.approx(0.2)
    assert "ratio" not in rows[1] and "1.0e-03" in rows[1]["refused"]
    assert "refused" in train.lines(rows)[1]


def test_unsorted_and_packed_curves_are_judged_by_the_peer_on_the_same_samples():
    train = importlib.import_module("train_vs_peers")
    variants = [train.BOTH[0], train.UNSORTED[0], train.UNSORTED[3]]
    curves = [[1.0, 1.0], [2.0, 2.0], [2.0, 2.00005]]
    reference, found, tolerance = train._yardstick(variants, curves, variants[2], curves[2])
    assert reference == curves[1] and train.compare(reference, found, tolerance).holds


def test_bfloat16_curves_are_judged_by_each_other_and_by_what_rounding_does_to_the_peer():
    train = importlib.import_module("train_vs_peers")
    variants = [train.BOTH[0], replace(train.BOTH[0], dtype="bfloat16"), replace(train.BOTH[2], dtype="bfloat16")]
    curves = [[1.0, 1.0], [1.0, 1.15], [1.0, 1.28]]
    reference, found, tolerance = train._yardstick(variants, curves, variants[2], curves[2])
    assert reference == curves[1] and tolerance == pytest.approx(0.15)
    assert train.compare(reference, found, tolerance).holds
    assert not train.compare(reference, [1.0, 1.31], tolerance).holds


def test_packing_keeps_every_sample_whole():
    worker = importlib.import_module("train_worker")
    lengths = [5, 2, 3]
    segment = torch.tensor([[1] * n + [0] * (5 - n) for n in lengths])
    ids = torch.arange(15).view(3, 5)
    text = {"ids": ids.clone(), "segment": segment, "modality": segment * 0, "labels": ids.clone()}
    rows, packed = worker.packed(text)
    assert rows == [[0], [2, 1]]
    assert packed["segment"].tolist() == [[1] * 5, [1, 1, 1, 2, 2]]
    assert packed["ids"].tolist() == [[0, 1, 2, 3, 4], [10, 11, 12, 5, 6]]


# ---------------------------------------------------------------------------------------------- demo quality


def short_demo(folder: Path) -> list[str]:
    """Overrides that make the demo a matter of seconds: tiny parts, two steps, eight items."""
    data = "[{name: scenes, limit: 16, options: {size: 32}}]"
    train = "{connectors.*: 1e-3}"
    return [
        f"llm={tiny.llm_folder(folder / 'llm')}",
        f"encoder={{source: {tiny.vision_folder(folder / 'vision')}, aspect: squash}}",
        "aligner.options={}",
        f"stages=[{{name: align, data: {data}, train: {train}, batch_size: 4, budget: {{steps: 2}}}}]",
        "eval=[{name: presence, limit: 8}]",
        "dtype=float32",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("embedded")
def test_demo_quality_runs_and_collects(tmp_path, monkeypatch):
    quality = importlib.import_module("demo_quality")
    (home := tmp_path / "home").mkdir()  # features of throw-away parts stay out of the real one
    for name in ("packages", "converted"):
        (home / name).symlink_to(packages.home() / name)
    monkeypatch.setenv("ISTHMUS_HOME", str(home))
    out, file = tmp_path / "quality", tmp_path / "q.json"
    assert quality.main([*short_demo(tmp_path), "--seeds", "0", "--out", str(out), "--json", str(file)]) == 1
    found = read(file)
    (row,) = found["rows"]
    assert row["label"] == "Presence" and row["n"] == 8 and found["steps"] == [{"align": 2}]
    with pytest.raises(SystemExit, match="no report"):
        quality.main(["--collect", "--seeds", "0", "1", "--out", str(out)])


def report(seed: int, after: float, cosine: float, data_hash: str = "same") -> dict:
    """A report with the four rows that the targets are about."""
    labels = ("easy-VQA, official test", "easy-VQA without yes/no", "Presence", "Naming unseen concepts")
    cells = {"after": {"value": after}, "cosine": {"value": cosine}}
    rows = [
        {"label": label, "unit": "accuracy", "n": 500, "chance": 0.5, "cells": cells, "besides": {}} for label in labels
    ]
    even = {column: {"value": cell["value"] + seed / 10} for column, cell in cells.items()}
    rows[-1]["besides"] = {"no name favoured": even | {"blind": None}}  # an answer was not scored
    return {
        "seed": seed, "data_hash": data_hash, "fingerprint": f"f{seed}", "method": {}, "seconds": {}, "curves": [],
        "rows": rows,
    }  # fmt: skip


def collected(tmp_path: Path, reports: list[dict]) -> dict:
    folders = [tmp_path / f"seed-{place}" for place in range(len(reports))]
    for folder, each in zip(folders, reports):
        folder.mkdir(exist_ok=True)
        (folder / "report.json").write_text(json.dumps(each))
    return importlib.import_module("demo_quality").collect(folders)


def test_demo_quality_interval_and_targets(tmp_path):
    found = collected(tmp_path, [report(0, 0.88, 0.9), report(1, 0.90, 0.9), report(2, 0.92, 0.9)])
    mean = found["rows"][0]["means"]["after"]
    assert mean.value == pytest.approx(0.90)
    assert mean.half_width == pytest.approx(4.3027 * 0.02 / 3**0.5, rel=1e-3)  # by hand: sd .02, t(2) = 4.3027
    assert [each["met"] for each in found["targets"]] == [True, True, True, False]  # .90 is not above .90
    besides = found["rows"][-1]
    assert besides["label"] == "Naming unseen concepts, no name favoured" and [*besides["means"]] == ["after", "cosine"]
    assert besides["means"]["cosine"].seeds == pytest.approx((0.9, 1.0, 1.1))
    apart = besides["above_cosine"]  # paired: what both gain with the seed is not in it
    assert apart.seeds == pytest.approx((-0.02, 0, 0.02)) and apart.half_width == pytest.approx(mean.half_width)
    assert found["targets"][0]["seeds"] == "2 of 3 seeds"


def test_demo_quality_refuses_what_cannot_be_averaged(tmp_path):
    with pytest.raises(SystemExit, match="different test items"):
        collected(tmp_path, [report(0, 0.9, 0.5), report(1, 0.9, 0.5, "other")])
    with pytest.raises(SystemExit, match="same seed"):
        collected(tmp_path, [report(0, 0.9, 0.5), report(0, 0.9, 0.5)])


# ---------------------------------------------------------------------------------------------- every recipe


def outcome(folder: Path, **found) -> Path:
    folder.mkdir(parents=True)
    (folder / "outcome.json").write_text(json.dumps({"recipe": folder.name, **found}))
    return folder


def test_every_recipe_is_on_embedded_parts_and_asks_little():
    every = importlib.import_module("every_recipe")
    names = every.names()
    assert {"demo", "flamingo", "shikra"} <= set(names) and "llava-1.5-7b" not in names
    from isthmus.recipes import named

    (task,) = named("flamingo").override(every.overrides("flamingo")).eval
    assert (task.limit, task.controls) == (every.ITEMS, ())


def test_every_recipe_reads_curves_and_tells_failures(tmp_path):
    every, worker = importlib.import_module("every_recipe"), importlib.import_module("every_worker")
    losses = [4.0, 3.0, *[2.0] * 17, 1.0]
    rows = [{"step": number, "loss": loss, "seconds": 0.5} for number, loss in enumerate(losses, start=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = worker.curve(tmp_path)
    assert found == {"steps": 20, "seconds_per_step": 0.5, "first": 3.5, "last": 1.5}  # two of twenty at either end
    stage = {"stage": "sft", "trained": 500_000, "whole": 100_000_000, **found}
    good = outcome(tmp_path / "good", exit=0, minutes=2.0, stages=[stage], answer={"reply": "red"})
    bad = outcome(tmp_path / "bad", exit=2, minutes=0.1, said="...\nerror: no such thing\nremedy: none\n")
    arguments = ["--collect", "--out", str(tmp_path), "--json", str(tmp_path / "e.json"), "--recipes"]
    assert every.main([*arguments, "good"]) == 0
    assert every.main([*arguments, "good", "bad"]) == 1 and every.main([*arguments, "good", "absent"]) == 1
    told = json.loads((tmp_path / "e.json").read_text())["recipes"]
    assert [each["recipe"] for each in told] == ["bad", "good"], "what an earlier call found of others stays"
    lines = [line for each in every.collect([good, bad]) for line in every.lines(each)]
    assert lines[0] == ["`good`", "sft", "0.50 M (0.50%)", "20", "0.50", "3.50 → 1.50", "yes", "2.0"]
    assert lines[1][0] == "`bad`" and "error: no such thing" in lines[1][5]


@pytest.mark.slow
@pytest.mark.usefixtures("embedded")
def test_every_recipe_trains_loads_and_answers(tmp_path):
    every = importlib.import_module("every_recipe")
    arguments = ["--out", str(tmp_path), "--json", str(tmp_path / "e.json"), "--minutes", "0.1", "--recipes", "llava"]
    assert every.main(arguments) == 0
    (found,) = json.loads((tmp_path / "e.json").read_text())["recipes"]
    assert [stage["stage"] for stage in found["stages"]] == ["warm", "align", "sft"] and found["answer"]["reply"]
    left = (tmp_path / "llava" / "outcome.json").stat().st_mtime_ns
    assert every.main(arguments) == 0 and (tmp_path / "llava" / "outcome.json").stat().st_mtime_ns == left


# ---------------------------------------------------------------------------------------------- plans


def test_fused_attention_has_a_formula(tmp_path):
    plans = importlib.import_module("plan_error")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def count(backend):
        heads = torch.randn(2, 3, 16, 8, requires_grad=True)
        with sdpa_kernel(backend), FlopCounterMode(display=False, custom_mapping=plans.formulas()) as counter:
            torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).sum().backward()
        return counter.get_total_flops()

    product = 2 * 2 * 3 * 16 * 16 * 8
    assert count(SDPBackend.MATH) == 6 * product  # two forward, four backward
    assert count(SDPBackend.FLASH_ATTENTION) == 7 * product  # the scores once more


def test_plans_that_miss_are_told(tmp_path, monkeypatch, capsys):
    plans = importlib.import_module("plan_error")
    plan = {"trained": 100.0, "flops": 1.01e9, "peak": 2**30, "seconds": 0.5}
    was = {"trained": 100.0, "flops": 1e9, "peak": 2**30, "seconds": 1.0}
    monkeypatch.setattr(plans.harness, "child", lambda script, job: dict(plan if job["what"] == "plan" else was))
    assert plans.main(["--cases", "llava:sft", "--json", str(tmp_path / "p.json")]) == 1
    (case,) = read(tmp_path / "p.json")["cases"]
    assert case["met"] == {"trained": True, "flops": True, "peak": True, "seconds": False}
    assert case["errors"]["seconds"] == pytest.approx(-0.5) and "(-50.0% missed)" in capsys.readouterr().out
    plan["seconds"] = 1.2
    assert plans.main(["--cases", "llava:sft", "--json", str(tmp_path / "p.json")]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("embedded")
def test_a_plan_is_held_against_a_run(tmp_path):
    plans = importlib.import_module("plan_error")
    plans.main(["--tiny", "--json", str(tmp_path / "p.json")])
    (case,) = read(tmp_path / "p.json")["cases"]
    assert case["met"]["trained"] and case["was"]["seconds"] > 0
    assert abs(case["errors"]["flops"]) < 0.05  # of two short steps, whose questions are longer or shorter than most
