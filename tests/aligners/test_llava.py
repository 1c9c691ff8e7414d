"""LLaVA's own options: output that leans towards the words which it is like."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import composed
from isthmus import sites
from isthmus.assembly import rejoin
from isthmus.connectors.pool import towards_words
from isthmus.types import ConfigError

WORDS = torch.randn(40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
CENTRE = WORDS.mean(0)


def test_leaning_is_the_mean_of_the_words_directions_by_the_softmax_of_cosines():
    y_NQD = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = towards_words(y_NQD, WORDS, CENTRE, 0.1)
    for vector, leaning in zip(y_NQD.flatten(0, 1), found.flatten(0, 1)):
        cosines = [F.cosine_similarity(vector, word - CENTRE, dim=0) for word in WORDS]
        weights = torch.stack(cosines).div(0.1).exp()
        mean = sum(weight * (word - CENTRE) / (word - CENTRE).norm() for weight, word in zip(weights, WORDS))
        torch.testing.assert_close(leaning, vector / vector.norm() + mean / mean.norm())


def test_a_word_stays_itself_and_what_is_like_it_comes_nearer():
    word = WORDS[7] - CENTRE
    near = word + 0.5 * word.norm() * F.normalize(WORDS[9], dim=0)
    itself, leant = towards_words(torch.stack([word, near])[None], WORDS, CENTRE, 0.01)[0]
    assert F.cosine_similarity(itself, word, dim=0) > 0.999
    assert F.cosine_similarity(leant, word, dim=0) > F.cosine_similarity(near, word, dim=0) + 0.01


def test_a_stage_may_turn_it_on_and_the_model_hands_over_its_own_words():
    plain = composed.model(options={"normalise": True})
    leaning = composed.model(options={"normalise": True})
    rejoin(leaning, {"words": 0.05})
    asked = composed.MIX[0]
    batch = leaning.processor.prompts([asked.but(turns=asked.turns[:1])], None)
    with torch.no_grad():
        before, after = (model.run(batch, need="connected").connected["image"] for model in (plain, leaning))
    joint = plain.connectors["image"]
    expected = towards_words(before - joint.centre, sites.embedding(plain.llm).weight, joint.centre, 0.05)
    torch.testing.assert_close(after, F.rms_norm(expected, expected.shape[-1:]) * joint.scale + joint.centre)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3_text"])
@torch.no_grad()
def test_normalised_output_is_as_large_as_words_are_read(family):
    """Gemma scales what it looks up by the root of its width."""
    model = composed.model(family, options={"normalise": True})
    words = model.llm.get_input_embeddings()(torch.arange(model.vocabulary))
    batch = model.processor.collator()([composed.sample(composed.picture(1), "What?")])
    found = model.run(batch, need="connected").connected["image"]
    spread = (words - words.mean(0)).square().mean().sqrt()
    torch.testing.assert_close((found - words.mean(0)).square().mean().sqrt(), spread, rtol=1e-3, atol=1e-3)


def test_output_that_is_not_normalised_cannot_lean():
    with pytest.raises(ConfigError, match="only normalised output"):
        composed.model(options={"words": 0.05})
