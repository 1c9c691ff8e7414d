"""Not a number in any module, forward or backward, is traced to that module; the batch that did it is kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from isthmus.aligner import JOINTS
from isthmus.aligners.llava import LLaVA
from isthmus.cli import app
from isthmus.config import Engine, Recipe
from isthmus.model import VLM
from isthmus.training import optimizer
from isthmus.training.checkpoint import MOMENTS, damage
from isthmus.training.finite import Fault, in_modules, unsound
from isthmus.training.loop import run_stage
from isthmus.training.optimizer import choose
from isthmus.training.step import Step, held_out
from isthmus.types import Batch, NotFinite

TRAIN = {"connectors.*": 1e-2, "encoders.*layers.0.*": 1e-3, "llm.*v_proj": {"mode": {"r": 2}, "lr": 1e-3}}
NAN = float("nan")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return small.parts(tmp_path_factory.mktemp("parts")).override(["encoder.layer=-1"])  # every layer is read


@pytest.fixture(scope="module")
def step(recipe: Recipe) -> Step:
    made = small.stage(train=TRAIN)
    step = Step(small.build(recipe), made.objectives)
    choose(step, made)
    step.ready()
    return step


def work(step: Step) -> Callable[[], object]:
    """Forward and backward of one batch."""
    batch = small.Colours(step.vlm)(0, 0)

    def again() -> None:
        step.zero_grad()
        step(batch, step.scales([batch]))[0].backward()

    return again


def found(step: Step) -> Fault:
    fault = in_modules(step, work(step))
    assert fault is not None
    return fault


def used(step: Step) -> dict[str, bool]:
    """Every module that runs in a step, and whether a gradient reaches its output."""
    seen: dict[str, bool] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = isinstance(output, Tensor) and output.requires_grad

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in step.named_modules() if name]
    work(step)()
    for handle in handles:
        handle.remove()
    return seen


def test_a_sound_step_has_no_fault(step: Step) -> None:
    assert in_modules(step, work(step)) is None


def test_weights_of_each_module_in_turn(step: Step) -> None:
    modules = dict(step.named_modules())
    names = [name for name in used(step) if list(modules[name].parameters(recurse=False))]
    assert len(names) > 30 and {name.split(".")[1] for name in names} == {"encoders", "connectors", "llm"}
    for name in names:
        weight = next(modules[name].parameters(recurse=False))
        kept = weight.detach().clone()
        weight.data.fill_(NAN)
        fault = found(step)
        weight.data.copy_(kept)
        first = "vlm.llm.model.embed_tokens" if name == "vlm.llm.lm_head" else name  # tied: the embedding is read first
        assert fault.module == first and fault.tensor.startswith(f"the weight {first}."), name


def test_activations_of_each_module_in_turn(step: Step) -> None:
    names = list(used(step))
    assert {"vlm.connectors.image", "vlm.llm.model.layers.1", "vlm.llm.model.layers.1.mlp.up_proj"} <= set(names)

    def poison(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output * NAN
        if isinstance(output, tuple):
            return output[0] * NAN, *output[1:]
        for key in ("last_hidden_state", "x_NSE"):
            if hasattr(output, key):
                setattr(output, key, getattr(output, key) * NAN)
        return output

    for name in names:
        handle = step.get_submodule(name).register_forward_hook(poison)
        fault = found(step)
        handle.remove()
        assert fault == Fault(f"the output of {name}", name)


def test_gradients_of_each_module_in_turn(step: Step) -> None:
    unread = "vlm.encoders.image.tower.post_layernorm"  # the joint reads the state in front of it
    names = [name for name, reached in used(step).items() if reached and name != unread]
    assert len(names) > 30

    def poison(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * NAN)

    for name in names:
        handle = step.get_submodule(name).register_forward_hook(poison)
        fault = found(step)
        handle.remove()
        assert fault.tensor == f"the gradient that reaches the output of {fault.module}"
        assert fault.module == name or fault.module == last_inside(step, name), name


def last_inside(step: Step, name: str) -> str:
    """The innermost module whose output is the very tensor that `name` returns."""
    children = [child for child, _ in step.get_submodule(name).named_children() if child != "grafts"]
    return last_inside(step, f"{name}.{children[-1]}") if children else name


class Bad(torch.autograd.Function):
    """The identity with a backward that divides by zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / 0


def test_a_faulty_backward_is_told_from_its_neighbours(step: Step) -> None:
    class Activation(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Bad.apply(nn.functional.silu(x))

    mlp = step.vlm.llm.model.layers[1].mlp
    kept, mlp.act_fn = mlp.act_fn, Activation()
    fault = found(step)
    mlp.act_fn = kept
    name = "vlm.llm.model.layers.1.mlp.act_fn"
    assert fault == Fault(f"the gradient that comes out of {name}", name)


@pytest.mark.slow
def test_compiled_layers_are_looked_into(recipe: Recipe) -> None:
    made = small.stage(train=TRAIN)
    step = Step(small.build(recipe), made.objectives)
    choose(step, made)
    step.ready()
    torch._dynamo.reset()
    step.compile("eager")
    work(step)()
    assert in_modules(step, work(step)) is None
    next(step.vlm.llm.model.layers[1].mlp.up_proj.parameters()).data.fill_(NAN)
    assert found(step).module == "vlm.llm.model.layers.1.mlp.up_proj"


# ---------------------------------------------------------------------------------------------- in a run


def refusal(vlm: VLM, folder: Path, **stage: Any) -> tuple[NotFinite, dict[str, Any]]:
    """What a run of one step says, and what it writes down."""
    made = small.stage(train=TRAIN, **stage)
    feed = small.Colours(vlm, micros=made.accumulate)
    with pytest.raises(NotFinite) as error:
        run_stage(vlm, made, feed, folder, steps=1, console=small.quiet())
    return error.value, json.loads((folder / "bad_batch.json").read_text())


@pytest.mark.parametrize("recompute", [False, True])
def test_a_run_stops_names_the_module_and_keeps_its_weights(recipe: Recipe, tmp_path: Path, recompute: bool) -> None:
    vlm = small.build(recipe)
    before = small.weights(vlm)

    def poison(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * NAN)

    vlm.llm.model.layers[1].mlp.up_proj.register_forward_hook(poison)
    error, note = refusal(vlm, tmp_path, recompute=recompute)
    assert note["module"] == "vlm.llm.model.layers.1.mlp.up_proj" and note["step"] == 1
    assert error.cause.startswith("step 1: ") and note["tensor"] in error.cause
    after = small.weights(vlm)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_batches_are_kept_as_they_were(recipe: Recipe, tmp_path: Path) -> None:
    vlm = small.build(recipe)
    next(vlm.connectors.parameters()).data.fill_(NAN)
    error, note = refusal(vlm, tmp_path, accumulate=2)
    feed = small.Colours(vlm, micros=2)
    kept = load_file(tmp_path / "bad_batch.safetensors")
    for number, batch in enumerate((feed(0, 0), feed(0, 1))):
        assert torch.equal(kept[f"{number}.input_ids_BT"], batch.input_ids_BT)
        assert torch.equal(kept[f"{number}.labels_BT"], batch.labels_BT)
        assert torch.equal(kept[f"{number}.media.image.pixels"], batch.media["image"].pixels)
        assert note["samples"][number] == list(batch.ids)
    assert "bad_batch.safetensors" in error.remedy


def test_the_normal_path_has_no_hooks(recipe: Recipe, tmp_path: Path) -> None:
    vlm = small.build(recipe)
    validate = held_out([small.Colours(vlm)(50, 0)])
    run_stage(vlm, small.stage(), small.Colours(vlm), tmp_path, steps=2, validate=validate, console=small.quiet())
    hooks = [hook for m in vlm.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [hook for hook in hooks if hook.__module__.startswith("isthmus")]


# ---------------------------------------------------------------------------------------------- an update


def broken_run(
    recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str = "exp_avg", at: int = 3, **stage: Any
) -> NotFinite:
    """What a run of six steps says one of whose moments overflows in front of a step."""
    vlm, optimizers, real = small.build(recipe), list[torch.optim.Optimizer](), optimizer.adamw

    class Breaking(small.Colours):
        def __call__(self, step: int, micro: int) -> Batch:
            if step == at:
                next(iter(optimizers[0].state.values()))[moment].fill_(torch.inf)
            return super().__call__(step, micro)

    def adamw(*arguments: Any) -> torch.optim.AdamW:
        optimizers.append(real(*arguments))
        return optimizers[0]  # type: ignore[return-value]

    engine, validate = Engine(keep=1), held_out([small.Colours(vlm)(50, 0)])
    common = {"validate": validate, "console": small.quiet(), "engine": engine}
    with monkeypatch.context() as patch, pytest.raises(NotFinite) as error:
        patch.setattr(optimizer, "adamw", adamw)
        run_stage(vlm, small.stage(**stage), Breaking(vlm), folder, steps=6, **common)  # type: ignore[arg-type]
    return error.value


def kept(folder: Path) -> list[str]:
    """The checkpoints of a stage, of which all have to be sound and finite."""
    found = sorted((folder / "checkpoints").glob("*"))
    for checkpoint in found:
        assert damage(checkpoint) is None
        for file in checkpoint.glob("*.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(file).values()), file
    return [checkpoint.name for checkpoint in found]


@pytest.mark.parametrize("evaluate_every", [None, 1 / 6])
def test_weights_that_an_update_breaks_replace_no_checkpoint(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluate_every: float | None
) -> None:
    more = {"save_every": 1 / 6, "evaluate_every": evaluate_every}
    error = broken_run(recipe, tmp_path / "broken", monkeypatch, **more)
    first = next(name for name, _ in small.build(recipe).named_parameters() if name.startswith("connectors."))
    assert error.cause == f"step 4: vlm.{first} is not finite after the update" and error.code == 4
    assert "step-0000003" in kept(tmp_path / "broken") and not (tmp_path / "broken" / "model").exists()
    assert error.remedy.endswith("; this step is not saved, and no earlier checkpoint is touched")
    assert not any(name.endswith("4") for name in kept(tmp_path / "broken"))

    def whole(folder: Path) -> dict[str, Tensor]:
        vlm = small.build(recipe)
        validate = held_out([small.Colours(vlm)(50, 0)])
        made, feed = small.stage(**more), small.Colours(vlm)
        run_stage(vlm, made, feed, folder, steps=6, validate=validate, console=small.quiet())
        return small.weights(vlm)

    resumed = whole(tmp_path / "broken")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole(tmp_path / "good").items())


def test_weights_that_the_last_update_breaks_are_not_handed_over(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = broken_run(recipe, tmp_path, monkeypatch, at=5)
    assert error.cause.startswith("step 6: vlm.connectors.") and kept(tmp_path) == []
    assert not (tmp_path / "model").exists()


def test_moments_that_are_broken_behind_sound_weights_are_not_saved(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An infinite second moment makes updates of nothing, for ever."""
    error = broken_run(recipe, tmp_path, monkeypatch, "exp_avg_sq", save_every=1 / 6)
    assert error.cause.startswith("step 4: the moment exp_avg_sq of vlm.connectors.")
    assert "step-0000003" in kept(tmp_path)


def test_a_mask_of_minus_infinity_beside_trained_weights_is_no_fault(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Masked(LLaVA):
        def connector(self, kind: str, encoder: Any, width: int) -> Any:
            made = super().connector(kind, encoder, width)
            linear = next(each for each in made.modules() if isinstance(each, torch.nn.Linear))
            linear.register_buffer("mask", torch.full((2, 2), -torch.inf))
            return made

    monkeypatch.setitem(JOINTS.registered, "masked", Masked)
    vlm = small.build(recipe.but(aligner="masked"))
    run_stage(vlm, small.stage(save_every=0.5), small.Colours(vlm), tmp_path, steps=2, console=small.quiet())
    saved = sorted((tmp_path / "checkpoints").glob("*/trainable.safetensors"))
    assert any(name.endswith("mask") for name in load_file(saved[-1]))


def test_weights_that_are_found_broken_in_the_next_step_are_not_said_to_be_saved(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = broken_run(recipe, tmp_path, monkeypatch, save_every=0.5)
    assert error.cause.startswith("step 5: the weight vlm.connectors.") and (tmp_path / "bad_batch.json").is_file()
    assert error.remedy.endswith("; the weights of step 4 are broken too, and not saved")
    assert kept(tmp_path) == ["step-0000003"]


def test_weights_are_said_to_be_saved_where_there_are_some(recipe: Recipe, tmp_path: Path) -> None:
    for bad, saved in ((0, False), (2, True)):
        vlm = small.build(recipe)

        class Poisoned(small.Colours):
            def __call__(self, step: int, micro: int, bad: int = bad) -> Batch:
                batch = super().__call__(step, micro)
                if step == bad:
                    batch.media["image"].pixels.fill_(NAN)
                return batch

        with pytest.raises(NotFinite) as error:
            run_stage(vlm, small.stage(), Poisoned(vlm), tmp_path / f"{bad}", steps=6, console=small.quiet())
        assert error.value.remedy.endswith("; a checkpoint of step 2 is saved") == saved
        assert kept(tmp_path / f"{bad}") == ["step-0000002"] * saved


def test_what_is_not_finite_is_found_among_all_kinds_of_tensors() -> None:
    huge, counts = torch.full((9,), 3e38), torch.arange(3)
    sound = {"a.safetensors": {"huge": huge, "none": torch.empty(0), "counts": counts, "half": huge.bfloat16()}}
    assert unsound(sound) is None and unsound({}) is None
    for bad in (NAN, torch.inf, -torch.inf):
        for dtype in (torch.float32, torch.bfloat16):
            tensor = torch.ones(3, 5, dtype=dtype)
            tensor[1, 4] = bad
            assert unsound({**sound, "b.safetensors": {"x": huge, "y": tensor, "z": tensor}}) == "y"
            assert unsound({MOMENTS: {"exp_avg/y": tensor}}) == "the moment exp_avg of y"


# ---------------------------------------------------------------------------------------------- a validation


def test_a_picture_of_a_validation_that_is_no_number_is_named_and_kept(recipe: Recipe, tmp_path: Path) -> None:
    vlm = small.build(recipe)
    feed = small.Colours(vlm)
    batches = [feed(number, 0) for number in (50, 51, 52)]
    for batch in batches[1:]:
        batch.media["image"].pixels[2].fill_(NAN)
    with pytest.raises(NotFinite) as error:
        run_stage(vlm, small.stage(), feed, tmp_path, steps=3, validate=held_out(batches), console=small.quiet())
    tensor = f"a value in the pixels of image 3 (sample {batches[1].ids[2]})"
    cause = f"step 3: the validation loss is not finite; the first such tensor is {tensor}"
    assert error.value.cause == cause and error.value.remedy.endswith("; a checkpoint of step 3 is saved")
    note = json.loads((tmp_path / "bad_batch.json").read_text())
    assert note == {"step": 3, "tensor": tensor, "module": None, "samples": [list(batches[1].ids)]}
    pixels = load_file(tmp_path / "bad_batch.safetensors")["0.media.image.pixels"]
    torch.testing.assert_close(pixels, batches[1].media["image"].pixels, rtol=0, atol=0, equal_nan=True)
    assert kept(tmp_path) == ["step-0000003"]


def test_a_module_that_fails_in_a_validation_alone_is_named(recipe: Recipe, tmp_path: Path) -> None:
    vlm = small.build(recipe)
    feed = small.Colours(vlm)

    def poison(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return None if torch.is_grad_enabled() else output * NAN

    vlm.llm.model.layers[1].mlp.up_proj.register_forward_hook(poison)
    with pytest.raises(NotFinite) as error:
        validate = held_out([feed(50, 0)])
        run_stage(vlm, small.stage(), feed, tmp_path, steps=3, validate=validate, console=small.quiet())
    name = "vlm.llm.model.layers.1.mlp.up_proj"
    assert error.value.cause.endswith(f"the first such tensor is the output of {name}")
    assert json.loads((tmp_path / "bad_batch.json").read_text())["module"] == name
    assert not [hook for m in vlm.modules() for hook in m._forward_pre_hooks.values()]


def test_the_exit_code_is_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise NotFinite("step 3: the weight vlm.x is not finite", "look")

    monkeypatch.setattr(app, "app", fail)
    monkeypatch.setattr(sys, "argv", ["isthmus"])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert stop.value.code == 4 and "vlm.x is not finite" in capsys.readouterr().err
