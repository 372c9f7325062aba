"""MT-Bench: two-turn dialogues, each answer graded from 1 to 10 by a judge (Zheng et al. 2023), in its file formats.

questions = read_questions(Path("question.jsonl"))                  # FastChat's data/mt_bench
answers = answer_questions(questions, ask_student)                  # or read_answers(Path("model.jsonl"))
print(summarise(list(grade(questions, answers, ask_judge))))
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import tee
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from montessori_ray.errors import DataError, RunError
from montessori_ray.evaluation.endpoint import Ask, Conversation, Reply
from montessori_ray.evaluation.statistics import grouped_mean
from montessori_ray.outputs import parent_of, write_whole

PROMPT = """\
Below is a conversation between a person and an assistant. Grade the assistant's answer to the person's {which} \
message from 1 (useless) to 10 (could not be better): is it helpful, to the point, correct, thorough, and as creative \
and detailed as the message asks for?{reference}

{dialogue}

# Your grade
Give your reasons in a few sentences. Then end with one line, the grade as a number:
Rating: <number>
"""

REFERENCE = """ An answer that is known to be right is shown after the conversation; do not take off points for being \
written differently."""

_RATING = re.compile(r"(?i:rating)(?:\s*\([^)]*\))?\W*(\d+(?:\.\d+)?)")
"""A scale may stand in brackets before the grade."""

WHICH = ("first", "second")

GRADE = ("question_id", "turn", "answer", "rating")
"""Columns of a grade; the first one begins every line."""


class Question(NamedTuple):
    """A dialogue's two messages of the person."""

    question_id: int
    category: str
    turns: tuple[str, str]
    references: tuple[str, ...] = ()
    """Answers known to be right to the first message, or to both, where the question has such (mathematics, coding);
    an empty one is none."""


Answers = Mapping[int, tuple[str, str]]
"""question_id -> the model's answers to both turns."""


def read_questions(path: Path) -> list[Question]:
    """Questions from MT-Bench's `question.jsonl`: `question_id, category, turns` and, for some, `reference`.

    Raises:
        DataError: the file is missing, or a line is not such a row.
    """
    return [
        Question(row["question_id"], row["category"], _two(path, row, row["turns"]), tuple(row.get("reference") or ()))
        for row in _rows(path, ("question_id", "category", "turns"))
    ]


def read_answers(path: Path) -> dict[int, tuple[str, str]]:
    """Answers from a model's file in MT-Bench's `model_answer/`: `question_id, choices[0].turns`.

    Raises:
        DataError: as `read_questions`.
    """
    rows = _rows(path, ("question_id", "choices"))
    return {row["question_id"]: _two(path, row, _first_choice(row).get("turns")) for row in rows}


def _first_choice(row: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = row["choices"]
    found = choices[0] if isinstance(choices, list) and choices else None
    return found if isinstance(found, dict) else {}


def write_answers(path: Path, answers: Answers, *, model: str) -> None:
    """Write answers as MT-Bench's `model_answer/MODEL.jsonl`, which its own scripts judge too."""
    now = time.time()
    rows = [
        {
            "question_id": question_id,
            "answer_id": f"{model}-{question_id}",
            "model_id": model,
            "choices": [{"index": 0, "turns": list(turns)}],
            "tstamp": now,
        }
        for question_id, turns in answers.items()
    ]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def answer_questions(questions: Sequence[Question], ask: Ask) -> dict[int, tuple[str, str]]:
    """A model's answers: to all first messages, then to the second ones, which see the first answer.

    Raises:
        DataError: the model's server refused a message. And what `ask` raises.
    """
    replies = ask(_dialogue(question, []) for question in questions)
    first = [_answered(question, 1, reply) for question, reply in zip(questions, replies, strict=True)]
    replies = ask(_dialogue(question, [said]) for question, said in zip(questions, first, strict=True))
    return {
        question.question_id: (said, _answered(question, 2, reply))
        for question, said, reply in zip(questions, first, replies, strict=True)
    }


def _answered(question: Question, turn: int, reply: Reply) -> str:
    """The model's words; a server's that refused would be graded as if they were."""
    if reply.refused:
        raise DataError(
            f"the server refused question {question.question_id}, turn {turn} ({reply.text}): serve the model with a "
            "longer context, lower max_tokens, or leave the question out"
        )
    return reply.text


def grade(
    questions: Sequence[Question], answers: Answers, ask: Ask, *, done: Container[tuple[int, int]] = frozenset()
) -> Iterator[dict[str, Any]]:
    """Yield a row `question_id, category, turn, answer, rating, reply` for both answers of all questions, as they come.

    Args:
        questions: what was asked.
        answers: a model's answers to all of it.
        ask: the judge.
        done: `(question_id, turn)` of rows there are already; they are not asked again.

    Raises:
        DataError: a question has no answer. And what `ask` raises.
    """
    if missing := [question.question_id for question in questions if question.question_id not in answers]:
        raise DataError(
            f"{len(missing)} of {len(questions)} MT-Bench questions have no answer, the first is {missing[0]}"
        )
    wanted = ((question, turn) for question in questions for turn in (1, 2) if (question.question_id, turn) not in done)
    turns, asked = tee(wanted)
    replies = ask(_judged(question, turn, answers[question.question_id]) for question, turn in asked)
    for (question, turn), reply in zip(turns, replies, strict=True):
        yield {
            "question_id": question.question_id,
            "category": question.category,
            "turn": turn,
            "answer": answers[question.question_id][turn - 1],
            "rating": parse_rating(reply.text) if reply.whole else None,
            "reply": reply.text,
        }


def grade_to_file(
    questions: Sequence[Question], answers: Answers, ask: Ask, output: Path, *, judge: str
) -> dict[str, Any]:
    """`summarise` of the grades of all answers, each kept as a line of a JSONL file when it is there; continues one.

    Args:
        questions, answers, ask: as `grade`.
        output: the file; each row also names its `judge`.
        judge: name of the model behind `ask`.

    Raises:
        DataError: the file holds grades by another judge.
        RunError: the file holds grades of other answers. And what `grade` raises.
    """
    parent_of(output)
    rows = _begun(output)
    if others := sorted({row.get("judge", "a judge it does not name") for row in rows} - {judge}):
        raise DataError(
            f"{output} holds grades by {', '.join(others)}, now the judge is {judge}: a score is of one judge, choose "
            "another output"
        )
    for row in rows:
        if row["answer"] != answers.get(row["question_id"], ("", ""))[row["turn"] - 1]:
            raise RunError(f"{output} holds grades of other answers: choose another output, or remove it")
    done = {(row["question_id"], row["turn"]) for row in rows}
    with output.open("a", encoding="utf-8") as file:
        for row in grade(questions, answers, ask, done=done):
            row["judge"] = judge
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            rows.append(row)
    return summarise(rows)


def _begun(output: Path) -> list[dict[str, Any]]:
    """Rows of an earlier session, without a last line that a kill cut off.

    Raises:
        DataError: the file is no such file; it is left as it is.
    """
    if not output.exists():
        return []
    rows = _rows(output, GRADE, cut=True)
    whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if whole != output.read_text(encoding="utf-8"):
        write_whole(output, whole)
    return rows


def parse_rating(reply: str) -> float | None:
    """The reply's last `Rating:`, None without one from 1 to 10."""
    found = _RATING.findall(reply)
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 10 else None


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """MT-Bench's score: `score`, the mean rating of all answers with its standard error over questions, the same of
    `turns` 1 and 2 and of `categories`, the number of `graded` answers and of those `without_rating`, which count
    nowhere.

    Raises:
        DataError: no reply holds a rating.
    """
    rated = [row for row in rows if row["rating"] is not None]
    if not rated:
        said = rows[0]["reply"][-200:] if rows else ""
        raise DataError(
            f"none of {len(rows)} replies holds a rating: take a judge that follows its instructions, or give it "
            f"room to reply (max_tokens); {said!r}"
        )
    return {
        "score": _mean_rating(rated),
        "turns": _by(rated, "turn"),
        "categories": _by(rated, "category"),
        "graded": len(rated),
        "without_rating": len(rows) - len(rated),
    }


def _by(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, Any]:
    values = Counter(row[column] for row in rows)
    return {str(value): _mean_rating([row for row in rows if row[column] == value]) for value in values}


def _mean_rating(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """With its standard error over questions, if there are several: the two answers to one are not independent."""
    by_question: dict[Any, list[float]] = {}
    for row in rows:
        by_question.setdefault(row["question_id"], []).append(row["rating"])
    found = grouped_mean(list(by_question.values()))
    return {"mean": found.mean, "se": found.se if isfinite(found.se) else None}


def _dialogue(question: Question, said: Sequence[str]) -> Conversation:
    """The person's messages up to the next answer, and the answers `said` to the earlier ones."""
    messages: Conversation = []
    for number, answer in enumerate(said):
        messages += [
            {"role": "user", "content": question.turns[number]}, {"role": "assistant", "content": answer}
        ]  # fmt: skip
    return [*messages, {"role": "user", "content": question.turns[len(said)]}]


def _judged(question: Question, turn: int, answers: tuple[str, str]) -> Conversation:
    """What the judge is asked about the answer to a turn: it sees the dialogue up to that answer."""
    parts = []
    for number in range(turn):
        parts += [f"# Person\n{question.turns[number]}", f"# Assistant\n{answers[number]}"]
    reference = "".join(question.references[turn - 1 : turn])
    if reference:
        parts.append(f"# An answer known to be right\n{reference}")
    prompt = PROMPT.format(which=WHICH[turn - 1], reference=REFERENCE if reference else "", dialogue="\n\n".join(parts))
    return [{"role": "user", "content": prompt}]


def _rows(path: Path, columns: tuple[str, ...], *, cut: bool = False) -> list[dict[str, Any]]:
    """Rows of a JSONL file; with `cut` its last line may be part of one, which is left out."""
    try:
        *lines, last = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        if last.strip() and not (cut and _is_cut(last, columns)):
            rows.append(json.loads(last))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"cannot read {path} as JSONL: {error}") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is {row!r}; expected an object with {', '.join(columns)}")
        if missing := [column for column in columns if column not in row]:
            raise DataError(f"{path}: row {number} has no {', '.join(missing)}; expected {', '.join(columns)}")
    return rows


def _is_cut(line: str, columns: tuple[str, ...]) -> bool:
    """Whether a line is the beginning of a row as it is written here, its end missing."""
    begins = f'{{"{columns[0]}": '
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return line.startswith(begins) or begins.startswith(line)
    return False


def _two(path: Path, row: dict[str, Any], turns: Any) -> tuple[str, str]:
    if not isinstance(turns, list) or len(turns) != 2:
        raise DataError(f"{path}: question {row['question_id']} needs a list of two turns, it has {turns!r}")
    return (str(turns[0]), str(turns[1]))
