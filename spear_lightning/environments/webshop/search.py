"""Search: BM25 as Lucene scores it, over arrays on disk that all processes of a machine share.

``score = Σ idf(term) · f / (f + k1·(1 - b + b·length/mean length))`` with ``idf = ln(1 + (N - n + ½)/(n + ½))``: the
``lucene`` method of ``bm25s``, with which a test compares it. ``bm25s`` itself is not used: it holds the whole
collection as Python lists while it builds an index, and a copy of the vocabulary in every process that reads one.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import Stemmer

from spear_lightning.environments.webshop.arrays import Blobs, BlobWriter, read_array, save_array
from spear_lightning.utils.package_data import read_yaml

K1, B = 0.9, 0.4
_META = "search.json"
_TOKEN = re.compile(r"[^\W_]+(?:['’.][^\W_]+)*")
_STOP_WORDS = frozenset(read_yaml(__name__, "search.yaml"))
_CHUNK = 1 << 22  # postings held in memory while an index is built
_LONGEST_TERM = 64  # characters; longer strings of letters are no words

Ids = npt.NDArray[np.int32]


def tokens(text: str) -> list[str]:
    """Words of a text, in lower case, without stop words and possessives, not stemmed."""
    found = (token.replace("’", "'").removesuffix("'s") for token in _TOKEN.findall(text.lower()))
    return [token for token in found if token not in _STOP_WORDS]


_STEMMER = Stemmer.Stemmer("porter")


def stems(text: str) -> list[str]:
    """Stems (Porter) of the words of a text, in order, with repetitions, as Lucene's English analyzer makes them."""
    return [stem[:_LONGEST_TERM] for stem in _STEMMER.stemWords(tokens(text))]


class IndexBuilder:
    """Writes the index of a collection of any size, holding no more than its vocabulary and a chunk of postings.

    Args:
        folder: to write to; temporary files are removed by :meth:`finish`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._vocabulary: dict[str, int] = {}
        self._lengths = array("i")
        self._terms: list[int] = []
        self._counts: list[int] = []
        self._sizes: list[int] = []  # distinct terms of each document of the chunk
        self._chunks: list[Path] = []

    def add(self, text: str) -> None:
        """Index the next document."""
        found = stems(text)
        counted = Counter(found)
        vocabulary = self._vocabulary
        self._terms += [vocabulary.setdefault(stem, len(vocabulary)) for stem in counted]
        self._counts += counted.values()
        self._sizes.append(len(counted))
        self._lengths.append(len(found))
        if len(self._terms) >= _CHUNK:
            self._flush()

    def finish(self) -> None:
        """Write the index; no document can be added any more."""
        self._flush()
        words = sorted(self._vocabulary, key=lambda word: word.encode())
        rank = np.empty(len(words), np.int64)
        rank[[self._vocabulary[word] for word in words]] = np.arange(len(words))
        terms = BlobWriter(self._folder, "terms")
        for word in words:
            terms.add(word.encode())
        terms.finish()
        lengths = np.asarray(self._lengths, np.float64)
        mean = float(lengths.mean()) if lengths.sum() else 1.0
        save_array(self._folder, "norms", (K1 * (1 - B + B * lengths / mean)).astype(np.float32))
        self._write_postings(rank)
        (self._folder / _META).write_text(json.dumps({"documents": len(lengths), "mean_length": mean}))

    def _flush(self) -> None:
        if not self._sizes:
            return
        path = self._folder / f"chunk-{len(self._chunks)}.npz"
        first = len(self._lengths) - len(self._sizes)
        documents = np.repeat(np.arange(first, len(self._lengths), dtype=np.int32), self._sizes)
        counts = np.minimum(self._counts, 255).astype(np.uint8)
        np.savez(path, terms=np.asarray(self._terms, np.int32), documents=documents, counts=counts)
        self._chunks.append(path)
        self._terms, self._counts, self._sizes = [], [], []

    def _write_postings(self, rank: npt.NDArray[np.int64]) -> None:
        """Merge the chunks: postings of a term together, by document."""
        frequency = np.zeros(len(rank), np.int64)
        for path in self._chunks:
            with np.load(path) as chunk:
                frequency += np.bincount(rank[chunk["terms"]], minlength=len(rank))
        starts = np.concatenate([[0], np.cumsum(frequency)]).astype(np.int64)
        save_array(self._folder, "posting_starts", starts)
        total = int(starts[-1])
        documents = np.lib.format.open_memmap(self._folder / "posting_documents.npy", "w+", np.int32, (total,))
        counts = np.lib.format.open_memmap(self._folder / "posting_counts.npy", "w+", np.uint8, (total,))
        cursor = starts[:-1].copy()
        for path in self._chunks:
            with np.load(path) as chunk:
                terms = rank[chunk["terms"]]
                order = np.argsort(terms, kind="stable")
                terms = terms[order]
                found, first, repeats = np.unique(terms, return_index=True, return_counts=True)
                place = np.repeat(cursor[found] - first, repeats) + np.arange(len(terms))
                documents[place], counts[place] = chunk["documents"][order], chunk["counts"][order]
                cursor[found] += repeats
            path.unlink()
        documents.flush()
        counts.flush()


class SearchIndex:
    """An index that :class:`IndexBuilder` wrote.

    Args:
        folder: where it is.
    """

    def __init__(self, folder: Path) -> None:
        self.documents = int(json.loads((folder / _META).read_text())["documents"])
        self._terms = Blobs(folder, "terms")
        self._starts = read_array(folder, "posting_starts")
        self._docs = read_array(folder, "posting_documents")
        self._counts = read_array(folder, "posting_counts")
        self._norms = read_array(folder, "norms")

    def search(self, query: str, limit: int = 50) -> Ids:
        """The documents that match best, best first, int32 ``(hits,)``; none where no word of the query occurs.

        Args:
            query: words in any form; a repeated word counts again.
            limit: most hits.
        """
        scores = self.scores(query)
        hits = np.flatnonzero(scores)
        if len(hits) > limit:
            least = np.partition(scores[hits], len(hits) - limit)[len(hits) - limit]
            hits = hits[scores[hits] >= least]
        # By score, then by number: equal scores must not depend on how a machine sorts.
        return hits[np.lexsort((hits, -scores[hits]))][:limit].astype(np.int32)

    def scores(self, query: str) -> npt.NDArray[np.float32]:
        """The score of every document, float32 ``(documents,)``."""
        scores = np.zeros(self.documents, np.float32)
        for stem, times in Counter(stems(query)).items():
            term = self._find(stem.encode())
            if term < 0:
                continue
            part = slice(int(self._starts[term]), int(self._starts[term + 1]))
            docs, counts = self._docs[part], self._counts[part].astype(np.float32)
            rarity = np.log1p((self.documents - len(docs) + 0.5) / (len(docs) + 0.5))
            scores[docs] += np.float32(times * rarity) * counts / (counts + self._norms[docs])
        return scores

    def _find(self, term: bytes) -> int:
        """Number of a term, or -1: a binary search in the sorted vocabulary."""
        low, high = 0, len(self._terms)
        while low < high:
            middle = (low + high) // 2
            word = self._terms[middle]
            if word == term:
                return middle
            low, high = (middle + 1, high) if word < term else (low, middle)
        return -1
