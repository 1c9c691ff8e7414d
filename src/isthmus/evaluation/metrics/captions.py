"""BLEU, ROUGE-L and CIDEr-D of captions against several references, as COCO's caption evaluation defines them.

Papineni et al. 2002; Lin 2004; Vedantam et al. 2015, arXiv 1411.5726. Official code: tylin/coco-caption, packaged as
pycocoevalcap, which these are compared with (`benchmarks/captions_vs_coco.py`).

Differs: `tokens` is a regular expression in place of Stanford's PTB tokeniser, which needs Java; quote figures with
that said. METEOR and SPICE need Java throughout and are left out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Words: TypeAlias = Sequence[str]
Vector: TypeAlias = Mapping[tuple[str, ...], float]
LONGEST = 4
"""n-grams of one to four words."""
SIGMA = 6.0
"""CIDEr-D's tolerance for differences in length."""
BETA = 1.2
"""How much more recall weighs in ROUGE-L."""
_WORD = re.compile(r"\w+(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|(?:\w\.){2,}|\w+(?:[-./,:]\w+)*|[$%&#@]")


def tokens(caption: str) -> list[str]:
    """Lower-case words without punctuation, contractions split (`isn't` is `is`, `n't`), hyphens kept."""
    return _WORD.findall(caption.lower().replace("’", "'"))


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]], longest: int = LONGEST) -> float:
    """Corpus BLEU in [0, 1]: clipped precisions of 1- to `longest`-grams, brevity by the nearest reference's length."""
    counts = (bleu_counts(*pair, longest) for pair in zip(candidates, references, strict=True))
    return bleu_of([sum(column) for column in zip(*counts)])


def bleu_counts(words: Words, texts: Sequence[Words], longest: int = LONGEST) -> list[int]:
    """What BLEU sums over captions: n-grams that are right and n-grams that are said, for each n, and both lengths."""
    hits, guesses = [0] * longest, [0] * longest
    most: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        most |= _counts(text, longest)
    for gram, count in _counts(words, longest).items():
        guesses[len(gram) - 1] += count
        hits[len(gram) - 1] += min(count, most[gram])
    meant = min((len(text) for text in texts), key=lambda length: (abs(length - len(words)), length))
    return [*hits, *guesses, len(words), meant]


def bleu_of(counts: Sequence[float]) -> float:
    """BLEU of the sums of `bleu_counts`."""
    *grams, said, meant = (float(count) for count in counts)
    longest = len(grams) // 2
    hits, guesses = grams[:longest], grams[longest:]
    if not all(hits):
        return 0.0
    precision = math.exp(sum(math.log(hit / guess) for hit, guess in zip(hits, guesses)) / longest)
    return precision * (1.0 if said >= meant else math.exp(1 - meant / said))


def rouge_l(candidate: Words, references: Sequence[Words]) -> float:
    """F of the longest common subsequence, precision and recall each the best over the references."""
    common = [(_common(candidate, text), len(text)) for text in references]
    precision = max((length / len(candidate) for length, _ in common), default=0.0) if candidate else 0.0
    recall = max((length / total for length, total in common if total), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def cider(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each candidate, times ten as usual; papers print its mean times 100.

    n-grams weigh by how few pictures' references hold them, so that the value depends on the whole corpus.

    Raises:
        ValueError: fewer than two pictures, where every weight would be zero.
    """
    if len(candidates) < 2:
        raise ValueError("CIDEr weighs n-grams by how rare they are among pictures, and needs several of them")
    held = Counter(gram for texts in references for gram in {g for text in texts for g in _counts(text, LONGEST)})
    total = math.log(len(references))

    def vector(words: Words) -> Vector:
        return {gram: n * (total - math.log(max(1, held[gram]))) for gram, n in _counts(words, LONGEST).items()}

    return [
        10 * sum(_likeness(vector(words), vector(text), words, text) for text in texts) / len(texts)
        for words, texts in zip(candidates, references, strict=True)
    ]


def _likeness(said: Vector, meant: Vector, words: Words, text: Words) -> float:
    """Clipped cosine, the mean over the lengths of n-grams, less the more the lengths differ."""
    dots, ours, theirs = [0.0] * LONGEST, [0.0] * LONGEST, [0.0] * LONGEST
    for gram, weight in said.items():
        dots[len(gram) - 1] += min(weight, meant.get(gram, 0.0)) * meant.get(gram, 0.0)
        ours[len(gram) - 1] += weight**2
    for gram, weight in meant.items():
        theirs[len(gram) - 1] += weight**2
    cosines = (dot / math.sqrt(a * b) if a and b else 0.0 for dot, a, b in zip(dots, ours, theirs))
    # the official code measures length in bigrams
    apart = max(len(words) - 1, 0) - max(len(text) - 1, 0)
    return sum(cosines) / LONGEST * math.exp(-(apart**2) / (2 * SIGMA**2))


def _counts(words: Words, longest: int) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[start : start + n]) for n in range(1, longest + 1) for start in range(len(words) - n + 1)
    )


def _common(one: Words, other: Words) -> int:
    """Length of the longest common subsequence."""
    before = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for place, against in enumerate(other):
            row.append(before[place] + 1 if word == against else max(row[place], before[place + 1]))
        before = row
    return before[-1]
