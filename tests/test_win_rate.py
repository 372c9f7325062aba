"""Students answer in the real pool and are judged: at an endpoint that fails meanwhile, and by the teacher itself."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import Driver, wait_for_end
from tests.evaluation.serving import serving

pytestmark = pytest.mark.slow

SHOWN = re.compile(r"# Answer of A\n(.*?)\n\n# Answer of B\n(.*?)\n\n# Your decision", re.DOTALL)


def longer_wins(messages: list[dict[str, str]]) -> str:
    first, second = SHOWN.findall(messages[0]["content"])[0]
    return "Verdict: " + ("tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B")


def judged_by(url: str) -> str:
    return f"evaluate.judge={{model: judge, base_url: {url}, concurrency: 2}}"


@pytest.fixture
def finished(small_run: Driver, tmp_path: Path) -> Driver:
    """A copy of the complete small run, which has no judge."""
    driver = Driver(tmp_path / "run")
    shutil.copytree(small_run.run, driver.run)
    return driver


def test_trained_and_original_student_are_compared(finished: Driver) -> None:
    failing = iter([False] * 7 + [True] * 1000)
    with serving(lambda messages: (500, "broken") if next(failing) else longer_wins(messages)) as (url, _):
        process = finished.start(judged_by(url))
        assert process.wait(timeout=600) == 2
        wait_for_end(process.pid)
    assert "gave no answer (" in finished.log.read_text()
    kept = finished.rows("final/win_rate")
    assert 4 <= len(kept) <= 7

    with serving(longer_wins) as (url, requests):  # another port: an endpoint may move
        printed = finished.finish(judged_by(url))
    verdicts = finished.rows("final/win_rate")
    held_out = [row["example_id"] for row in finished.rows("inputs/held_out")]
    assert verdicts[: len(kept)] == kept
    assert len(requests) == len(verdicts) - len(kept)
    assert [(row["example_id"], row["shown_first"]) for row in verdicts] == [
        (example_id, shown) for example_id in held_out for shown in ("candidate", "baseline")
    ]
    lengths = {
        name: {row["example_id"]: len(row["response"]) for row in finished.rows(f"final/answers_{name}")}
        for name in ("original", "trained")
    }
    for row in verdicts:
        longer, shorter = (lengths[name][row["example_id"]] for name in ("trained", "original"))
        assert row["verdict"] == ("tie" if longer == shorter else "candidate" if longer > shorter else "baseline")
    wins = sum(lengths["trained"][row] > lengths["original"][row] for row in held_out)
    assert f"{wins} won" in printed
    assert "no length-controlled win rate: 8 judged pairs, 25 are needed" in printed


def test_the_teacher_judges_in_the_pool(finished: Driver) -> None:
    """A model of this size mostly gives no verdict; then that is what the run says."""
    process = finished.start("evaluate.judge={model: pool, max_tokens: 32}")
    status = process.wait(timeout=600)
    wait_for_end(process.pid)
    verdicts = finished.rows("final/win_rate")
    assert len(verdicts) == 16
    assert all(row["reply"] for row in verdicts)
    readable = {row["example_id"] for row in verdicts if row["verdict"] in ("candidate", "baseline", "tie")}
    unreadable = {row["example_id"] for row in verdicts if row["verdict"] in ("unparsed", "refused")}
    assert status == (0 if len(readable - unreadable) > 1 else 2)
    if status:
        assert "a win rate needs two: take a judge that follows its instructions" in finished.log.read_text()
