"""ROUGE-L against values worked out by hand, and those of rouge_score 0.1.2 (use_stemmer=True) with NLTK 3.10.4."""

from __future__ import annotations

import random

import pytest

from kdtune.evaluation.rouge import lcs_length, rouge_l, stem, words


def test_by_hand() -> None:
    # The longest common subsequence of "the gunman kill polic" is "the gunman": 2 of 4 and of 4 words.
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert rouge_l("police kill the gunman", "police killed the gunman") == 1
    assert rouge_l("a b", "a c d e") == pytest.approx(2 * (1 / 2) * (1 / 4) / (1 / 2 + 1 / 4))
    assert rouge_l("", "a") == rouge_l("a", "...") == rouge_l("你好", "你好") == 0
    assert words("It's 1,000 APPLES, isn't it?") == ["it", "s", "1", "000", "appl", "isn", "t", "it"]


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("The cat sat on the mat.", "A cat is sitting on the mats", 0.6153846153846153),
        (
            "Running quickly, the organization's leaders happily agreed",
            "leader of organizations ran; agreement was happy",
            0.13333333333333333,
        ),
        ("It is 42, exactly 42.", "exactly 42", 0.5714285714285715),
        ("über naïve café", "uber naive cafe", 0.0),
        ("flying flies tied ties relational conditional", "fly flied tie tied relate condition", 0.8333333333333334),
    ],
)
def test_values_of_rouge_score(response: str, reference: str, expected: float) -> None:
    assert rouge_l(response, reference) == pytest.approx(expected, rel=1e-12)


STEMS = {
    **{"caresses": "caress", "ponies": "poni", "ties": "tie", "flies": "fli", "died": "die", "agreed": "agre"},
    **{"plastered": "plaster", "motoring": "motor", "sing": "sing", "conflated": "conflat", "troubled": "troubl"},
    **{"hopping": "hop", "falling": "fall", "filing": "file", "happy": "happi", "enjoy": "enjoy", "spy": "spi"},
    **{"relational": "relat", "radically": "radic", "hopefully": "hope", "geology": "geolog", "rate": "rate"},
    **{"electrical": "electr", "adjustable": "adjust", "replacement": "replac", "adoption": "adopt"},
    **{"probate": "probat", "controlling": "control", "generally": "gener", "yesterday": "yesterday"},
    **{"skies": "sky", "dying": "die"},
}


def test_stems_are_those_of_nltk() -> None:
    assert {word: stem(word) for word in STEMS} == STEMS


def test_common_subsequences() -> None:
    """Against the table that defines them."""
    draw = random.Random(0)
    for _ in range(200):
        a, b = ([draw.choice("abcd") for _ in range(draw.randrange(90))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert lcs_length(a, b) == table[-1][-1]
