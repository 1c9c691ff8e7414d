"""Published metrics against hand calculations, and against what the official code gave for a small corpus."""

from __future__ import annotations

import pytest

from isthmus.evaluation.metrics import captions, documents, judgements, options, vqa

CORPUS = [
    ("a red cat sits on the mat", ["a red cat sits on a mat", "the cat is on the mat"]),
    ("two dogs run", ["two dogs are running in the grass", "dogs run", "a pair of dogs runs"]),
    ("the sky is blue", ["a big tree under a blue sky", "a tree"]),
    ("a small bird with a big beak", ["a small bird with a big beak"]),
]


def split():
    return [said.split() for said, _ in CORPUS], [[text.split() for text in texts] for _, texts in CORPUS]


@pytest.mark.parametrize("same, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_by_how_many_of_ten_people_agree(same, score):
    assert vqa.accuracy("Yes.", ["yes"] * same + ["no"] * (10 - same)) == pytest.approx(score)


@pytest.mark.parametrize(
    "said, even",
    [
        ("The cat.", "cat"),
        ("two  dogs", "2 dogs"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("dont", "don't"),
        ("hello!", "hello"),
        ("U.S.A.", "usa"),
        ("line\none", "line 1"),
        ("A", "a"),
        ("?", "?"),
        ("", ""),
    ],
)
def test_vqa_normalisation(said, even):
    assert vqa.normalise(said) == even


@pytest.mark.parametrize("reply", ["", "the", "?", "an"])
@pytest.mark.parametrize("people", [["A"] * 10, ["A"] * 5 + ["a b"] * 5, ["+"] * 10])
def test_a_reply_of_nothing_is_not_what_people_said(reply, people):
    assert vqa.accuracy(reply, people) == 0


@pytest.mark.parametrize(
    "said, answers, score",
    [
        ("Invoice  12 ", ["invoice 12"], 1),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("kitten", ["dog", "mitten"], 1 - 1 / 6),
        ("12", ["13"], 0.5),  # a half is kept
        ("123", ["456"], 0),
        ("abc", ["axyz"], 0),  # three of four letters differ
        ("", ["a"], 0),
        ("a c", ["a  b"], 0.75),  # of four letters before blanks are evened out
    ],
)
def test_anls_by_hand(said, answers, score):
    assert documents.anls(said, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    "said, answer, right",
    [
        ("105", "100", True),
        ("94.9", "100", False),
        ("-0.96", "-1", True),
        ("1", "-1", False),
        ("5.1%", "0.05", True),
        ("5", "5%", False),
        ("0", "0", True),
        ("0.001", "0", False),
        ("Blue", "blue", True),
        ("blue.", "blue", False),
        ("5", "inf", False),
        ("about 100", "100", False),
    ],
)
def test_relaxed_accuracy_by_hand(said, answer, right):
    assert documents.relaxed(said, answer) is right


def test_pope_of_a_model_that_always_agrees():
    rates = judgements.pope([True] * 4, [True, False, True, False])
    shares = {name: sum(hit for _, hit in counted) / len(counted) for name, counted in rates.items()}
    assert shares == {"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": pytest.approx(2 / 3), "yes": 1}
    precision, recall = shares["precision"], shares["recall"]
    assert shares["f1"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_a_reply_that_is_neither_yes_nor_no_is_wrong_and_not_yes():
    rates = judgements.pope([None, None], [True, False])
    assert not any(hit for counted in rates.values() for _, hit in counted)
    assert rates["precision"] == [] and len(rates["accuracy"]) == 2


@pytest.mark.parametrize(
    "reply, said",
    [
        ("Yes, there is", True),
        ("no", False),
        ("There is not", False),
        ("yes and no", None),
        ("Yes or no?", None),
        ("nobody", None),
        ("Yes, there is no doubt", True),
        ("Yes, a cat is there, not a dog", True),
        ("No, but yes to the dog", False),
        ("**No**", False),
        ("ＹＥＳ", True),
        ("Well, yes, there is no doubt", None),
        ("", None),
    ],
)
def test_judgements_are_whole_words(reply, said):
    assert judgements.judgement(reply) is said


def test_mme_adds_questions_and_pictures():
    assert judgements.mme([(True, False)]) == [50]
    assert judgements.mme([(True, True)] * 3) == [200] * 3
    assert sum(judgements.mme([(True, True), (False, True)])) / 2 == pytest.approx(75 + 50)
    with pytest.raises(ValueError, match="two questions"):
        judgements.mme([(True,)])


@pytest.mark.parametrize(
    "reply, place",
    [
        ("A", 0),
        ("a", 0),
        ("A.", 0),
        ("Answer: A", 0),
        ("The answer is: A", 0),
        ("The correct option is A", 0),
        ("Option A", 0),
        ("(B) dog", 1),
        ("The answer is C", 2),
        ("cat", 0),
        ("It is a dog.", 1),
        ("the red cat", 2),
        ("I think it is B", 1),
        ("A dog", 1),
        ("Answer: A dog", 1),
        ("The answer is A because it has whiskers", 0),
        ("It is A", 0),
        ("I would say A.", 0),
        ("A, because it has whiskers", 0),
        ("A picture of something", None),
        ("A or B", None),
        ("Both A and C", None),
        ("cat or dog", None),
        ("(A) or (B)", None),
        ("Answer: E", None),
        ("", None),
        ("b", 1),
        ("b.", 1),
        ("b)", 1),
        ("(b)", 1),
        ("**b**", 1),
        ("Ｂ", 1),
        ("b. the small one", 1),
        ("I say (b), the small one", 1),
        ("answer b", 1),
        ("The answer is (b)", 1),
        ("the answer is option b.", 1),
        ("The answer is a.", 0),
        ("The answer is a dog", 1),
        ("The answer is a small one", None),
        ("Option A is wrong. The answer is B.", 1),
        ("Option A is wrong, option B is right.", None),
        ("a small one", None),
        ("e.g. the small one", None),
        ("the object(s)", None),
    ],
)
def test_which_option_a_reply_names(reply, place):
    assert options.chosen(reply, ["cat", "dog", "red cat"]) == place


@pytest.mark.parametrize("given", ["-5 5", "カラス ガラス", "कील काला", "< >", "F F++ F#", "1 1.5 15", "? !"])
def test_options_that_differ_in_a_mark_or_a_symbol_are_told_apart(given):
    named = given.split()
    assert [options.chosen(name, named) for name in named] == list(range(len(named)))


def test_rotations_put_every_option_everywhere():
    turned = options.rotations(["cat", "dog", "owl"])
    assert [each[0] for each in turned] == ["cat", "dog", "owl"]
    assert all(sorted(each) == ["cat", "dog", "owl"] for each in turned)
    assert options.listed(turned[1]) == "A. dog\nB. owl\nC. cat"


def test_circular_wants_every_rotation():
    assert options.circular([[True] * 4, [True, True, True, False]]) == [True, False]


# What pycocoevalcap 1.2 gives for CORPUS; `benchmarks/captions_vs_coco.py` compares on many more.
OFFICIAL = {
    "bleu": [0.904762, 0.863191, 0.801994, 0.765782],
    "rouge": [0.857143, 0.829932, 0.173295, 1.0],
    "cider": [4.996136, 1.980551, 0.593632, 10.0],
}


def test_captions_are_scored_as_the_official_code_does():
    said, texts = split()
    assert [captions.bleu(said, texts, n) for n in (1, 2, 3, 4)] == pytest.approx(OFFICIAL["bleu"], abs=1e-5)
    assert [captions.rouge_l(*pair) for pair in zip(said, texts)] == pytest.approx(OFFICIAL["rouge"], abs=1e-5)
    assert captions.cider(said, texts) == pytest.approx(OFFICIAL["cider"], abs=1e-5)


def test_a_copied_reference_is_the_best_caption():
    said, texts = split()
    copies = [each[0] for each in texts]
    assert captions.bleu(copies, texts) == pytest.approx(1)
    assert sum(captions.cider(copies, texts)) > sum(captions.cider(said, texts))
    others = copies[1:] + copies[:1]
    assert sum(captions.cider(others, texts)) < sum(captions.cider(copies, texts))


def test_cider_of_one_picture_is_refused():
    said, texts = split()
    with pytest.raises(ValueError, match="several"):
        captions.cider(said[:1], texts[:1])


def test_tokens_are_lower_case_words_without_punctuation():
    assert captions.tokens("A man's dog isn't here, but 2,000 well-fed cats are!") == (
        ["a", "man", "'s", "dog", "is", "n't", "here", "but", "2,000", "well-fed", "cats", "are"]
    )
