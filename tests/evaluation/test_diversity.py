"""What data is like: against `rouge_score`, and against small sets whose numbers are done by hand."""

from __future__ import annotations

import random
from statistics import fmean

import pytest
from rouge_score.rouge_scorer import RougeScorer

from montessori_ray.errors import DataError
from montessori_ray.evaluation.diversity import (
    describe_data,
    first_words,
    lengths,
    mean_variety,
    overlap,
    rejections,
    variety,
)

REFERENCE = RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(first: str, second: str) -> float:
    return float(REFERENCE.score(first, second)["rougeL"].fmeasure)


def sentences(count: int) -> list[str]:
    rng = random.Random(0)
    words = ["name", "Write", "a", "the", "poem", "river", "list", "three", "about", "why", "e-f", "7", "?!"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(count)] + ["?!"]


def test_self_rouge_equals_the_reference() -> None:
    texts = sentences(40)
    highest = [max(rouge_l(text, other) for j, other in enumerate(texts) if j != i) for i, text in enumerate(texts)]
    assert variety(texts)["self_rouge_l"] == pytest.approx(fmean(highest), abs=1e-12)


def test_variety_by_hand() -> None:
    found = variety(["Name a bird.", "name a FISH", "why?"])
    assert found == {"sampled": 3, "distinct_1": 5 / 7, "distinct_2": 3 / 4, "self_rouge_l": pytest.approx(4 / 9)}
    assert variety(["same same same"] * 2)["self_rouge_l"] == 1
    assert variety(["alone"]) == {"sampled": 1, "distinct_1": 1, "distinct_2": None, "self_rouge_l": None}


def test_variety_is_measured_on_as_many_texts_whatever_their_number() -> None:
    texts = sentences(300)
    assert variety(texts, sample=50)["sampled"] == 50
    assert variety(texts, sample=50) == variety(texts, sample=50)
    assert variety(texts, sample=50) != variety(texts, sample=50, seed=1)


def test_variety_of_several_teachers_is_that_of_each() -> None:
    one, other = sentences(60), sentences(80)[::-1]
    found = mean_variety([one, other], sample=50)
    each = [variety(texts, sample=50) for texts in (one, other)]
    assert found["sampled"] == 50
    for name in ("distinct_1", "distinct_2", "self_rouge_l"):
        assert found[name] == pytest.approx(fmean(measured[name] or 0.0 for measured in each))
    assert mean_variety([one]) == variety(one)
    assert mean_variety([one, other])["sampled"] == len(one), "as many of each as the one with fewest has"
    assert mean_variety([["Why?", "Who?"], ["Name a bird.", "Name it."]])["distinct_2"] is None


def test_lengths_by_hand() -> None:
    assert lengths(["ab cd", "a\n\nb  c", "x"]) == {
        "characters": pytest.approx(13 / 3), "characters_median": 5, "words": 2, "words_median": 2,
    }  # fmt: skip


def test_first_words_by_hand() -> None:
    found = first_words(["Write a poem", "write: a song", "List birds", "(Why) not?", "?!"])
    assert found["first_words"] == {"write": 0.5, "list": 0.25, "why": 0.25}
    assert found["effective_first_words"] == pytest.approx(2**1.5)  # entropy of 1/2, 1/4, 1/4 is 1.5 bits


def test_what_the_filters_rejected() -> None:
    found = rejections(["kept"] * 5 + ["duplicate"] * 2 + ["unparsed"] * 1 + ["too_short"] * 2)
    assert found == {
        "samples": 10, "kept": 5, "rejected": {"duplicate": 2, "too_short": 2, "unparsed": 1},
        "parse_rate": 0.9, "duplicate_rate": 0.2,
    }  # fmt: skip


def test_overlap_is_found_exactly_and_nearly() -> None:
    held_out = ["Name three birds that live by the sea in winter.", "What is 7?", "\u5199\u4e00\u9996\u8bd7"]
    texts = [
        "name three  birds that live by the SEA in winter.",
        "Name three birds that live by the sea in summer.",
        "Name three cities.",
        "\u5199\u4e00\u9996\u8bd7",  # without a letter of ASCII there is no ROUGE-L: only exactness tells
    ]
    assert rouge_l(texts[1], held_out[0]) > 0.7
    assert overlap(texts, held_out) == {"exact": 2, "near": 3}
    assert overlap(texts[2:3], held_out) == {"exact": 0, "near": 0}


def test_all_of_one_teacher() -> None:
    instructions = [
        {"status": "kept", "instruction": "Name a bird."},
        {"status": "duplicate", "instruction": "Name a bird!"},
        {"status": "unparsed", "instruction": None},
        {"status": "kept", "instruction": "Why is the sky blue?"},
    ]
    responses = [
        {"response": "A wren.", "num_tokens": 3, "finish_reason": "stop"},
        {"response": "Light scatters and", "num_tokens": 8, "finish_reason": "length"},
    ]
    others = {"held_out": ["why is the sky blue?"], "reference": ["Name a sea."]}
    found = describe_data([instructions], responses, others)
    assert (found["parse_rate"], found["duplicate_rate"], found["kept"]) == (0.75, 0.25, 2)
    assert (found["responses"]["tokens"], found["responses"]["truncated"]) == (5.5, 0.5)
    assert found["overlap"] == {"held_out": {"exact": 1, "near": 1}, "reference": {"exact": 0, "near": 0}}
    assert found["instructions"]["sampled"] == 2
    with pytest.raises(DataError, match="no text to measure"):
        describe_data([instructions[2:3]], responses, {})


def test_all_of_several_teachers() -> None:
    """Variety is of each teacher, all else of both together."""

    def written(*texts: str) -> list[dict[str, str]]:
        return [{"status": "kept", "instruction": text} for text in texts]

    responses = [{"response": "A wren.", "num_tokens": 3, "finish_reason": "stop"}]
    one, other = written("Name a bird.", "Why is it?"), written("Name a bird.", "Who was she?", "List two seas.")
    found = describe_data([one, other], responses, {"reference": ["Name a bird."]}, sample=2)
    assert (found["kept"], found["overlap"]["reference"]["exact"]) == (5, 2)
    assert found["instructions"]["first_words"]["name"] == 2 / 5
    assert (found["instructions"]["sampled"], found["instructions"]["self_rouge_l"]) == (2, 0)
