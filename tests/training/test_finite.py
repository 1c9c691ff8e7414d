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

from isthmus.cli import app
from isthmus.config import Recipe
from isthmus.model import VLM
from isthmus.training.finite import Fault, in_modules
from isthmus.training.loop import run_stage
from isthmus.training.optimizer import choose
from isthmus.training.step import Step
from isthmus.types import NotFinite

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
    run_stage(vlm, small.stage(), small.Colours(vlm), tmp_path, steps=2, console=small.quiet())
    hooks = [hook for m in vlm.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [hook for hook in hooks if hook.__module__.startswith("isthmus")]


def test_the_exit_code_is_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise NotFinite("step 3: the weight vlm.x is not finite", "look")

    monkeypatch.setattr(app, "app", fail)
    monkeypatch.setattr(sys, "argv", ["isthmus"])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert stop.value.code == 4 and "vlm.x is not finite" in capsys.readouterr().err
