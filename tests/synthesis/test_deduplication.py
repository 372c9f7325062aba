"""ROUGE-L and near duplicates, compared with the reference implementation `rouge_score`."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer, tokenizers

from montessori_ray.synthesis.deduplication import Match, NearDuplicates, rouge_l, tokenize


class Tokens(tokenizers.Tokenizer):  # type: ignore[misc]
    """Ours, for the reference's scores of texts in other letters than ASCII's, which its own tokens leave out."""

    def tokenize(self, text: str) -> list[str]:
        return tokenize(text)


REFERENCE = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Tokens())
SENTENCES = [
    "What is the capital of France?",
    "What is the capital city of France?",
    "Tell me what the capital of France is.",
    "Write a short poem about the sea, the sea, and again the sea.",
    "Write a short story about the sea and a lighthouse keeper.",
    "Compute 12 + 30, then divide by 7!",
    "Compute 12+30 then divide by 6",
    "\u00c9crire une phrase sur le caf\u00e9 cr\u00e8me",
    "SHOUT: WRITE A SHORT POEM ABOUT THE SEA",
    "don't  stop \n at line_breaks",
    "\u5199\u4e00\u9996\u8bd7",
    "?!",
    "",
]

# Few words, so that texts share many, in other orders and with repetitions; some words need splitting or lower case.
words = st.sampled_from(["a", "b", "c", "d", "The", "e-f", "7", "\u00e9"])
sentences = st.lists(words, max_size=30).map(" ".join)


def reference_score(first: str, second: str) -> float:
    return float(REFERENCE.score(first, second)["rougeL"].fmeasure)


def reference_match(text: str, others: Sequence[str], threshold: float) -> Match | None:
    """The first of the most similar `others` above `threshold`, by a plain loop over the reference implementation."""
    matches = [Match(reference_score(text, other), other) for other in others]
    return max((m for m in matches if m.score > threshold), key=lambda m: m.score, default=None)


def kept(texts: Sequence[str], threshold: float = 0.7) -> NearDuplicates:
    near_duplicates = NearDuplicates(threshold)
    for text in texts:
        near_duplicates.add(text)
    return near_duplicates


def random_corpus(num_sentences: int, rng: random.Random) -> list[str]:
    """Sentences of which about half are edited copies of earlier ones."""
    vocabulary = [f"word{i}" for i in range(60)]
    corpus: list[list[str]] = []
    for _ in range(num_sentences):
        if corpus and rng.random() < 0.5:
            share_changed = rng.uniform(0.1, 0.5)
            source = rng.choice(corpus)
            sentence = [rng.choice(vocabulary) if rng.random() < share_changed else word for word in source]
        else:
            sentence = rng.choices(vocabulary, weights=[1 / (i + 1) for i in range(60)], k=rng.randint(1, 25))
        corpus.append(sentence)
    return [" ".join(sentence) for sentence in corpus]


@given(st.text() | sentences)
def test_ascii_tokens_equal_the_reference(text: str) -> None:
    expected = tokenizers.DefaultTokenizer(use_stemmer=False).tokenize(text)
    assert [token for token in tokenize(text) if token.isascii()] == expected


def test_words_in_other_letters_are_words() -> None:
    assert tokenize("\u042f \u0438\u0434\u0443, 2x") == ["\u044f", "\u0438\u0434\u0443", "2x"]
    assert tokenize("\u871c\u8702 2023\u5e74?") == ["\u871c", "\u8702", "2023", "\u5e74"]
    bees, ants = (
        "\u871c\u8702\u5728\u590f\u5929\u505a\u4ec0\u4e48?",
        "\u8682\u8681\u5728\u51ac\u5929\u5403\u4ec0\u4e48?",
    )
    assert kept([bees]).is_duplicate(bees)
    assert not kept([bees]).is_duplicate(ants)


@given(sentences, sentences)
def test_score_equals_the_reference(first: str, second: str) -> None:
    assert rouge_l(first, second) == pytest.approx(reference_score(first, second), rel=0, abs=1e-12)


@pytest.mark.parametrize("first", SENTENCES)
def test_score_of_realistic_sentences_equals_the_reference(first: str) -> None:
    for second in SENTENCES:
        assert rouge_l(first, second) == pytest.approx(reference_score(first, second), rel=0, abs=1e-12)


@given(st.lists(sentences, max_size=12), sentences, st.lists(sentences, max_size=3), st.sampled_from([0.0, 0.5, 0.7]))
def test_most_similar_equals_a_plain_loop(texts: list[str], text: str, shots: list[str], threshold: float) -> None:
    expected = reference_match(text, [*texts, *shots], threshold)
    near_duplicates = kept(texts, threshold)
    assert near_duplicates.most_similar(text, shots) == expected
    assert near_duplicates.is_duplicate(text, shots) == (expected is not None)


def test_growing_corpus_is_deduplicated_as_by_a_plain_loop() -> None:
    near_duplicates, expected_kept = NearDuplicates(), list[str]()
    for text in random_corpus(200, random.Random(0)):
        expected = reference_match(text, expected_kept, 0.7)
        assert near_duplicates.most_similar(text) == expected
        if expected is None:
            near_duplicates.add(text)
            expected_kept.append(text)
    assert len(near_duplicates) == len(expected_kept)
    assert 40 < len(expected_kept) < 160  # both answers were asked for


def test_scores_on_the_threshold_decide_as_the_reference() -> None:
    """All lengths m, n <= 40 that allow 2 * lcs / (m + n) = 0.7, where rounding alone decides."""
    decisions = set()
    for m, n in ((m, n) for m in range(1, 41) for n in range(1, 41) if (m + n) % 20 == 0):
        lcs = 7 * (m + n) // 20
        if lcs > min(m, n):
            continue
        common = [f"c{i}" for i in range(lcs)]
        first = " ".join(common + [f"a{i}" for i in range(m - lcs)])
        second = " ".join([f"b{i}" for i in range(n - lcs)] + common)
        expected = reference_score(first, second) > 0.7
        assert kept([first]).is_duplicate(second) == expected
        assert kept([]).is_duplicate(second, shots=[first]) == expected
        decisions.add(expected)
    assert decisions == {True, False}


def test_same_words_in_another_order_are_no_duplicate() -> None:
    near_duplicates = kept(["list five rivers that cross three borders"])
    assert not near_duplicates.is_duplicate("borders three cross that rivers five list")
    assert near_duplicates.is_duplicate("List FIVE rivers that cross three borders!")


def test_shots_count_for_their_own_prompt_only() -> None:
    near_duplicates = kept(["Name a bird."])
    assert near_duplicates.is_duplicate("Write a poem.", shots=["Write a poem"])
    assert not near_duplicates.is_duplicate("Write a poem.")
    assert len(near_duplicates) == 1


def test_best_match_is_reported_with_its_score() -> None:
    near_duplicates = kept(["one two three four five", "one two three four"])
    assert near_duplicates.most_similar("One two three four.") == Match(1.0, "one two three four")
    assert near_duplicates.most_similar("six seven") is None


def test_texts_without_tokens_are_never_duplicates() -> None:
    near_duplicates = kept(["", "?!"])
    assert not near_duplicates.is_duplicate("?!", shots=["?!"])
    assert not NearDuplicates().is_duplicate("anything")


def test_kept_instructions_survive_pickling() -> None:
    near_duplicates = pickle.loads(pickle.dumps(kept(SENTENCES)))
    near_duplicates.add("Name three birds of prey.")
    assert near_duplicates.is_duplicate("name three birds of prey")
    assert near_duplicates.is_duplicate("Write a short poem about the sea")
