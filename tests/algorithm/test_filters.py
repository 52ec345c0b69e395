import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_lightning.algorithm import QualityFilters, is_repetitive, is_unreadable, keep_groups


def test_repetition_by_hand():
    assert is_repetitive([1, 2] * 10, n=2, count=10)
    assert not is_repetitive([1, 2] * 9 + [1], n=2, count=10)
    assert is_repetitive([7] * 29)  # overlapping: ten windows of twenty
    assert not is_repetitive([7] * 28)
    assert not is_repetitive([])
    assert not is_repetitive(list(range(5000)))
    with pytest.raises(ValueError, match="at least 1"):
        is_repetitive([1], n=0)


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_repetition_against_a_slow_one(ids, n, count):
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    assert is_repetitive(ids, n, count) == any(grams.count(gram) >= count for gram in grams)


READABLE = [
    "",
    "<action> go to desk 1 </action>",
    "naïve café, déjà vu — “quoted”, it’s… 20 °C, £5, ½ · 3 µm ©",
    "CAFÉ’S “ÉTÉ” « À LA CARTE » PÂTÉ",
    "São Paulo, AMANHÃ, «IRMû, IRMÃ… “MANHÔ, ÂNGULO",
    "IRMò, PÂ° (a note to a word in capitals)",
    "Ärger, Straße, Übergrößenträger, ÖL–GAS",
    "Žluťoučký kůň, ŽIŽKOVŠTÍ, ÍŠÍ",
    "Việt Nam, đường, Ân, CẦN; Română: Înţelegere, MÂINE",
    "Привет, мир! Ελληνικά, שלום, مرحبا, हिन्दी",
    "你好,世界。こんにちは 안녕하세요",
    "emoji 🙂🚀, arrows → ←, math ∑ x² ≤ ∞, ’ … € ™",
    "Icelandic: það er gott, ÐÓRA; Danish: blåbærgrød Ål",
    "tabs\tand\nnewlines\r\nnext\u0085line",
]


@pytest.mark.parametrize("text", READABLE)
def test_ordinary_text_is_readable(text):
    assert not is_unreadable(text)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
@pytest.mark.parametrize(
    "text",
    [
        "café",
        "it’s",
        "“so”",
        "garçon",
        "20 °C",
        "£5",
        "naïve",
        "straße",
        "información",
        "à la",
        "🙂",
        "Привет, мир",
        "你好吗世界",
        "año",
    ],
)
def test_utf8_read_in_the_wrong_encoding_is_unreadable(text, encoding):
    raw = text.encode()
    try:
        garbled = raw.decode(encoding)
    except UnicodeDecodeError:  # bytes that Windows-1252 leaves undefined
        garbled = "".join(bytes([b]).decode("cp1252") if b not in b"\x81\x8d\x8f\x90\x9d" else chr(b) for b in raw)
    assert is_unreadable(garbled)


@pytest.mark.parametrize("text", ["a \ufffd b", "Ã©", "doesnâ€™t", "\x9d", "ï»¿start"])
def test_signs_of_broken_text(text):
    assert is_unreadable(text)


def test_keep_groups_by_hand():
    stds, groups = [0.5, 2.0, 0.0, 1.0], [10, 11, 12, 13]
    assert keep_groups(stds, groups, 0.75) == {10, 11, 13}
    assert keep_groups(stds, groups, 0.5) == {11, 13}
    assert keep_groups(stds, groups, 1.0) == {10, 11, 13}  # no deviation, no signal
    assert keep_groups(stds, groups, 0.1) == {11}  # one at least
    assert keep_groups([0.0, 1e-17], [1, 2], 1.0) == set()
    assert keep_groups([], [], 0.75) == set()
    assert keep_groups([2.0, 1.0], [10, 11], 0.5, of=4) == {10, 11}  # two others are known to have no deviation


def test_ties_go_to_the_smaller_group_whatever_the_order():
    assert keep_groups([1.0, 1.0, 1.0, 1.0], [3, 1, 0, 2], 0.75) == {0, 1, 2}
    assert keep_groups([1.0, 2.0, 1.0, 1.0], [1, 9, 0, 2], 0.5) == {0, 9}


def test_the_share_is_not_lost_to_rounding():
    assert len(keep_groups([1.0] * 100, list(range(100)), 0.29)) == 29  # 0.29·100 = 28.999999999999996


@pytest.mark.parametrize("share", [0.0, 1.1, -1.0])
def test_bad_share(share):
    with pytest.raises(ValueError, match="keep_share"):
        keep_groups([1.0], [0], share)
    with pytest.raises(ValueError, match=r"QualityFilters\.keep_share"):
        QualityFilters(keep_share=share)


OFF = QualityFilters(overlong=False, incomplete=False, repetitive=False, unreadable=False)


def test_each_filter_alone():
    good = {"ids": [1, 2, 3], "text": "look", "finish": "stop", "has_action": True}
    bad = {
        "overlong": {"finish": "length"},
        "incomplete": {"has_action": False},
        "repetitive": {"ids": [1] * 40},
        "unreadable": {"text": "\ufffd"},
    }
    assert QualityFilters().hits(**good) == frozenset()
    for name, change in bad.items():
        assert QualityFilters().hits(**(good | change)) == {name}
        assert QualityFilters(**{name: False}).hits(**(good | change)) == frozenset()
        assert OFF.hits(**(good | change)) == frozenset()
    assert QualityFilters().hits([1] * 40, "\ufffd", "length", False) == set(bad)


def test_a_tool_call_makes_a_turn_complete():
    assert QualityFilters().hits([1], "x", "stop", has_action=False, tool_call=True) == frozenset()
