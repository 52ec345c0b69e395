"""The WebShop task suite: which shop, and which goals are for what."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spear_lightning.environments.base import Split, Task, TaskSuite, cache_folder, require
from spear_lightning.utils.ranges import NotNegative, Positive, in_range

if TYPE_CHECKING:
    from spear_lightning.environments.webshop.catalogue import Catalogue
    from spear_lightning.environments.webshop.environment import WebShopEnv
    from spear_lightning.environments.webshop.sources import Source

logger = logging.getLogger(__name__)

_SPLITS: tuple[Split, ...] = ("test", "validation", "train")


@in_range
class WebShop(TaskSuite):
    """Shopping goals over a catalogue generated here or downloaded.

    Goals are numbered in the original's shuffled order. The first ``test`` of them are the test goals, the next
    ``validation`` the validation goals, all others train: with the defaults the original's own split (test 0 to 499,
    development 500 to 1499, training from 1500).

    Args:
        catalogue: ``generated`` (made once from templates, kept under ``cache_dir``) or ``official``.
        data_dir: folder of the official files; default ``$WEBSHOP_DATA``.
        products: number of products; of an official catalogue the first ones of the file. Default: 1000 generated, all
            official ones.
        goals: ``human`` instructions, or ``synthetic`` ones with every combination of a product's options.
        test: number of test goals.
        validation: number of validation goals.
        train: most training goals; default all that are left.
        seed: of the generated catalogue.
        max_steps: steps after which an episode is cut.
        per_page: hits on a page of results; the published shop shows 10, fewer make shorter transcripts.
        cache_dir: where catalogues are kept; default ``$XDG_CACHE_HOME/spear-lightning``, else
            ``~/.cache/spear-lightning``.

    Raises:
        ValueError: an argument cannot be used; the message names it.
    """

    def __init__(
        self,
        catalogue: Literal["generated", "official"] = "generated",
        data_dir: str | None = None,
        products: Positive | None = None,
        goals: Literal["human", "synthetic"] = "human",
        test: NotNegative = 500,
        validation: NotNegative = 1000,
        train: Positive | None = None,
        seed: NotNegative = 0,
        max_steps: Positive = 15,
        per_page: Positive = 10,
        cache_dir: str | None = None,
    ) -> None:
        self.catalogue, self.products, self.goals, self.seed = catalogue, products, goals, seed
        self.data_dir = data_dir
        self.max_steps, self.per_page = max_steps, per_page
        self._counts = {"test": test, "validation": validation, "train": train}
        self._root = cache_folder(cache_dir) / "webshop"

    def prepare(self) -> None:
        """Build the catalogue, once for a machine. Safe to run in several processes at once.

        Raises:
            ValueError: a package is missing, or the data cannot be used; the message says what to do.
        """
        catalogue = self.loaded
        left_out = ", ".join(f"{count} {what}" for what, count in catalogue.left_out.items() if count)
        logger.info(
            "WebShop: %d products, %d human and %d synthetic goals; left out: %s",
            *(len(catalogue), catalogue.goals("human"), catalogue.goals("synthetic"), left_out or "nothing"),
        )
        self.tasks("train")

    def tasks(self, split: Split) -> Sequence[Task]:
        """The goals of ``split``, in the published order.

        Raises:
            ValueError: the split has no goal, or the data cannot be used; the message says what to do.
        """
        catalogue = self.loaded
        count = catalogue.goals(self.goals)
        first, last = self._range(split, count)
        if first >= last:
            raise ValueError(
                f"WebShop has no {split} goals: the {self.catalogue} catalogue has {count} {self.goals} goals, "
                f"of which {self._counts['test']} are kept for test and {self._counts['validation']} for "
                "validation; change test, validation, products or goals" + self._hint(count)
            )
        return _Goals(catalogue, self.goals, range(first, last))

    def make(self) -> WebShopEnv:
        """A fresh environment. The environments of a process share what they have read of the catalogue."""
        from spear_lightning.environments.webshop.environment import WebShopEnv

        return WebShopEnv(self.loaded, self.max_steps, self.per_page)

    @cached_property
    def loaded(self) -> Catalogue:
        """The catalogue, built if need be.

        Raises:
            ValueError: a package is missing, or the data cannot be used; the message says what to do.
        """
        require("WebShop", "webshop", {"Stemmer": "PyStemmer", "rapidfuzz": "rapidfuzz", "ijson": "ijson"})
        from spear_lightning.environments.webshop.catalogue import Catalogue, build_catalogue

        return Catalogue(build_catalogue(self._root, self._source()))

    def _source(self) -> Source:
        from spear_lightning.environments.webshop.generator import GeneratedProducts
        from spear_lightning.environments.webshop.sources import OfficialFiles

        if self.catalogue == "generated":
            return GeneratedProducts(self.products or 1000, self.seed)
        folder = self.data_dir or os.environ.get("WEBSHOP_DATA")
        if not folder:
            raise ValueError(
                "catalogue: official needs the folder of WebShop's data files: set data_dir, or $WEBSHOP_DATA"
            )
        return OfficialFiles(Path(folder).expanduser(), self.products)

    def _range(self, split: Split, count: int) -> tuple[int, int]:
        first = 0
        for name in _SPLITS:
            size = self._counts[name]
            last = count if size is None else min(first + size, count)
            if name == split:
                return first, last
            first = last
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(_SPLITS)}")

    def _hint(self, count: int) -> str:
        if count or self.catalogue == "generated":
            return ""
        from spear_lightning.environments.webshop.sources import HUMAN_FILE

        return f" (human goals need {HUMAN_FILE} in data_dir)" if self.goals == "human" else ""


class _Goals(Sequence[Task]):
    """Tasks of consecutive goals; a large catalogue has millions, so they are made when they are asked for."""

    def __init__(self, catalogue: Catalogue, kind: Literal["human", "synthetic"], numbers: range) -> None:
        self._catalogue, self._kind, self._numbers = catalogue, kind, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return _Goals(self._catalogue, self._kind, self._numbers[place])
        from spear_lightning.environments.webshop.environment import task_id

        number = self._numbers[place]
        return Task(id=task_id(self._kind, number), task_type=self._catalogue.department(self._kind, number))
