"""The ALBEF-like recipe and its ablations: what each leaves out and what trains."""

from __future__ import annotations

import pytest

from isthmus import planning
from isthmus.config import Recipe
from isthmus.recipes import BOOK
from isthmus.recipes.albef import albef


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("albef", {"itc": 0.4, "itm": None, "mlm": 0.4}),
        ("albef-without-momentum", {"itc": None, "itm": None, "mlm": None}),
        ("albef-fusion-alone", {"itm": None, "mlm": 0.4}),
    ],
)
def test_ablations_leave_out_what_they_say(name: str, terms: dict[str, float | None]) -> None:
    recipe = BOOK[name]()
    first, *rest = recipe.stages
    assert {term.name: term.options.get("alpha") for term in first.objectives} == terms
    assert recipe.name == name and rest == list(BOOK["blip2"]().stages[1:])
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_fusion_alone_trains_all_but_what_contrast_would() -> None:
    both, alone = (planning.plan(albef(contrast=contrast)) for contrast in (True, False))
    assert both.tokens == {"image": 9}
    heads = 2 * 256 * (192 + 1) + 1
    assert both.stages[0].trained - alone.stages[0].trained == heads
