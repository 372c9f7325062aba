"""Win rates from judges whose rule is known: they read the real prompt, and the numbers follow from their rule."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from itertools import islice

import pytest

from montessori_ray.config import Judge
from montessori_ray.errors import DataError
from montessori_ray.evaluation.endpoint import Ask, ChatEndpoint, Conversation, Reply
from montessori_ray.evaluation.judge import BASELINE, CANDIDATE, Pair, judge_pairs, pair_scores, parse_verdict, win_rate
from tests.evaluation.serving import serving

SHOWN = re.compile(r"# Answer of A\n(.*?)\n\n# Answer of B\n(.*?)\n\n# Your decision", re.DOTALL)


def pairs(count: int) -> list[Pair]:
    rng = random.Random(0)
    return [Pair(f"e{i}", "Name {a} thing.", "c" * rng.randint(1, 9), "b" * rng.randint(1, 9)) for i in range(count)]


def longer_wins(conversation: Conversation) -> Reply:
    first, second = SHOWN.findall(conversation[0]["content"])[0]
    letter = "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
    return Reply(f"One is longer.\nVerdict: {letter}")


def asked(rule: object) -> Ask:
    def ask(conversations: Iterable[Conversation]) -> Iterator[Reply]:
        return (rule(conversation) for conversation in conversations)  # type: ignore[operator]

    return ask


def test_a_fair_judge_of_length() -> None:
    compared = pairs(60)
    found = win_rate(list(judge_pairs(compared, asked(longer_wins))))
    wins = sum(len(pair.candidate) > len(pair.baseline) for pair in compared)
    ties = sum(len(pair.candidate) == len(pair.baseline) for pair in compared)
    assert (found["pairs"], found["wins"], found["ties"], found["losses"]) == (60, wins, ties, 60 - wins - ties)
    assert found["win_rate"]["mean"] == pytest.approx((wins + ties / 2) / 60)
    assert found["win_rate"]["low"] < found["win_rate"]["mean"] < found["win_rate"]["high"]
    assert (found["follows_place"], found["first_place"]) == (0, 0.5)
    assert set(found["verdicts"]) == {"candidate", "baseline", "tie"}


def test_a_judge_that_takes_the_first_answer_wins_nobody_anything() -> None:
    found = win_rate(list(judge_pairs(pairs(10), asked(lambda conversation: Reply("Verdict: A")))))
    assert (found["win_rate"]["mean"], found["win_rate"]["se"], found["ties"]) == (0.5, 0, 10)
    assert (found["follows_place"], found["first_place"]) == (1, 1)


def test_the_interval_of_few_pairs_stays_among_shares() -> None:
    rows = [
        {"example_id": str(number), "verdict": CANDIDATE if number else BASELINE, "shown_first": first, "reply": ""}
        for number in range(4)
        for first in (CANDIDATE, BASELINE)
    ]
    rate = win_rate(rows)["win_rate"]
    assert (rate["mean"], rate["high"]) == (0.75, 1.0)
    assert rate["low"] == 0.0, "0.75 less 3.18 standard errors of .25 is below"


@pytest.mark.parametrize(
    ("letter", "low", "high"), [(CANDIDATE, 0.025 ** (1 / 9), 1), (BASELINE, 0, 1 - 0.025 ** (1 / 9))]
)
def test_pairs_that_all_end_alike_leave_room_for_others(letter: str, low: float, high: float) -> None:
    """A rate of `low` gives nine wins of nine in one of 40 cases."""
    rows = [
        {"example_id": str(number), "verdict": letter, "shown_first": first, "reply": ""}
        for number in range(9)
        for first in (CANDIDATE, BASELINE)
    ]
    rate = win_rate(rows)["win_rate"]
    assert (rate["low"], rate["high"]) == (pytest.approx(low), pytest.approx(high))


def test_pairs_without_a_readable_verdict_in_both_orders_do_not_count() -> None:
    def hesitant(conversation: Conversation) -> Reply:
        first, _ = SHOWN.findall(conversation[0]["content"])[0]
        if first.startswith("ccccccccc"):
            return Reply("too long for me", refused=True)
        if first == "b":
            return Reply("If I had to say Verdict: A, it", cut=True)
        return Reply("Both are nice.") if first == "bbb" else longer_wins(conversation)

    rows = list(judge_pairs(pairs(60), asked(hesitant)))
    readable = [pair for pair in pairs(60) if len(pair.candidate) < 9 and pair.baseline not in ("b", "bbb")]
    assert 30 < len(readable) < 60
    assert set(pair_scores(rows)) == {pair.example_id for pair in readable}
    found = win_rate(rows)
    assert found["pairs"] == len(readable)
    assert found["verdicts"]["refused"] == sum(len(pair.candidate) == 9 for pair in pairs(60))
    assert found["verdicts"]["unparsed"] == sum(pair.baseline in ("b", "bbb") for pair in pairs(60))


def test_a_judge_that_never_decides_is_an_error_with_its_words() -> None:
    rows = list(judge_pairs(pairs(5), asked(lambda conversation: Reply("I like both."))))
    with pytest.raises(DataError, match=r"0 pairs have a verdict in both orders \({'unparsed': 10}\).*I like both"):
        win_rate(rows)


def test_judging_continues_where_it_was_stopped() -> None:
    whole = list(judge_pairs(pairs(8), asked(longer_wins)))
    conversations: list[Conversation] = []

    def counting(conversation: Conversation) -> Reply:
        conversations.append(conversation)
        return longer_wins(conversation)

    first = list(islice(judge_pairs(pairs(8), asked(counting)), 5))
    done = {(row["example_id"], row["shown_first"]) for row in first}
    rest = list(judge_pairs(pairs(8), asked(counting), done=done))
    assert first + rest == whole
    assert len(conversations) == len(whole)


@pytest.mark.parametrize(
    ("reply", "first_shown_is"),
    [
        ("It is right.\nVerdict: A", "candidate"),
        ("**Verdict:** B", "baseline"),
        ("verdict: [[A]]", "candidate"),
        ("Verdict: Answer B.", "baseline"),
        ("Verdict: A or B? I say\nVerdict: B", "baseline"),
        ("Verdict: tie", "tie"),
        ("Verdict: a tie", "tie"),
        ("Verdict: TIE", "tie"),
        ("Verdict: Both", "unparsed"),
        ("A is better.", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_verdicts_are_read(reply: str, first_shown_is: str) -> None:
    assert parse_verdict(reply, "candidate") == first_shown_is
    other = {"candidate": "baseline", "baseline": "candidate"}.get(first_shown_is, first_shown_is)
    assert parse_verdict(reply, "baseline") == other


def test_over_http_as_in_memory() -> None:
    with serving(lambda messages: longer_wins(messages).text) as (url, requests):
        judge = ChatEndpoint(Judge(model="judge", base_url=url))
        rows = list(judge_pairs(pairs(20), judge))
    assert rows == list(judge_pairs(pairs(20), asked(longer_wins)))
    assert len(requests) == 40
