"""Questions about scenes, with their answers, read off the scene's description.

Training draws the wording of each question from several; every other split uses the first, so that scores compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from isthmus.data.boxes import Decimals
from isthmus.data.concepts import names, several, some
from isthmus.data.scenes import COLOURS, Placed, Scene, pick
from isthmus.types import Box, Grounding, Part, Text

NUMBERS = ("zero", "one", "two", "three", "four", "five")
YES_NO = ("yes", "no")
HERE = "<here>"
"""Where a question points at its region."""
WORDINGS = {
    "naming": (
        "What is this?",
        "Name this.",
        "What do you see?",
        "What does the picture show?",
        "Which thing is shown here?",
    ),
    "options": (
        "Which of these is it: {0}?",
        "Which of these do you see: {0}?",
        "What is this, one of {0}?",
        "Which one does the picture show: {0}?",
    ),
    "checklist": (
        "Which of these does the picture show?",
        "Which of these can you see?",
        "Say of each thing whether it is in the picture.",
        "Check what the picture shows.",
    ),
    "presence": (
        "Does the picture show {0}?",
        "Can you see {0}?",
        "Do you see {0} in the picture?",
        "Is it true that the picture shows {0}?",
    ),
    "counting": (
        "How many {0} are there?",
        "Count the {0}.",
        "How many {0} do you see?",
        "What is the number of {0} in the picture?",
    ),
    "colour": (
        "What color is the background?",
        "Which color does the background have?",
        "Name the color of the background.",
    ),
    "relation": (
        "Is the {0} {2} the {1}?",
        "In the picture, is the {0} {2} the {1}?",
        "Is it true that the {0} is {2} the {1}?",
    ),
    "place": (
        "Where is the {0}, {2} or {3} the {1}?",
        "Is the {0} {2} or {3} the {1}?",
        "Seen from the {1}, where is the {0}, {2} or {3} it?",
    ),
    "refer": (
        "Where is the {0}?",
        "Find the {0}.",
        "Show me the {0}.",
        "In which region is the {0}?",
    ),
    "region": (
        "What is at {0}?",
        "Name what is at {0}.",
        "Which thing is at {0}?",
    ),
    "names": (
        "Name everything in the picture.",
        "Which things are in the picture?",
        "List what you see.",
    ),
    "caption": (
        "Describe the picture.",
        "What is in the picture?",
        "Write a caption for the picture.",
        "Tell me what you see.",
    ),
}


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    choices: tuple[str, ...] = ()
    """What likelihood ranking chooses from; none for a caption."""
    box: Box | None = None
    """A region that the answer is, or that stands in the question in place of `HERE`."""
    filled: tuple[Text, ...] = ()
    """The answer in parts, where some of it is given and not learnt."""

    @property
    def asked(self) -> tuple[Part | str, ...]:
        """The user's words, and regions among them."""
        if self.box is None:
            return (self.text,)
        before, here, after = self.text.partition(HERE)
        return (before, self.box, after) if here else (self.text, Grounding())

    @property
    def told(self) -> tuple[Part | str, ...]:
        """The assistant's words, or a region."""
        return self.filled or (self.answer if self.box is None or HERE in self.text else self.box,)


@dataclass(frozen=True)
class Asker:
    """Asks about one scene; `pool` are the concepts of its split, of which absent ones are drawn."""

    scene: Scene
    pool: Sequence[str]
    main: str
    """The concept that counting asks for; it may be absent."""
    varied: bool
    """Whether the wording is drawn, or the first."""

    def ask(self, kind: str, number: int = 0) -> Question:
        """The scene's question of one kind, or another one of that kind."""
        return _KINDS[kind](self, Random(f"{kind} {number or ''}{self.scene.seed}"))

    def _naming(self, random: Random) -> Question:
        """With an article, so that the name is written as within a sentence: tokenizers care."""
        answer, choices = self._ten(random)
        return Question("naming", self._word(random, "naming"), answer, choices)

    def _options(self, random: Random) -> Question:
        """Naming with the ten names in the question."""
        answer, choices = self._ten(random)
        return Question("options", self._word(random, "options", enumerate_words(choices, "or")), answer, choices)

    def _ten(self, random: Random) -> tuple[str, tuple[str, ...]]:
        """What the only object is, and ten names with that among them."""
        char = self.scene.objects[0].char
        choices = [some(names()[each]) for each in (char, *pick(random, self.pool, 9, but=(char,)))]
        answer = choices[0]
        random.shuffle(choices)
        return answer, tuple(choices)

    def _checklist(self, random: Random) -> Question:
        """Everything that is there among about as many other things, each with yes or no, which alone are learnt.

        A yes or no takes a third of the tokens that it takes as a question of its own.
        """
        present = tuple(self.scene.counts)
        absent = pick(random, self.pool, random.randint(1, 2 * len(present) - 1), but=present)
        listed = random.sample([*present, *absent], len(present) + len(absent))
        parts: list[Text] = []
        for char in listed:
            parts.append(Text(("\n" if parts else "") + some(names()[char]) + "\n", given=True))
            parts.append(Text(YES_NO[char not in present]))
        text = self._word(random, "checklist")
        return Question("checklist", text, "".join(part.text for part in parts), filled=tuple(parts))

    def _presence(self, random: Random) -> Question:
        present = tuple(self.scene.counts)
        answer = random.choice(YES_NO)
        (char,) = [random.choice(present)] if answer == "yes" else pick(random, self.pool, 1, but=present)
        return Question("presence", self._word(random, "presence", some(names()[char])), answer, YES_NO)

    def _counting(self, random: Random) -> Question:
        text = self._word(random, "counting", several(names()[self.main]))
        return Question("counting", text, NUMBERS[self.scene.counts.get(self.main, 0)], NUMBERS)

    def _colour(self, random: Random) -> Question:
        colour = self.scene.background.colour
        return Question("colour", self._word(random, "colour"), colour, tuple(COLOURS))

    def _relation(self, random: Random) -> Question:
        """Half of them yes/no, half a choice between two places."""
        one, other, true, false = self._pair(random)
        if random.random() < 0.5:
            answer = random.choice(YES_NO)
            asked = phrase(true if answer == "yes" else false)
            text = self._word(random, "relation", one.name, other.name, asked)
            return Question("relation", text, answer, YES_NO)
        choices = ("left", "right") if true in {"left", "right"} else ("above", "below")
        text = self._word(random, "place", one.name, other.name, choices[0], phrase(choices[1]))
        return Question("relation", text, true, choices)

    def _refer(self, random: Random) -> Question:
        """Where one of several different things is."""
        thing, xyxy = random.choice(self.scene.boxes)
        box = Box(xyxy, f"the {thing}")
        return Question("refer", self._word(random, "refer", thing), Decimals().write([box]), box=box)

    def _region(self, random: Random) -> Question:
        """What is in a region, one of ten names, among them all that are in the picture."""
        thing, xyxy = random.choice(self.scene.boxes)
        present = tuple(self.scene.counts)
        others = pick(random, self.pool, 10 - len(present), but=present)
        choices = [names()[each] for each in (*present, *others)]
        random.shuffle(choices)
        return Question("region", self._word(random, "region", HERE), thing, tuple(choices), Box(xyxy))

    def _names(self, random: Random) -> Question:
        """With articles, so that each name is written as within a sentence: tokenizers care."""
        listed = ", ".join(some(names()[char]) for char in self.scene.counts)
        return Question("names", self._word(random, "names"), listed)

    def _caption(self, random: Random) -> Question:
        listed = [
            some(names()[char]) if count == 1 else f"{NUMBERS[count]} {several(names()[char])}"
            for char, count in self.scene.counts.items()
        ]
        colour = self.scene.background.colour
        answer = f"{enumerate_words(listed)} on {some(colour)} background"
        if len(self.scene.counts) == len(self.scene.objects) > 1:
            one, other, true, _ = self._pair(random)
            answer += f"; the {one.name} is {phrase(true)} the {other.name}"
        return Question("caption", self._word(random, "caption"), f"{answer[0].upper()}{answer[1:]}.")

    def _pair(self, random: Random) -> tuple[Placed, Placed, str, str]:
        """Two objects that the layout separates, where the first is from the second, and the opposite of that."""
        one, other = random.sample(self.scene.objects, 2)
        (row, column), (other_row, other_column) = one.cell, other.cell
        axes = []
        if column != other_column:
            axes.append(("left", "right") if column < other_column else ("right", "left"))
        if row != other_row:
            axes.append(("above", "below") if row < other_row else ("below", "above"))
        return one, other, *random.choice(axes)

    def _word(self, random: Random, kind: str, *parts: str) -> str:
        wordings = WORDINGS[kind]
        return (random.choice(wordings) if self.varied else wordings[0]).format(*parts)


def phrase(place: str) -> str:
    """`left of`, `above`."""
    return f"{place} of" if place in {"left", "right"} else place


def enumerate_words(words: Sequence[str], link: str = "and") -> str:
    """`a fox`, `a fox and a key`, `a fox, a key and two hats`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {link} {words[-1]}"


_KINDS: dict[str, Callable[[Asker, Random], Question]] = {
    "naming": Asker._naming,
    "options": Asker._options,
    "checklist": Asker._checklist,
    "presence": Asker._presence,
    "counting": Asker._counting,
    "colour": Asker._colour,
    "relation": Asker._relation,
    "refer": Asker._refer,
    "region": Asker._region,
    "names": Asker._names,
    "caption": Asker._caption,
}
