"""Win rate: a judge compares two models' answers to the same instructions, in both orders.

    rows = list(judge_pairs(pairs, ask))     # two a pair; commit them as they come, pass what is there as `done`
    print(win_rate(rows))

Judges favour a place: a pair counts as won by how it was judged in both orders together, and how often the verdict
followed the place instead of the answer is reported.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import tee
from statistics import fmean
from typing import Any, NamedTuple

from montessori_ray.errors import DataError
from montessori_ray.evaluation.endpoint import Ask, Conversation, Reply
from montessori_ray.evaluation.statistics import paired_difference

PROMPT = """\
Two assistants, A and B, were given the same instruction. Decide which answer serves the person who gave it better: \
does it do what was asked, is what it says true, is it clear? Neither length nor style nor the order in which the \
answers are shown is a reason to prefer one.

# Instruction
{instruction}

# Answer of A
{first}

# Answer of B
{second}

# Your decision
Give your reason in at most three sentences. Then end with one line, which is one of these:
Verdict: A
Verdict: B
Verdict: tie
"""

CANDIDATE, BASELINE, TIE = "candidate", "baseline", "tie"
UNPARSED, REFUSED = "unparsed", "refused"
SCORES = {CANDIDATE: 1.0, TIE: 0.5, BASELINE: 0.0}
"""What a verdict counts for the candidate."""

_VERDICT = re.compile(r"(?i:verdict)\W*(?:(?i:answer|assistant|a) )?((?i:tie)\b|[AB]\b)")


class Pair(NamedTuple):
    """Two answers to one instruction."""

    example_id: str
    instruction: str
    candidate: str
    """Answer of the model whose win rate is asked for."""
    baseline: str
    """Answer of the model it is compared with."""


class Question(NamedTuple):
    """One pair in one order."""

    pair: Pair
    shown_first: str
    """`candidate` or `baseline`."""

    @property
    def conversation(self) -> Conversation:
        """What the judge is asked."""
        pair = self.pair
        first, second = pair.candidate, pair.baseline
        if self.shown_first == BASELINE:
            first, second = second, first
        return [{"role": "user", "content": PROMPT.format(instruction=pair.instruction, first=first, second=second)}]

    def row(self, reply: Reply) -> dict[str, Any]:
        """Row (schema VERDICTS) of the judge's reply."""
        return {
            "example_id": self.pair.example_id,
            "shown_first": self.shown_first,
            "verdict": self._verdict(reply),
            "reply": reply.text,
        }

    def _verdict(self, reply: Reply) -> str:
        if reply.refused:
            return REFUSED
        return UNPARSED if reply.cut else parse_verdict(reply.text, self.shown_first)


def judge_pairs(
    pairs: Iterable[Pair], ask: Ask, *, done: Container[tuple[str, str]] = frozenset()
) -> Iterator[dict[str, Any]]:
    """Yield the rows (schema VERDICTS) of all pairs, each pair in both orders, as the replies come.

    Args:
        pairs: answers to compare.
        ask: the judge.
        done: `(example_id, shown_first)` of rows there are already; they are not asked again.

    Raises what `ask` raises.
    """
    all_questions = (Question(pair, shown) for pair in pairs for shown in (CANDIDATE, BASELINE))
    questions, asked = tee(
        question for question in all_questions if (question.pair.example_id, question.shown_first) not in done
    )
    replies = ask(question.conversation for question in asked)
    for question, reply in zip(questions, replies, strict=True):
        yield question.row(reply)


def parse_verdict(reply: str, shown_first: str) -> str:
    """`candidate`, `baseline` or `tie` by the reply's last `Verdict:`, `unparsed` without one."""
    found = _VERDICT.findall(reply)
    if not found:
        return UNPARSED
    if found[-1].lower() == TIE:
        return TIE
    return shown_first if found[-1] == "A" else BASELINE if shown_first == CANDIDATE else CANDIDATE


def pair_scores(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """example_id -> share of its two verdicts that the candidate won (a tie is half of one), for pairs with both."""
    return {example_id: fmean(scores) for example_id, scores in _both_orders(rows).items()}


def win_rate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the verdicts say.

    Returns:
        pairs: judged in both orders; wins, ties, losses of the candidate among them, by both verdicts together;
        win_rate: mean share won with its 95 % interval over pairs (where all ended alike, up to what would do so in one
        of 40 cases) and standard error; follows_place: share of pairs whose two verdicts both went to the answer shown
        first, or both to the one shown second; first_place: share of the verdicts without ties that went to the answer
        shown first, .5 for a fair judge; verdicts: rows by verdict, `unparsed` and `refused` ones among them, whose
        pairs count nowhere else.

    Raises:
        DataError: fewer than two pairs have a verdict in both orders.
    """
    verdicts = Counter(row["verdict"] for row in rows)
    both = _both_orders(rows)
    if len(both) < 2:
        reply = next((row["reply"] for row in rows if row["verdict"] not in SCORES), "")
        raise DataError(
            f"{len(both)} pairs have a verdict in both orders ({dict(verdicts)}), a win rate needs two: take a judge "
            f"that follows its instructions, or give it room to reply (max_tokens); it said {reply[-200:]!r}"
        )
    shares = [fmean(scores) for scores in both.values()]
    rate = paired_difference(shares, [0.0] * len(shares))
    if rate.low == rate.high:
        reach = 1 - 0.025 ** (1 / len(shares))
        rate = rate._replace(low=rate.mean - reach, high=rate.mean + reach)
    # Student's t of few pairs knows no ends.
    rate = rate._replace(low=max(rate.low, 0.0), high=min(rate.high, 1.0))
    decided = [row for row in rows if row["verdict"] in (CANDIDATE, BASELINE)]
    return {
        "pairs": len(both),
        "wins": sum(share > 0.5 for share in shares),
        "ties": shares.count(0.5),
        "losses": sum(share < 0.5 for share in shares),
        "win_rate": rate._asdict(),
        "follows_place": sum(sorted(scores) == [0.0, 1.0] for scores in both.values()) / len(both),
        "first_place": fmean(row["verdict"] == row["shown_first"] for row in decided) if decided else None,
        "verdicts": dict(verdicts),
    }


def _both_orders(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """example_id -> the candidate's scores in both orders, of pairs whose verdicts could both be read."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if row["verdict"] in SCORES:
            scores.setdefault(row["example_id"], []).append(SCORES[row["verdict"]])
    return {example_id: both for example_id, both in scores.items() if len(both) == 2}
