"""MT-Bench on its own file formats, with an assistant and a judge whose words follow from what they are shown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from montessori_ray.errors import DataError, RunError
from montessori_ray.evaluation.endpoint import Conversation, Reply
from montessori_ray.evaluation.mt_bench import (
    answer_questions,
    grade,
    grade_to_file,
    parse_rating,
    read_answers,
    read_questions,
    summarise,
    write_answers,
)

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write about {tea}.", "Shorter!"]},
    {"question_id": 101, "category": "math", "turns": ["2 + 2?", "And 3 + 3?"], "reference": ["4", "6"]},
    {"question_id": 102, "category": "math", "turns": ["7?", "8?"], "reference": ["seven", ""]},
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


def assistant(conversations: Iterable[Conversation]) -> Iterator[Reply]:
    """Says what it was told: role and content of all messages."""
    return (Reply(" | ".join(f"{m['role']}: {m['content']}" for m in messages)) for messages in conversations)


def judge(conversations: Iterable[Conversation]) -> Iterator[Reply]:
    """Grades by the number of turns it sees, two points more with a reference."""
    for (message,) in conversations:
        text = message["content"]
        points = 3 * text.count("# Assistant") + 2 * text.count("# An answer known to be right")
        yield Reply(f"Rating it.\nRating: [[{points}]]")


def test_the_second_turn_sees_the_first(questions: Path) -> None:
    answers = answer_questions(read_questions(questions), assistant)
    assert answers[81] == (
        "user: Write about {tea}.",
        "user: Write about {tea}. | assistant: user: Write about {tea}. | user: Shorter!",
    )


@pytest.mark.parametrize(("longest", "refused"), [(10, "question 81, turn 1"), (30, "question 81, turn 2")])
def test_a_servers_refusal_is_no_answer(questions: Path, longest: int, refused: str) -> None:
    def short_of_context(conversations: Iterable[Conversation]) -> Iterator[Reply]:
        for reply in assistant(conversations):
            yield Reply("too many tokens", refused=True) if len(reply.text) > longest else reply

    with pytest.raises(DataError, match=rf"{refused} \(too many tokens\): serve the model with a longer context"):
        answer_questions(read_questions(questions), short_of_context)


def test_grades_by_hand(questions: Path) -> None:
    asked = read_questions(questions)
    rows = list(grade(asked, answer_questions(asked, assistant), judge))
    assert [(row["question_id"], row["turn"], row["rating"]) for row in rows] == [
        (81, 1, 3), (81, 2, 6), (101, 1, 5), (101, 2, 8), (102, 1, 5), (102, 2, 6),
    ]  # fmt: skip
    found = summarise(rows)
    assert found["score"] == {"mean": 5.5, "se": pytest.approx(12**0.5 / 6)}, "over questions, see grouped_mean"
    assert found["turns"]["1"]["mean"] == pytest.approx(13 / 3)
    assert found["categories"] == {
        "writing": {"mean": 4.5, "se": None}, "math": {"mean": 6, "se": pytest.approx(0.5)},
    }  # fmt: skip
    assert (found["graded"], found["without_rating"]) == (6, 0)


def test_the_judge_sees_the_dialogue_up_to_the_answer_it_grades(questions: Path) -> None:
    asked = read_questions(questions)
    answers = {question.question_id: ("ONE", "TWO") for question in asked}
    prompts: list[str] = []

    def keeping(conversations: Iterable[Conversation]) -> Iterator[Reply]:
        for (message,) in conversations:
            prompts.append(message["content"])
            yield Reply("Rating: 1")

    list(grade(asked, answers, keeping))
    first, second = prompts[2:4]
    assert re.search(r"first message.*2 \+ 2\?.*ONE.*known to be right\n4", first, re.DOTALL)
    assert "TWO" not in first
    assert re.search(r"second message.*2 \+ 2\?.*ONE.*And 3.*TWO.*known to be right\n6", second, re.DOTALL)
    assert "known to be right" not in prompts[0] + prompts[1] + prompts[5]


def test_grading_continues_where_it_was_stopped(questions: Path) -> None:
    asked = read_questions(questions)
    answers = answer_questions(asked, assistant)
    first = list(islice(grade(asked, answers, judge), 3))
    done = {(row["question_id"], row["turn"]) for row in first}
    assert first + list(grade(asked, answers, judge, done=done)) == list(grade(asked, answers, judge))


def test_grades_are_kept_in_a_file_that_a_kill_may_cut(questions: Path, tmp_path: Path) -> None:
    asked = read_questions(questions)
    answers = answer_questions(asked, assistant)
    whole = grade_to_file(asked, answers, judge, tmp_path / "whole.jsonl", judge="counter")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    assert [json.loads(line)["rating"] for line in lines] == [3, 6, 5, 8, 5, 6]
    assert {json.loads(line)["judge"] for line in lines} == {"counter"}
    (tmp_path / "cut.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    assert grade_to_file(asked, answers, judge, tmp_path / "cut.jsonl", judge="counter") == whole
    assert (tmp_path / "cut.jsonl").read_text().splitlines() == lines
    with pytest.raises(RunError, match="grades of other answers"):
        grade_to_file(asked, answers | {101: ("5", "7")}, judge, tmp_path / "cut.jsonl", judge="counter")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a note without a line's end", "cannot read .* as JSONL"),
        ('{"question_id": 81, "choices": [{"turns": ["a", "b"]}]}', "row 0 has no turn, answer, rating"),
        ("[1]\n", r"row 0 is \[1\]; expected an object"),
    ],
)
def test_a_file_that_holds_no_grades_is_left_as_it_is(questions: Path, tmp_path: Path, content: str, said: str) -> None:
    asked, output = read_questions(questions), tmp_path / "notes.txt"
    output.write_text(content)
    with pytest.raises(DataError, match=said):
        grade_to_file(asked, answer_questions(asked, assistant), judge, output, judge="counter")
    assert output.read_text() == content


def test_folders_of_outputs_are_made(questions: Path, tmp_path: Path) -> None:
    asked = read_questions(questions)
    answers = answer_questions(asked, assistant)
    write_answers(tmp_path / "model_answer" / "student.jsonl", answers, model="student")
    assert read_answers(tmp_path / "model_answer" / "student.jsonl") == answers
    assert grade_to_file(asked, answers, judge, tmp_path / "grades" / "a.jsonl", judge="counter")["graded"] == 6
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file cannot be made \(File exists\): name another --output"):
        grade_to_file(asked, answers, judge, tmp_path / "file" / "a.jsonl", judge="counter")


def test_answers_without_a_choice_are_named(tmp_path: Path) -> None:
    (tmp_path / "student.jsonl").write_text('{"question_id": 81, "choices": []}\n')
    with pytest.raises(DataError, match="question 81 needs a list of two turns, it has None"):
        read_answers(tmp_path / "student.jsonl")


def test_a_score_is_one_judges(questions: Path, tmp_path: Path) -> None:
    asked, output = read_questions(questions), tmp_path / "grades.jsonl"
    answers = answer_questions(asked, assistant)
    grade_to_file(asked[:1], answers, judge, output, judge="counter")
    begun = output.read_text()
    with pytest.raises(DataError, match=r"grades by counter, now the judge is reader: .* choose another output"):
        grade_to_file(asked, answers, judge, output, judge="reader")
    assert output.read_text() == begun
    output.write_text(begun.replace(', "judge": "counter"', ""))  # as earlier versions wrote it
    with pytest.raises(DataError, match="grades by a judge it does not name"):
        grade_to_file(asked, answers, judge, output, judge="counter")


def test_answers_travel_in_mt_benchs_format(tmp_path: Path) -> None:
    answers = {81: ("Tee — heiß.", "Tee."), 101: ("4", "6")} | {102: ("one\u2028two", "three\u0085four")}
    write_answers(tmp_path / "student.jsonl", answers, model="student")
    rows = [json.loads(line) for line in (tmp_path / "student.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert rows[0]["choices"] == [{"index": 0, "turns": ["Tee — heiß.", "Tee."]}]
    assert {row["model_id"] for row in rows} == {"student"}
    assert len({row["answer_id"] for row in rows}) == 3
    assert read_answers(tmp_path / "student.jsonl") == answers


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Good.\nRating: 7", 7), ("Rating: [[10]]", 10), ("**Rating:** 8.5/10", 8.5), ("rating 3? No.\nRating: 4", 4),
        ("Rating (1 to 10): 8", 8), ("Rating: 11", None), ("Rating: 0", None), ("Seven of ten.", None), ("", None),
    ],
)  # fmt: skip
def test_ratings_are_read(reply: str, rating: float | None) -> None:
    assert parse_rating(reply) == rating


def test_replies_without_a_rating_are_counted_and_all_of_them_are_an_error() -> None:
    def row(rating: float | None) -> dict[str, object]:
        return {"question_id": 1, "category": "math", "turn": 1, "rating": rating, "reply": "Well."}

    found = summarise([row(4.0), row(None), row(6.0)])
    assert (found["score"]["mean"], found["graded"], found["without_rating"]) == (5, 2, 1)
    with pytest.raises(DataError, match=r"none of 1 replies holds a rating.*Well"):
        summarise([row(None)])


def test_files_that_are_none_of_mt_bench_are_refused(tmp_path: Path, questions: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "other.jsonl").write_text('{"question_id": 1}\n')
    with pytest.raises(DataError, match="row 0 has no category, turns"):
        read_questions(tmp_path / "other.jsonl")
    (tmp_path / "one.jsonl").write_text('{"question_id": 1, "category": "x", "turns": ["alone"]}\n')
    with pytest.raises(DataError, match="question 1 needs a list of two turns"):
        read_questions(tmp_path / "one.jsonl")
    asked = read_questions(questions)
    with pytest.raises(DataError, match="2 of 3 MT-Bench questions have no answer, the first is 101"):
        list(grade(asked, {81: ("a", "b")}, judge))
