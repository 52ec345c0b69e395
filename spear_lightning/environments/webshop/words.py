"""The words that rewards are made of: the nouns of a product's title, and colours by their plain names."""

from __future__ import annotations

import re
from functools import lru_cache

from spear_lightning.utils.package_data import read_yaml

_DATA = read_yaml(__name__, "words.yaml")
COLORS: tuple[str, ...] = tuple(_DATA["colors"])
"""Names that stand for a colour in WebShop; the first one that occurs in an option's value takes its place."""

_NOT_NOUNS = frozenset((*_DATA["function_words"], *_DATA["verbs"], *_DATA["adjectives"]))
_ENDINGS = tuple(_DATA["endings"])
_PARTICIPLE = re.compile(r"[^e]ed$")
_NOUNS_IN_SPITE = frozenset(_DATA["nouns_in_spite"])
_TOKEN = re.compile(r"[^\W\d_](?:[.'’]?[^\W\d_])*\.?")
_HAS_DIGIT = re.compile(r"\d")
_SPLIT = re.compile(r"[\s\-–—/,;:()\[\]{}|&+\"“”!?*#]+")


def normalize_color(text: str) -> str:
    """The plain name of the colour in an option's value (``"dusty navy 2"`` → ``"navy"``), else the value itself."""
    return next((color for color in COLORS if color in text), text)


@lru_cache(maxsize=65_536)
def nouns(title: str) -> tuple[str, ...]:
    """The nouns of a title, in lower case, in order and with repetitions.

    The original asks a statistical tagger, which takes most words of a title for names. This is a rule in its place: a
    word counts unless it has a digit, is a function word, a common adjective or verb, or ends like an adjective,
    adverb or participle.

    Args:
        title: a product's name.
    """
    found = []
    for piece in _SPLIT.split(title):
        if _HAS_DIGIT.search(piece):
            continue
        match = _TOKEN.search(piece)
        if match is None:
            continue
        word = match[0].lower().replace("’", "'").removesuffix("'s")
        if word.count(".") < 2:  # "D.o.n." keeps its dots, the end of a sentence does not
            word = word.rstrip(".")
        if _is_noun(word):
            found.append(word)
    return tuple(found)


def _is_noun(word: str) -> bool:
    if word in _NOUNS_IN_SPITE:
        return True
    if word in _NOT_NOUNS:
        return False
    return len(word) < 5 or not (word.endswith(_ENDINGS) or _PARTICIPLE.search(word))
