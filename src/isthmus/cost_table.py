"""Parameters, operations and cache of recipes in one table, beside the published figures: docs/costs.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from isthmus import recipes
from isthmus.costs import BEFORE, TEXT, Costs, costs
from isthmus.planning import Plan, plan
from isthmus.recipes.published import FIGURES

TITLES = (
    "recipe",
    "tokens",
    "parameters",
    "trained, of the whole",
    "published",
    "encoder",
    "connector",
    "LLM",
    "LLM, text alone",
    "cache",
    "aside",
    "published cache",
)


@dataclass(frozen=True)
class Row:
    """One recipe."""

    plan: Plan
    costs: Costs

    def plain(self) -> dict[str, Any]:
        """As plain values, with the sums."""
        return asdict(self.plan) | {
            "total": self.plan.total,
            "image": asdict(self.costs) | {"total": self.costs.total, "kept": self.costs.kept},
        }

    def cells(self) -> list[str]:
        """Under `TITLES`."""
        return [*counted(self.plan), *operations(self.costs), *kept(self.costs, self.plan.recipe)]


def row(name: str) -> Row:
    """The row of a recipe of the book."""
    recipe = recipes.named(name)
    return Row(plan(recipe.but(name=name)), costs(recipe))


def counted(planned: Plan) -> list[str]:
    """The columns of parameters."""
    stages = "<br>".join(
        f"{stage.name}: {amount(stage.trained)} ({stage.trained / planned.total:.2%})" for stage in planned.stages
    )
    figure = FIGURES.get(planned.recipe)
    said = "—" if figure is None else f"≈ {figure.trained} ({figure.evidence})"
    tokens = ", ".join(str(tokens) for tokens in planned.tokens.values())
    return [f"`{planned.recipe}`", tokens, amount(planned.total), stages or "—", said]


def operations(cost: Costs) -> list[str]:
    """The columns of a prefill's operations, in GFLOP."""
    return [f"{flops / 1e9:,.1f}" for flops in (cost.encoder, cost.joint, cost.llm, cost.text_only)]


def kept(cost: Costs, name: str) -> list[str]:
    """The columns of what stays in memory for one picture, in MiB."""
    figure = FIGURES.get(name)
    return [f"{cost.cache / 2**20:,.2f}", f"{cost.aside / 2**20:,.2f}", "—" if figure is None else figure.cache]


def amount(parameters: int) -> str:
    """1,234,567,890 is 1.235 B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.4g} {unit}"
    return str(parameters)


def published() -> Iterator[str]:
    """Names of the recipes in their authors' size: those whose LLM is described inline."""
    return (name for name, build in recipes.BOOK.items() if build().llm.architecture is not None)


def page() -> str:
    """The whole of docs/costs.md."""
    return "\n".join([HEAD.format(text=TEXT, before=BEFORE), *table(map(row, published())), ""])


def table(rows: Iterable[Row]) -> Iterator[str]:
    """The lines of a table."""
    yield f"| {' | '.join(TITLES)} |"
    yield "|---" * len(TITLES) + "|"
    for each in rows:
        yield f"| {' | '.join(each.cells())} |"


HEAD = """# What the joints train and cost

Written by `isthmus plan --all --write`; do not edit it by hand. Nothing here is measured in seconds, and no weights are
read: models are composed on the meta device, counted, and run there.

These are the recipes in their authors' sizes; `isthmus plan --all` prints those on the embedded parts too, and
`isthmus plan RECIPE` one recipe part by part.

- **trained**: parameters that each stage trains, and their share of the whole model.
- **published**: the authors' figure, and whether it is from their `paper` or `code` or worked out from the `sizes` that
  they give.
- **encoder, connector, LLM**: GFLOP up to the first answered token for one picture and {text} text tokens, {before} of
  them before it; 2 operations per multiply-add, attention counted densely. What a joint skips is not counted, and what
  it computes twice is. **LLM, text alone**: the same prompt without the picture.
- **cache**: MiB of keys and values that the picture adds to the LLM's cache in bfloat16; **aside**: MiB of vectors that
  the joint keeps beside it. Published caches are those of a 4,096 wide LLM of 32 layers.
"""
