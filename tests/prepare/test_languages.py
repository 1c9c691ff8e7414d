"""Languages are told apart as their speakers would."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest

from isthmus.prepare import filters, languages
from isthmus.types import ConfigError, Image, Sample, Turn

SAID = {
    "en": "A brown dog is running across the green field with a ball in its mouth.",
    "de": "Ein brauner Hund läuft mit einem Ball im Maul über die grüne Wiese.",
    "fr": "Un chien brun court à travers le champ vert avec une balle dans la gueule.",
    "es": "Un perro marrón corre por el campo verde con una pelota en la boca.",
    "ru": "Коричневая собака бежит по зелёному полю с мячом в зубах.",
    "zh": "一只棕色的狗嘴里叼着球在绿色的田野上奔跑。",
    "ja": "茶色い犬がボールをくわえて緑の野原を走っています。",
    "ar": "كلب بني يركض عبر الحقل الأخضر وفي فمه كرة.",
}


def sample(text: str) -> Sample:
    return Sample((Turn.say("user", Image("none.png"), "Was ist das?"), Turn.say("assistant", text)))


@pytest.mark.parametrize("code", SAID)
def test_each_answer_is_in_its_language(code: str) -> None:
    pytest.importorskip("py3langid")
    measure = filters.measure(f"language-{code}", None, None, None)  # type: ignore[arg-type]
    stats = filters.measured(map(sample, [*SAID.values(), "3 + 4 = 7", "A cat."]), {"language": measure})
    assert np.isnan(stats["language"][-2:]).all(), "of a few letters nothing is said, and no rule drops them"
    assert [name for name, number in zip(SAID, stats["language"]) if number > 0.5] == [code]
    rule = filters.Rule.parse(f"language-{code}=0.5..")
    left = filters.kept({rule.operator: stats["language"]}, [rule])
    assert left.numbers.tolist() == [list(SAID).index(code), len(SAID), len(SAID) + 1]


def test_an_unknown_code_and_a_missing_package_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("py3langid")
    with pytest.raises(ConfigError, match="no language is called 'xx'"):
        filters.measure("language-xx", None, None, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no rule is written"):
        filters.Rule.parse("languages=0.5..")
    real = builtins.__import__

    def missing(name: str, *more: Any) -> Any:
        if name.startswith("py3langid"):
            raise ModuleNotFoundError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", missing)
    languages.known.cache_clear()
    with pytest.raises(ConfigError) as error:
        filters.spoken("en")
    assert error.value.remedy == "pip install 'isthmus[language]'"
