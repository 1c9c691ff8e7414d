"""BLEU, ROUGE-L and CIDEr of ours against pycocoevalcap's on random captions; both tokenisers where Java is there.

    pip install pycocoevalcap && python benchmarks/captions_vs_coco.py [--steps PICTURES] [--json FILE]

Captions of scenes are references; candidates are these with words exchanged, left out, or another picture's. Scores
must agree to 1e-6, or the exit code is 1. With Java, PTB's tokens of the same captions are compared with ours.
"""

from __future__ import annotations

import random
import shutil
import sys

from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

import harness
from isthmus.evaluation.metrics import captions

NOUNS = ["cat", "dog", "bird", "tree", "boat", "kettle", "man's", "umbrella", "well-known", "clock"]
PLACES = ["on the mat", "under a tree", "beside the U.S. flag", "at 3:30", "in front of a shop", "that isn't there"]


def caption(dice: random.Random) -> str:
    """A sentence with what tokenisers stumble over."""
    end = dice.choice([".", "!", "", ", and it rains."])
    return f"{dice.choice(['A', 'The', 'Two'])} {dice.choice(NOUNS)} {dice.choice(PLACES)}{end}"


def spoil(words: list[str], dice: random.Random) -> list[str]:
    """Some words exchanged, some left out."""
    kept = [word for word in words if dice.random() > 0.15] or words[:1]
    return [dice.choice(kept) if dice.random() < 0.15 else word for word in kept]


def main() -> int:
    options = harness.parser(__doc__, 200, "pictures, each with one to five references").parse_args()
    pictures = 20 if options.tiny else options.steps
    dice = random.Random(0)
    texts = [[caption(dice) for _ in range(dice.randint(1, 5))] for _ in range(pictures)]
    references = [[captions.tokens(text) for text in each] for each in texts]
    said = [
        spoil(dice.choice(references[dice.randrange(len(texts))] if dice.random() < 0.3 else each), dice)
        for each in references
    ]

    known = {place: [" ".join(words) for words in each] for place, each in enumerate(references)}
    asked = {place: [" ".join(words)] for place, words in enumerate(said)}
    bleu = BleuScorer(n=4)
    for place in known:
        bleu += (asked[place][0], known[place])
    theirs = bleu.compute_score(option="closest", verbose=0)[0]
    apart = {
        "BLEU": max(abs(captions.bleu(said, references, n + 1) - theirs[n]) for n in range(4)),
        "ROUGE-L": _apart(
            [captions.rouge_l(*pair) for pair in zip(said, references)], Rouge().compute_score(known, asked)[1]
        ),
        "CIDEr": _apart(captions.cider(said, references), Cider().compute_score(known, asked)[1]),
    }
    found = {"pictures": pictures, "largest_difference": apart, "same_tokens": _same_tokens(texts)}
    for name, value in apart.items():
        print(f"{name}: largest difference {value:.1e}")
    if found["same_tokens"] is not None:
        print(f"captions with the very tokens of PTB: {found['same_tokens']:.1%}")
    harness.save("captions_vs_coco", found, options)
    return int(max(apart.values()) > 1e-6)


def _apart(ours: list[float], theirs: list[float]) -> float:
    return max(abs(float(a) - float(b)) for a, b in zip(ours, theirs, strict=True))


def _same_tokens(texts: list[list[str]]) -> float | None:
    """Share of captions that PTB's tokeniser splits as ours does; None without Java."""
    if shutil.which("java") is None:
        return None
    flat = [text for each in texts for text in each]
    theirs = PTBTokenizer().tokenize({place: [{"caption": text}] for place, text in enumerate(flat)})
    same = [theirs[place][0].split() == captions.tokens(text) for place, text in enumerate(flat)]
    return sum(same) / len(same)


if __name__ == "__main__":
    sys.exit(main())
