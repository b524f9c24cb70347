"""ROUGE-L: how much of a reference a response says in the same order.

With lcs the length of the longest common subsequence of their words, precision is lcs / words of the response, recall
is lcs / words of the reference, and the score is their harmonic mean (Lin 2004, "ROUGE: A Package for Automatic
Evaluation of Summaries", section 3.1, with beta 1).

Words are lower-cased runs of a-z and 0-9, of which those longer than three characters are stemmed: so does the package
rouge_score (0.1.2) with use_stemmer=True, by which Super-NaturalInstructions, MiniLLM and DistiLLM report. Numbers are
equal to its. Texts in other scripts have no such words, and score 0.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

_WORDS = re.compile(r"[a-z0-9]+")
_SHORT = 3  # characters of words that are not stemmed


def rouge_l(response: str, reference: str) -> float:
    """The F-measure, from 0 to 1; 0 if one of them has no words."""
    mine, theirs = words(response), words(reference)
    if not mine or not theirs:
        return 0.0
    common = lcs_length(mine, theirs)
    return 2 * common / (len(mine) + len(theirs))


def words(text: str) -> list[str]:
    """What is compared of a text."""
    return [word if len(word) <= _SHORT else stem(word) for word in _WORDS.findall(text.lower())]


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table as the bits of one integer.

    Hyyrö 2004, "Bit-Parallel LCS-length Computation Revisited".
    """
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(a)) - 1
    row = every  # bit i is 0 where the length grows with a[i]
    for word in b:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & every
    return len(a) - row.bit_count()


# Porter's steps: endings in the order in which they are looked for, and what takes their place. The first that a word
# has is the only one that is tried.
_STEP_2 = {
    **{"ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble", "alli": "al"},
    **{"entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate", "alism": "al"},
    **{"iveness": "ive", "fulness": "ful", "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble"},
    **{"fulli": "ful", "logi": "log"},
}
_STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
_STEP_4 = dict.fromkeys(
    (
        *("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate"),
        *("iti", "ous", "ive", "ize"),
    ),
    "",
)
_IRREGULAR = {
    **{"skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news"},
    **{"inning": "inning", "innings": "inning", "outing": "outing", "outings": "outing", "canning": "canning"},
    **{"cannings": "canning", "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed"},
}


@functools.lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """A lower-case word without its endings.

    Porter 1980, "An algorithm for suffix stripping", with the changes by which NLTK's `PorterStemmer` differs by
    default: irregular forms, words of two letters, y, and short words in -ies and -ied.
    """
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    word = _step_1(word)
    if word.endswith("alli") and measure(word[:-4]) > 0:  # before (a)bli, and then once more
        word = word[:-2]
    word = _replace(word, _STEP_2, lambda rest, ending: measure(rest + "l" * (ending == "logi")) > 0)
    word = _replace(word, _STEP_3, lambda rest, _: measure(rest) > 0)
    word = _replace(word, _STEP_4, lambda rest, ending: measure(rest) > 1 and (ending != "ion" or rest[-1] in "st"))
    if word.endswith("e") and (measure(word[:-1]) > 1 or (measure(word[:-1]) == 1 and not _is_short(word[:-1]))):
        word = word[:-1]
    if word.endswith("ll") and measure(word[:-1]) > 1:
        word = word[:-1]
    return word


def measure(word: str) -> int:
    """How often a vowel is followed by a consonant."""
    return _shape(word).count("vc")


def _step_1(word: str) -> str:
    """Plurals, -ed and -ing, and y."""
    if word.endswith("ies"):
        word = word[:-1] if len(word) == 4 else word[:-2]
    elif word.endswith("sses"):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]

    if word.endswith("ied"):
        word = word[:-1] if len(word) == 4 else word[:-2]
    elif word.endswith("eed"):
        word = word[:-1] if measure(word[:-3]) > 0 else word
    else:
        ending = next((ending for ending in ("ed", "ing") if word.endswith(ending)), "")
        rest = word.removesuffix(ending)
        if ending and "v" in _shape(rest):
            if rest.endswith(("at", "bl", "iz")):
                rest += "e"
            elif rest[-1:] == rest[-2:-1] and _shape(rest)[-1] == "c":
                rest = rest if rest[-1] in "lsz" else rest[:-1]
            elif measure(rest) == 1 and _is_short(rest):
                rest += "e"
            word = rest

    if word.endswith("y") and len(word) > 2 and _shape(word)[-2] == "c":
        word = word[:-1] + "i"
    return word


def _replace(word: str, endings: dict[str, str], is_allowed: Callable[[str, str], bool]) -> str:
    for ending, instead in endings.items():
        if word.endswith(ending):
            rest = word.removesuffix(ending)
            return rest + instead if is_allowed(rest, ending) else word
    return word


def _shape(word: str) -> str:
    """v for each vowel, c for each consonant. A y is a vowel behind a consonant."""
    shape = ""
    for letter in word:
        is_vowel = letter in "aeiou" or (letter == "y" and shape.endswith("c"))
        shape += "v" if is_vowel else "c"
    return shape


def _is_short(word: str) -> bool:
    """Whether it ends in consonant, vowel and consonant, which is not w, x or y; or is a vowel and a consonant."""
    shape = _shape(word)
    return shape == "vc" or (shape.endswith("cvc") and word[-1] not in "wxy")
