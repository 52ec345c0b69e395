"""Which turns and groups are fit to learn from (§1.3, Dr.BoT). Filtered turns still count in their group's baseline."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from spear_lightning.utils.ranges import Share, in_range

# Rewards are of order 0.01 at least, so a smaller deviation than this is rounding.
ZERO_DEVIATION = 1e-9


def is_repetitive(ids: Sequence[int] | npt.NDArray[Any], n: int = 20, count: int = 10) -> bool:
    """Whether some n-gram of tokens occurs at least ``count`` times (overlapping occurrences counted).

    Args:
        ids: generated token ids, ``(tokens,)``.
        n: length of the n-gram.
        count: number of occurrences that is too many.

    Raises:
        ValueError: ``n`` or ``count`` below 1.
    """
    if n < 1 or count < 1:
        raise ValueError(f"is_repetitive needs n and count of at least 1, not n={n}, count={count}")
    tokens = np.ascontiguousarray(ids, dtype=np.int64)
    windows = len(tokens) - n + 1
    if windows < count:
        return False
    data, width = tokens.tobytes(), tokens.itemsize
    grams = Counter(data[start * width : (start + n) * width] for start in range(windows))
    return max(grams.values()) >= count


# UTF-8 read as Latin-1 or Windows-1252 leaves a lead letter followed by symbols that no language puts there. A symbol
# that can rightly follow a capital letter (closing quotes, dashes) only counts where the letter stands inside a word.
_SYMBOL = "\u00a1-\u00aa\u00ac-\u00ba\u00bc-\u00bf"  # Latin-1 symbols without guillemets
_TYPOGRAPHIC = "\u00a0\u00ab\u00bb€‚ƒ„…†‡ˆ‰‹‘’“”•–—˜™›"
_UNREADABLE = re.compile(
    "|".join(
        (
            "\ufffd",  # what a decoder puts for bytes it cannot read
            "[\u0080-\u0084\u0086-\u009f]",  # C1 controls (not NEL): UTF-8 read as Latin-1
            "â€|ðŸ|ï»¿|ï¿½",  # punctuation, emoji, byte order mark, U+FFFD itself, each read as Windows-1252
            f"(?<![A-ZÀ-Þ])[ÂÃ][{_SYMBOL}\u00a0]",  # é, £, °: a lone Ã or Â, or one after a lower-case letter
            f"[a-zß-ÿ][ÂÃ][{_TYPOGRAPHIC}ŠšŒœŽžŸ]",  # ß, À and the like within a word
            f"(?:[Â-ß][{_SYMBOL}{_TYPOGRAPHIC}]){{3}}",  # three letters of Cyrillic, Greek, Hebrew, Arabic
            f"[ã-ï][{_SYMBOL}]{{2}}",  # Chinese, Japanese, Korean
        )
    )
)


def is_unreadable(text: str) -> bool:
    """Whether a text holds the replacement character, control characters or mojibake (UTF-8 read in a wrong encoding).

    A heuristic that errs on the side of readable: ordinary text of any language, with accents, typographic quotes or
    emoji, is readable.
    """
    return _UNREADABLE.search(text) is not None


def keep_groups(
    stds: Sequence[float] | npt.NDArray[Any], group_ids: Sequence[int], share: float, of: int | None = None
) -> set[int]:
    """The groups with the largest reward deviation: ``max(1, ⌊ρ·n⌋)`` of all n, without those that have none.

    A group without deviation carries no signal: its advantages are zero anyway. Dropping it, whatever ``share``, is
    explicit so that its tokens take no part in normalisation, KL or entropy terms either.

    Args:
        stds: reward standard deviation of each group (all ranks).
        group_ids: number of each group; of two groups with equal deviation the smaller number is kept.
        share: ρ, in (0, 1].
        of: n; ``None`` for the number of groups given. Groups that are known to have no deviation may be left out.

    Returns:
        Numbers of the kept groups; empty if no group has a deviation (skip the iteration).

    Raises:
        ValueError: ``share`` out of range, or lengths differ.
    """
    if not 0 < share <= 1:
        raise ValueError(f"keep_share must be in (0, 1], not {share}")
    ranked = sorted(zip(map(float, stds), group_ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
    quota = max(1, int(share * (len(ranked) if of is None else of) + 1e-9))
    return {group for std, group in ranked[:quota] if std > ZERO_DEVIATION}


@in_range
@dataclass(frozen=True)
class QualityFilters:
    """Which turns are taken out of the loss, and which share of groups is learned from.

    Args:
        overlong: the response was cut at the length limit.
        incomplete: an unparsable turn: no action or answer could be parsed and no tool was called.
        repetitive: see :func:`is_repetitive`.
        unreadable: see :func:`is_unreadable`.
        keep_share: ρ, see :func:`keep_groups`; 1 keeps every group that has a deviation.
    """

    overlong: bool = True
    incomplete: bool = True
    repetitive: bool = True
    unreadable: bool = True
    keep_share: Share = 0.75

    def hits(
        self,
        ids: Sequence[int] | npt.NDArray[Any],
        text: str,
        finish: Literal["stop", "length"],
        has_action: bool,
        tool_call: bool = False,
    ) -> frozenset[str]:
        """Names of the filters that one response falls under.

        Args:
            ids: its token ids.
            text: the same, decoded.
            finish: ``"length"`` if it was cut at the limit.
            has_action: an action or answer could be parsed.
            tool_call: it called a tool.
        """
        found = {
            "overlong": self.overlong and finish == "length",
            "incomplete": self.incomplete and not (has_action or tool_call),
            "repetitive": self.repetitive and is_repetitive(ids),
            "unreadable": self.unreadable and is_unreadable(text),
        }
        return frozenset(name for name, hit in found.items() if hit)
