"""What synthesized data is like: how long, how varied, what the filters rejected, and whether it leaks.

Measures of variety fall as a corpus grows, so they are taken on a sample of fixed size, of each teacher by itself:
compare two sets only where `sampled` is the same number in both.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from statistics import fmean, median
from typing import Any

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from montessori_ray.data import normalised
from montessori_ray.errors import DataError
from montessori_ray.synthesis.deduplication import NearDuplicates, tokenize
from montessori_ray.synthesis.instructions import KEPT
from montessori_ray.synthesis.parsing import Rejection

SAMPLE = 500
"""Instructions that variety is measured on: 125 thousand comparisons, a tenth of a second."""

TOP = 10
"""First words that are listed."""

Row = Mapping[str, Any]


def describe_data(
    instructions: Iterable[Sequence[Row]],
    responses: Iterable[Row],
    others: Mapping[str, Sequence[str]],
    *,
    sample: int = SAMPLE,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything this file measures, of teachers' samples and the answers to them: variety as the mean over teachers,
    all else of their samples together.

    Args:
        instructions: of each teacher, rows of every sample, rejected ones too (schema INSTRUCTIONS).
        responses: rows of the answers (schema RESPONSES).
        others: name -> instructions the data must not repeat: the reference and the held-out set.
        sample: instructions of each teacher that variety is measured on.
        seed: seed of that sample.

    Raises:
        DataError: a teacher kept no instruction, or there is no response.
    """
    by_teacher = list(instructions)
    rows = list(chain.from_iterable(by_teacher))
    kept_by_teacher = [[row["instruction"] for row in samples if row["status"] == KEPT] for samples in by_teacher]
    kept = list(chain.from_iterable(kept_by_teacher))
    return {
        **rejections(row["status"] for row in rows),
        "instructions": {
            **lengths(kept),
            **mean_variety(kept_by_teacher, sample=sample, seed=seed),
            **first_words(kept),
        },
        "responses": response_lengths(responses),
        "overlap": {name: overlap(kept, texts) for name, texts in others.items()},
    }


def rejections(statuses: Iterable[str]) -> dict[str, Any]:
    """What the filters did: `samples`, `kept`, `rejected` by reason, and as shares of all samples `parse_rate` (those
    that hold an instruction at all) and `duplicate_rate`."""
    counts = Counter(statuses)
    samples = _need(counts.total(), "sample")
    return {
        "samples": samples,
        "kept": counts[KEPT],
        "rejected": {status: count for status, count in sorted(counts.items()) if status != KEPT},
        "parse_rate": 1 - counts[Rejection.UNPARSED] / samples,
        "duplicate_rate": counts[Rejection.DUPLICATE] / samples,
    }


def lengths(texts: Sequence[str]) -> dict[str, float]:
    """Mean and median characters and words (separated by white space) of texts."""
    _need(len(texts), "text")
    characters, words = [len(text) for text in texts], [len(text.split()) for text in texts]
    return {
        "characters": fmean(characters),
        "characters_median": median(characters),
        "words": fmean(words),
        "words_median": median(words),
    }


def response_lengths(rows: Iterable[Row]) -> dict[str, float]:
    """`lengths` of responses, their mean `tokens` (the teacher's tokenizer) and the share `truncated`."""
    rows = list(rows)
    return {
        **lengths([row["response"] for row in rows]),
        "tokens": fmean(row["num_tokens"] for row in rows),
        "truncated": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
    }


def variety(texts: Sequence[str], *, sample: int = SAMPLE, seed: int = 0) -> dict[str, float | None]:
    """How little a fixed-size sample of the texts repeats itself.

    Returns:
        sampled: texts measured; distinct_1, distinct_2: different words and word pairs as a share of all (Li et al.
        2016), None where there are none; self_rouge_l: mean over the sample of the highest ROUGE-L F of a text with any
        other of it (lower is more varied), None for a single text.
    """
    _need(len(texts), "text")
    chosen = random.Random(seed).sample(list(texts), min(sample, len(texts)))
    tokens = [tokenize(text) for text in chosen]
    return {
        "sampled": len(chosen),
        "distinct_1": _share_distinct(list(chain.from_iterable(tokens))),
        "distinct_2": _share_distinct([pair for words in tokens for pair in pairwise(words)]),
        "self_rouge_l": _self_rouge_l(tokens) if len(tokens) > 1 else None,
    }


def mean_variety(
    by_teacher: Sequence[Sequence[str]], *, sample: int = SAMPLE, seed: int = 0
) -> dict[str, float | None]:
    """Mean over teachers of the `variety` of each one's texts, on equally many of them.

    Pooled, the texts of several teachers would be more, and so look less varied than those of one.

    Returns:
        As `variety`; `sampled`: texts of each teacher; a measure that one of them has not is None.
    """
    size = min(sample, *(_need(len(texts), "text") for texts in by_teacher))
    found = [variety(texts, sample=size, seed=seed) for texts in by_teacher]
    return {"sampled": size} | {
        name: _mean([measured[name] for measured in found]) for name in ("distinct_1", "distinct_2", "self_rouge_l")
    }


def first_words(texts: Sequence[str]) -> dict[str, Any]:
    """What is asked for, by the first word, which is the verb of most instructions.

    Returns:
        first_words: the most frequent ones, lower-case, with their share of all texts; effective_first_words: how many
        equally frequent ones would be as varied (exponential of the entropy).
    """
    words = Counter(tokens[0] for text in texts if (tokens := tokenize(text)))
    total = _need(words.total(), "word")
    shares = {word: count / total for word, count in sorted(words.items(), key=lambda item: (-item[1], item[0]))}
    return {
        "first_words": dict(list(shares.items())[:TOP]),
        "effective_first_words": math.exp(-sum(share * math.log(share) for share in shares.values())),
    }


def overlap(texts: Sequence[str], others: Sequence[str], *, rouge_l: float = 0.7) -> dict[str, int]:
    """How many texts are also among the `others`: `exact`, letter case and white space aside, and `near`, with ROUGE-L
    above `rouge_l` or exact. Both must be 0 for a reference or held-out set, or its losses are flattered."""
    same = {normalised(text) for text in others}
    similar = NearDuplicates(rouge_l)
    for text in others:
        similar.add(text)
    exact = [normalised(text) in same for text in texts]
    near = [found or similar.is_duplicate(text) for found, text in zip(exact, texts, strict=True)]
    return {"exact": sum(exact), "near": sum(near)}


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _share_distinct(items: Sequence[Any]) -> float | None:
    return len(set(items)) / len(items) if items else None


def _self_rouge_l(tokens: Sequence[list[str]]) -> float:
    """ROUGE-L F of two texts is 2 LCS / (m + n) for their m and n tokens."""
    common = process.cdist(tokens, tokens, scorer=LCSseq.similarity, dtype=np.int32).astype(np.float64)
    sizes = np.array([len(words) for words in tokens])
    scores = 2 * common / np.maximum(sizes[:, None] + sizes, 1)
    np.fill_diagonal(scores, 0)
    return float(scores.max(axis=1).mean())


def _need(count: int, what: str) -> int:
    if not count:
        raise DataError(f"there is no {what} to measure: every sample was rejected, or the set is empty")
    return count
