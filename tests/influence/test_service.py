"""A scoring actor: loaded once, it gives the rows a scorer of this process gives, and says plainly what it refuses."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import ray
import torch

from montessori_ray.config import Score, WorkerResources
from montessori_ray.errors import ConfigError, DataError, ModelError, ResourceError
from montessori_ray.influence import service
from montessori_ray.influence.estimators import NotRestoredError
from montessori_ray.influence.scorer import Scorer, join_alone, leave
from montessori_ray.influence.service import CALL_RETRIES, ScoringActor, require_rows, start_scoring_actor
from tests.tiny import rows, write_student

REFERENCE = rows(11, 10_000)
SETTINGS = Score(reference_tokens=64)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("student")
    write_student(directory)
    return directory


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "a", "response": "b"}, "example_id=None"),
        ({"example_id": "x", "instruction": "a", "response": None}, "response=None"),
        ({"example_id": "x", "instruction": 7, "response": "b"}, "instruction=7"),
        (None, "example_id=None"),
    ],
)
def test_a_row_that_is_no_example_is_named(row: Any, said: str) -> None:
    with pytest.raises(DataError, match=f"row 1 of the batch has {said}: give every row the texts example_id"):
        require_rows([rows(1, 0)[0], row])


def test_several_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="group_size is 2, a scoring actor is one process"):
        start_scoring_actor("student", REFERENCE, Score(group_size=2))


def test_a_call_that_kills_its_process_is_not_repeated_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Mock()
    monkeypatch.setattr(ScoringActor, "options", options)
    monkeypatch.setattr(ray, "get", Mock())
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(service, "cluster_nodes", lambda: [{"CPU": 1.0, "GPU": 0.0}])
    start_scoring_actor("student", REFERENCE, SETTINGS)
    told = options.call_args.kwargs
    assert (told["max_restarts"], told["max_task_retries"]) == (-1, CALL_RETRIES)
    assert 0 < CALL_RETRIES < 10


class Spoilt:
    """A scorer that finds, after its first batch, that the student is not as it was."""

    def __init__(self) -> None:
        self.batches = 0

    def score_each(self, batch: Any) -> list[Any]:
        self.batches += 1
        return []

    def verify(self) -> None:
        raise NotRestoredError("weights are others")


def test_an_actor_whose_student_is_spoilt_answers_no_more() -> None:
    kind = ScoringActor.__ray_metadata__.modified_class
    actor = kind.__new__(kind)
    actor._scorer = spoilt = Spoilt()
    for _ in range(2):
        with pytest.raises(ResourceError, match="weights are others: no row of this batch holds; start another"):
            actor.score(rows(2, 0))
    assert spoilt.batches == 1


@pytest.mark.slow
def test_batches_have_the_scores_of_a_scorer_before_and_after_a_death(student: Path, cluster: None) -> None:
    examples = rows(6, 0)
    examples[3]["response"] = " "
    torch.set_num_threads(1)
    join_alone()
    try:
        scorer = Scorer(student, REFERENCE, SETTINGS, chat_template=None, max_length=64, worker="here")
        expected = [scorer.score(row) for row in examples]
    finally:
        leave()
    actor = start_scoring_actor(student, REFERENCE, SETTINGS, max_length=64)
    first = ray.get(actor.score.remote(examples[:4]))
    assert [row["quarantine"] for row in first] == [None, None, None, "empty response"]
    with pytest.raises(DataError, match="row 0 of the batch has response=None"):
        ray.get(actor.score.remote([{"example_id": "x", "instruction": "a"}]))
    ray.kill(actor, no_restart=False)
    second = ray.get(actor.score.remote(examples[4:]))
    assert [(row["example_id"], row["loss_after"], row["influence"]) for row in first + second] == [
        (score.example_id, score.loss_after, score.influence) for score in expected
    ]
    assert ray.get(actor.baselines.remote())["null_step_loss"] == expected[0].loss_before
    ray.kill(actor)


@pytest.mark.slow
def test_an_actor_for_which_there_is_no_room_is_refused(student: Path, cluster: None) -> None:
    settings = SETTINGS.model_copy(update={"worker": WorkerResources(cpus=8)})
    with pytest.raises(ResourceError, match=r"a scoring actor asks for 1 x \(8 CPU\) at once, the cluster has"):
        start_scoring_actor(student, REFERENCE, settings, max_length=64)


@pytest.mark.slow
def test_an_actor_that_ends_while_it_loads_is_told_of_in_a_sentence(
    student: Path, cluster: None, tmp_path: Path
) -> None:
    shutil.copytree(student, tmp_path / "weightless", ignore=shutil.ignore_patterns("model*"))
    with pytest.raises(
        ResourceError, match=r"the scoring actor ended while it loaded .*/weightless: OSError"
    ) as caught:
        start_scoring_actor(tmp_path / "weightless", REFERENCE, SETTINGS, max_length=64)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.slow
def test_a_student_that_cannot_step_is_said_plainly(student: Path, cluster: None, tmp_path: Path) -> None:
    shutil.copytree(student, tmp_path / "unwarmed", ignore=shutil.ignore_patterns("optimizer*"))
    with pytest.raises(ModelError, match=r"unwarmed has no optimizer.json, so the student was not warmed up") as caught:
        start_scoring_actor(tmp_path / "unwarmed", REFERENCE, SETTINGS, max_length=64)
    assert len(str(caught.value).splitlines()) == 1
