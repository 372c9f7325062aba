"""Near-duplicate instructions by ROUGE-L (paper section 3.1: F above 0.7 is a duplicate).

Of ASCII texts scores equal `rouge_score`'s `RougeScorer(["rougeL"], use_stemmer=False)` bit for bit, and no
approximation decides: an index of the words skips the comparisons that cannot pass the threshold, all others are
computed. Other letters, which `rouge_score` drops, are words too.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import LCSseq

_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[a-z0-9]+|[{_CJK}]|[^\\W_a-z0-9{_CJK}]+")

# More than the rounding error of a score: the index may let a text too many through, never one too few.
_SLACK = 1e-9


def tokenize(text: str) -> list[str]:
    """Lower-case runs of ASCII letters and digits, as `rouge_score` splits a text without stemming; beside these, runs
    of other letters and single Chinese or Japanese characters."""
    return _WORD.findall(text.lower())


def rouge_l(first: str, second: str) -> float:
    """ROUGE-L F-measure of two texts, 0 to 1: symmetric, and 0 when either has no token."""
    vocabulary: dict[str, int] = {}
    return _f_measure(_encode(first, vocabulary), _encode(second, vocabulary))


class Match(NamedTuple):
    """A text that another one nearly repeats."""

    score: float
    """ROUGE-L F-measure, 0 to 1."""
    text: str


class NearDuplicates:
    """The kept instructions, searchable for near duplicates.

    A longest common subsequence (LCS) is at most the number of tokens that two texts share, repetitions counted. The
    index gives that number for all kept instructions at once, and few are left to compare. Texts without any letter or
    digit have a score of 0 and never count as duplicates (as in `rouge_score`).

    Memory grows with the tokens kept, about 40 bytes each beside the texts (measured). Not for use by several threads.
    """

    def __init__(self, threshold: float = 0.7) -> None:
        """A text is a duplicate of another when their ROUGE-L F-measure is above `threshold` (paper: 0.7)."""
        self._threshold = threshold
        self._vocabulary: dict[str, int] = {}
        self._texts: list[str] = []
        self._ids: list[array[int]] = []
        self._lengths = array("q")
        # (token id, k) -> rows of the kept texts that hold the token more than k times, see `_occurrences`.
        self._rows: defaultdict[tuple[int, int], array[int]] = defaultdict(partial(array, "q"))

    def __len__(self) -> int:
        """Number of kept instructions."""
        return len(self._texts)

    def add(self, text: str) -> None:
        """Keep `text`, duplicate or not."""
        ids = _encode(text, self._vocabulary)
        for key in _occurrences(ids):
            self._rows[key].append(len(self._texts))
        self._texts.append(text)
        self._ids.append(ids)
        self._lengths.append(len(ids))

    def is_duplicate(self, text: str, shots: Sequence[str] = ()) -> bool:
        """Whether `text` nearly repeats a kept instruction or one of the `shots` of its own prompt."""
        return self.most_similar(text, shots) is not None

    def most_similar(self, text: str, shots: Sequence[str] = ()) -> Match | None:
        """The kept instruction or shot that `text` repeats most, None if no score is above the threshold.

        Of equal scores the first counts: kept instructions in the order they were added, then shots.
        """
        ids = _encode(text, self._vocabulary)
        matches = (Match(_f_measure(ids, other), other_text) for other, other_text in self._comparable(ids, shots))
        return max((m for m in matches if m.score > self._threshold), key=lambda m: m.score, default=None)

    def _comparable(self, ids: array[int], shots: Sequence[str]) -> Iterator[tuple[array[int], str]]:
        """Token ids and text of all shots and of the kept instructions that may pass the threshold."""
        for row in self._possible_rows(ids):
            yield self._ids[row], self._texts[row]
        for shot in shots:
            yield _encode(shot, self._vocabulary), shot

    def _possible_rows(self, ids: array[int]) -> list[int]:
        """Rows, ascending, whose score would be above the threshold if all shared tokens were in the same order."""
        postings = [np.frombuffer(self._rows[key], np.int64) for key in _occurrences(ids) if key in self._rows]
        if not postings:
            return []
        num_shared = np.bincount(np.concatenate(postings), minlength=len(self))
        num_tokens = np.frombuffer(self._lengths, np.int64) + len(ids)
        possible: list[int] = np.flatnonzero(2 * num_shared > (self._threshold - _SLACK) * num_tokens).tolist()
        return possible


def _encode(text: str, vocabulary: dict[str, int]) -> array[int]:
    """Token ids of `text`; new tokens get the next ids of `vocabulary`."""
    return array("q", [vocabulary.setdefault(token, len(vocabulary)) for token in tokenize(text)])


def _occurrences(ids: array[int]) -> list[tuple[int, int]]:
    """(token id, k) for the token's occurrences k = 0, 1, ...: texts share as many of these as they share tokens."""
    return [(token, k) for token, count in Counter(ids).items() for k in range(count)]


def _f_measure(first: array[int], second: array[int]) -> float:
    """ROUGE-L F-measure by the operations of `rouge_score`, so that scores on the threshold round alike."""
    if not first or not second:
        return 0.0
    lcs = LCSseq.similarity(first, second)
    precision, recall = lcs / len(first), lcs / len(second)
    return 2 * precision * recall / (precision + recall) if lcs else 0.0
