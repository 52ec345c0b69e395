"""The words that rewards are made of: the nouns of a product's title, and colours by their plain names."""

from __future__ import annotations

import re
from functools import lru_cache


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


COLORS = tuple(
    sorted(
        _words("""
    alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel camo
    caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream crystal
    dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather indigo ivory
    ivy khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor
    mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand
    sapphire seashell silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet walnut
    wheat white wine yellow
    """)
    )
)
"""Names that stand for a colour in WebShop; the first one that occurs in an option's value takes its place."""

_NOT_NOUNS = _words(
    """
    a about above across after against all along also although always an and another any anti are around as at away back
    be because been before behind being below beneath beside between beyond both but by can could did do does down
    during each either else every few for from further had has have he her here hers him his how i if in inside into is
    it its itself just less like many may me might mini more most much must my near neither never no non nor not of off
    often on once one only onto or other our out outside over own per please plus re same self several shall she should
    since so some such than that the their them then there these they this those three through throughout till to
    together too toward two under until up upon us very via was we were what when where which while who whom whose why
    will with within without would yes yet you your
    add adds allow allows apply applies bring brings built buy choose come comes compare ensure ensures fit fits get
    gets give gives go goes help helps hold holds include includes keep keeps last lasts let lets look looks made make
    makes need needs prevent prevents protect protects provide provides put reduce reduces remove removes replace
    replaces say says support supports take takes want wants
    available best better big bigger bright casual cheap classic clean clear cold cool cozy cute daily dark deep
    different double dry durable dual easy elegant empty extra fast few fine flat free fresh full functional fuzzy
    general genuine good great happy hard heavy high hot huge ideal intense invisible large larger latest lightweight
    little local long loose low lower main major medium mild modern multi narrow natural new nice normal old open
    original outdoor perfect personal plain portable premium pretty professional proof proper pure quick quiet rare raw
    real regular rich right round safe sexy sharp short simple single slim slow small smaller smart smooth soft solid
    special square stainless standard sticky strong super sweet tall thick thin tight tiny tough traditional true
    ultimate unique universal upper vegan versatile vertical vintage warm waterproof wet whole wide wireless young
    """
)
_ENDINGS = ("able", "ible", "ful", "less", "ous", "ously", "ly", "ish")
_PARTICIPLE = re.compile(r"[^e]ed$")
_NOUNS_IN_SPITE = _words(
    """
    assembly bed belly bleed body breed butterfly cable dish doily family feed finish fish fly
    hundred jelly lily molly polish ply radish reed relish reply rubbish sable seed shed sled speed supply table
    unisex vegetable wed weed
    """
)
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
