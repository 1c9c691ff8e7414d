"""What the drawings show: about a thousand emoji that are pictures of things, their names, and who is held out.

Names are Unicode's, lower-cased and mended where they are clumsy; Unicode never changes them, and every code point
here is known to the oldest supported Python. Skin tones, flags, signs, arrows, shapes, letters, clock faces and
near-duplicate faces are left out.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from functools import cache
from typing import Literal, TypeAlias

Split: TypeAlias = Literal["train", "val", "test", "unseen"]

SKY = "☀☁☃☄☔⚡⛄⛅⛈❄⭐🌀🌁🌂🌃🌄🌆🌇🌈🌉🌊🌋🌌🌍🌙🌛🌝🌞🌟🌠🌡🌤🌧🌨🌩🌪🌫🌬💧🔥🪐"
PLANTS = "☘🌰🌱🌲🌳🌴🌵🌶🌷🌸🌹🌺🌻🌼🌽🌾🌿🍀🍁🍂🍃🍄🎄🎋🎍🏵💐🥀🪴🪵🪷"
FOOD = (
    "☕🍅🍆🍇🍈🍉🍊🍋🍌🍍🍎🍏🍐🍑🍒🍓🍔🍕🍖🍗🍘🍙🍚🍛🍜🍝🍞🍟🍠🍡🍢🍣🍤🍥🍦🍧🍨🍩🍪🍫🍬🍭🍮🍯"
    "🍰🍱🍲🍳🍴🍵🍶🍷🍸🍹🍺🍻🍼🍽🍾🍿🎂🥂🥃🥐🥑🥒🥓🥔🥕🥖🥗🥘🥙🥚🥛🥜🥝🥞🥟🥠🥡🥢🥣🥤🥥🥦🥧🥨"
    "🥩🥪🥫🥬🥭🥮🥯🦪🧀🧁🧂🧃🧄🧅🧆🧇🧈🧉🧊🧋🫐🫑🫒🫓🫔🫕🫖🫗🫘🫙"
)
ANIMALS = (
    "🐀🐁🐂🐃🐄🐅🐆🐇🐈🐉🐊🐋🐌🐍🐎🐏🐐🐑🐒🐓🐔🐕🐖🐗🐘🐙🐚🐛🐜🐝🐞🐟🐠🐡🐢🐣🐤🐦🐧🐨🐩🐪🐫🐬"
    "🐭🐮🐯🐰🐱🐲🐳🐴🐵🐶🐷🐸🐹🐺🐻🐼🐽🐾🐿🕊🕷🦀🦁🦂🦃🦄🦅🦆🦇🦈🦉🦊🦋🦌🦍🦎🦏🦐🦑🦒🦓🦔🦕🦖"
    "🦗🦘🦙🦚🦛🦜🦝🦞🦟🦠🦡🦢🦣🦤🦥🦦🦧🦨🦩🦫🦬🦭🦮🪰🪱🪲🪳🪶🪸"
)
PLACES = "♨⛩⛪⛰⛱⛲⛺🎠🎡🎢🎪🏔🏕🏖🏗🏘🏙🏚🏛🏜🏝🏞🏟🏠🏡🏢🏣🏥🏦🏨🏪🏫🏬🏭🏮🏯🏰💈💒🕋🕌🕍🕎🗻🗼🗽🗿🛕🛖"
VEHICLES = (
    "⛴⛵⛽✈🏍🏎🚀🚁🚂🚃🚅🚆🚇🚈🚉🚊🚋🚌🚍🚎🚏🚐🚑🚒🚓🚔🚕🚖🚗🚘🚙🚚🚛🚜🚝🚞🚟🚠🚡🚢🚤🚥🚦🚧"
    "🚨🚲🛞🛟🛣🛤🛥🛩🛫🛬🛰🛳🛴🛵🛶🛷🛸🛹🛺🛻🛼🦼🦽"
)
FACES = (
    "😀😂😄😅😆😇😈😉😋😌😍😎😏😐😑😒😔😗😘😛😝😟😠😡😢😣😤😧😨😩😪😬😭😮😰😱😳😴😵😶😷😸😹😺"
    "😻😼😽😾😿🙀🙃🙄🤐🤑🤒🤓🤔🤕🤖🤗🤠🤡🤢🤣🤤🤥🤧🤨🤩🤪🤫🤬🤮🤯🥰🥱🥲🥳🥴🥵🥶🥷🥸🥹🥺🧐🫠🫡"
    "🫢🫣🫤"
)
PEOPLE = (
    "☝⛷⛹✊✋✌✍🎅🏂🏃🏄🏇🏊🏋🏌👀👁👂👃👄👅👊👋👌👍👎👏👐👦👧👨👩👪👫👮👯👰👱👲👳👴👵"
    "👶👷👸👹👺👻👼👽👾👿💀💁💂💃💅💆💇💋💏💑💪🕴🕵🕺🖐🖖🙇🙈🙉🙊🙋🙌🙏🚣🚴🚵🚶🛀🤌🤏🤘🤙🤚🤛"
    "🤜🤝🤞🤟🤦🤰🤱🤲🤳🤴🤵🤶🤷🤸🤹🤺🤼🤽🤾🦴🦵🦶🦷🦸🦹🦻🦾🦿🧌🧍🧎🧏🧓🧔🧕🧖🧗🧘🧙🧚🧛🧜"
    "🧝🧞🧟🧠🫀🫁🫂🫃🫅🫦🫰🫱🫲🫳🫴🫵🫶"
)
ACTIVITIES = (
    "♔♕♖♗♘♙⚽⚾⛳⛸🃏🎀🎁🎃🎆🎇🎈🎉🎊🎎🎏🎐🎑🎒🎓🎖🎗🎙🎚🎛🎞🎟🎣🎤🎥🎧🎨🎩🎫🎬🎭🎮🎯🎰"
    "🎱🎲🎳🎵🎷🎸🎹🎺🎻🎼🎽🎾🎿🏀🏅🏆🏈🏉🏏🏐🏑🏒🏓🏸🏹🏺🤿🥁🥄🥅🥇🥈🥉🥊🥋🥌🥍🥎🥏🪀🪁🪂🪃🪄"
    "🪅🪆🪕🪖🪗🪘"
)
THINGS = (
    "⌚⌨⏰⏱⏲⏳☎☠⚒⚓⚔⚖⚗⚙⚜⚰⚱⛏⛑⛓✂✉✏🌭🌮🌯🏷👑👒👓👔👕👖👗👘👙👚👛👜👝👞👟👠👡"
    "👢👣💄💉💊💌💍💎💔💡💣💥💩💬💭💰💳💴💵💶💷💸💺💻💼💽💾💿📀📁📂📃📄📅📇📈📉📊📋📌📍📎📏📐"
    "📑📒📓📔📕📖📗📘📙📚📜📝📞📟📠📡📢📣📦📮📯📰📱📷📸📹📺📻📼📽📿🔊🔋🔌🔍🔏🔐🔑🔒🔔🔖🔦🔧🔨"
    "🔩🔪🔫🔬🔭🔮🔱🕯🕰🕳🕶🕸🕹🖇🖊🖋🖌🖍🖥🖨🖱🖲🖼🗃🗄🗑🗒🗓🗝🗞🗡🗳🗺🚪🚽🚿🛁🛋🛍🛎🛏🛑🛒🛝"
    "🛠🛡🛢🥻🥼🥽🥾🥿🦯🦺🧢🧣🧤🧥🧦🧧🧨🧩🧪🧫🧬🧭🧮🧯🧰🧱🧲🧳🧴🧵🧶🧷🧸🧹🧺🧻🧼🧽🧾🧿🩰🩱🩲🩳"
    "🩴🩸🩹🩺🩻🩼🪑🪒🪓🪔🪙🪚🪛🪜🪝🪞🪟🪠🪡🪢🪣🪤🪥🪦🪧🪨🪩🪪🪫🪬🪹🪺🫧"
)
GROUPS = (SKY, PLANTS, FOOD, ANIMALS, PLACES, VEHICLES, FACES, PEOPLE, ACTIVITIES, THINGS)

MENDED = {
    "☀": "sun",
    "☔": "umbrella in the rain",
    "⚡": "lightning bolt",
    "⛄": "small snowman",
    "⛈": "thunder cloud",
    "⭐": "star",
    "🌊": "wave",
    "🌍": "globe",
    "🌁": "foggy bridge",
    "🌤": "sun with small cloud",
    "🌬": "blowing cloud",
    "🌽": "corn",
    "🌾": "rice plant",
    "🍃": "fluttering leaves",
    "🍆": "eggplant",
    "🍕": "pizza",
    "🍥": "fish cake",
    "🍳": "fried egg in a pan",
    "🥘": "pan of food",
    "🐞": "ladybug",
    "🐪": "camel",
    "🐫": "camel with two humps",
    "🐸": "frog",
    "🐹": "hamster",
    "🐺": "wolf",
    "🐻": "bear",
    "🐼": "panda",
    "🦁": "lion",
    "🦄": "unicorn",
    "🦊": "fox",
    "🦒": "giraffe",
    "🦓": "zebra",
    "🏗": "construction crane",
    "🏘": "row of houses",
    "🏚": "ruined house",
    "🏠": "house",
    "🏮": "paper lantern",
    "🗿": "stone head",
    "⛱": "beach umbrella",
    "🚔": "police car from the front",
    "🚍": "bus from the front",
    "🚖": "taxi from the front",
    "🚘": "car from the front",
    "🚗": "car",
    "🚅": "bullet train",
    "🚛": "truck",
    "🚥": "horizontal traffic light",
    "🚨": "police light",
    "🛫": "airplane taking off",
    "🛬": "airplane landing",
    "🤖": "robot",
    "🎅": "santa claus",
    "☝": "finger pointing up",
    "⛹": "basketball player",
    "👊": "fist",
    "👌": "ok hand",
    "👋": "waving hand",
    "👍": "thumbs up",
    "👎": "thumbs down",
    "👏": "clapping hands",
    "👐": "open hands",
    "👫": "couple holding hands",
    "🌛": "moon with face",
    "👲": "man with a small cap",
    "👽": "alien",
    "💁": "person tipping hand",
    "🕴": "man in a suit",
    "🕵": "detective",
    "🖖": "hand with parted fingers",
    "🤘": "sign of the horns",
    "🤟": "hand with thumb and two fingers up",
    "🤞": "crossed fingers",
    "♔": "chess king",
    "♕": "chess queen",
    "♖": "chess rook",
    "♗": "chess bishop",
    "♘": "chess knight",
    "♙": "chess pawn",
    "🃏": "joker card",
    "🎁": "present",
    "🎃": "halloween pumpkin",
    "🎯": "dartboard",
    "🎱": "billiard ball",
    "🎲": "die",
    "🏀": "basketball",
    "🎧": "headphones",
    "🎿": "skis",
    "🎾": "tennis ball",
    "🏸": "badminton racket",
    "🏓": "table tennis paddle",
    "🏑": "field hockey stick",
    "🏒": "ice hockey stick",
    "🏏": "cricket bat",
    "🥁": "drum",
    "🪅": "piñata",
    "☎": "telephone",
    "⏳": "hourglass",
    "⚗": "distillation flask",
    "✂": "scissors",
    "👒": "hat with a ribbon",
    "👚": "blouse",
    "👞": "leather shoe",
    "👡": "sandal",
    "👢": "boot",
    "💥": "explosion",
    "💡": "light bulb",
    "💻": "laptop",
    "📢": "loudspeaker",
    "📣": "megaphone",
    "🔊": "speaker",
    "🔌": "electric plug",
    "🔍": "magnifying glass",
    "🔦": "flashlight",
    "🔪": "kitchen knife",
    "🔫": "pistol",
    "🔱": "trident",
    "🕶": "sunglasses",
    "🖊": "ballpoint pen",
    "🖋": "fountain pen",
    "🖌": "paintbrush",
    "🖍": "crayon",
    "🖱": "computer mouse",
    "🖼": "framed picture",
    "🗒": "note pad",
    "🗓": "calendar pad",
    "🗡": "dagger",
    "🗳": "ballot box",
    "🛑": "stop sign",
    "🦯": "white cane",
    "🛟": "life buoy",
    "🏵": "rosette",
    "💩": "pile of poo",
    "🦖": "tyrannosaurus",
    "🩸": "drop of blood",
}
"""Names for which Unicode's own is clumsy, dated, or names the character and not the thing."""

SINGULAR_S = {"bus", "cactus", "compass", "fleur-de-lis", "hibiscus", "lotus", "minibus", "octopus", "rhinoceros"} | {
    "abacus",
    "claus",
    "hippopotamus",
    "tennis",
    "trolleybus",
    "tyrannosaurus",
    "virus",
}
"""Nouns that end in s and are one thing."""

MASS = (
    {"bacon", "bread", "broccoli", "butter", "camping", "coral", "corn", "curry", "dango", "food"}
    | {
        "falafel",
        "fire",
        "fog",
        "fondue",
        "garlic",
        "luggage",
        "money",
        "oden",
        "popcorn",
        "rice",
        "salad",
        "spaghetti",
    }
    | {"sushi", "wood", "bowling", "juggling", "handball"}
)
"""Nouns that are neither preceded by an article nor put in the plural."""

IRREGULAR = {
    "child": "children",
    "person": "people",
    "mouse": "mice",
    "ox": "oxen",
    "foot": "feet",
    "tooth": "teeth",
    "knife": "knives",
    "leaf": "leaves",
    "wolf": "wolves",
    "elf": "elves",
    "die": "dice",
    "fish": "fish",
    "sheep": "sheep",
    "deer": "deer",
    "bison": "bison",
    "shrimp": "shrimp",
    "squid": "squid",
    "scarf": "scarves",
    "superhero": "superheroes",
    "tomato": "tomatoes",
    "potato": "potatoes",
    "mango": "mangoes",
    "mosquito": "mosquitoes",
    "volcano": "volcanoes",
    "merperson": "merpeople",
}

LINKS = "of|with|without|from|in|at|and|on|over|taking|tipping|doing|bowing"
"""Words after which a name only qualifies its noun."""


@cache
def names() -> dict[str, str]:
    """Every concept's name by its character, in a fixed order."""
    return {char: MENDED.get(char, unicodedata.name(char).lower()) for group in GROUPS for char in group}


@cache
def concepts(split: Split) -> tuple[str, ...]:
    """Characters of the concepts of a split: a fixed tenth is `unseen`, and the others serve every other split."""
    return tuple(char for char in names() if _held_out(char) == (split == "unseen"))


def _held_out(char: str) -> bool:
    """One concept's fate hangs on itself alone, so that adding others never moves it."""
    return int(hashlib.sha256(f"held out {char}".encode()).hexdigest(), 16) % 10 == 0


def alike(one: str, other: str) -> bool:
    """True if the words of one name are among the other's (`dog`, `dog face`), so that both may be right."""
    words, others = set(one.split()), set(other.split())
    return words <= others or others <= words


def countable(char: str) -> bool:
    """True if several of it can be asked for in plain words: a short name of one thing that has a plural."""
    name = names()[char]
    words = name.split()
    plain = len(words) <= 2 and not head(name)[1] and words[-1] not in {"up", "down"} and not words[-1].endswith("ing")
    return plain and some(name) != name


def head(name: str) -> tuple[str, str]:
    """A name's head and what qualifies it after: `glass`, ` of milk`."""
    before, linked, after = re.fullmatch(rf"(.+?)(?: ({LINKS}) (.+))?", name).groups()  # type: ignore[union-attr]
    return before, f" {linked} {after}" if linked else ""


def some(name: str) -> str:
    """The name as one would list it: `a fox`, `an umbrella`, `grapes`."""
    noun = head(name)[0].split()[-1]
    plural = noun.endswith("s") and not noun.endswith("ss") and noun not in SINGULAR_S
    if plural or noun in MASS or noun in {"men", "women", "people", "dice", "thumbs"}:
        return name
    sounds_open = name[0] in "aeiou" and not name.startswith(("uni", "one", "eu"))
    return f"{'an' if sounds_open or name.startswith(('hour', 'x-')) else 'a'} {name}"


def several(name: str) -> str:
    """The name's plural: `foxes`, `slices of pizza`."""
    whole, rest = head(name)
    *before, noun = whole.split()
    return " ".join([*before, _plural(noun)]) + rest


def _plural(noun: str) -> str:
    if noun.endswith("man"):
        return noun[:-2] + "en"
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun in MASS or (noun.endswith("s") and not noun.endswith("ss") and noun not in SINGULAR_S):
        return noun
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"
