"""Ray Train runs that fail or cannot be placed. The loops are closures: pickled by value."""

import os
from unittest.mock import Mock

import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, NodeDiedError, RayTaskError, WorkerCrashedError

from montessori_ray.config import WorkerResources
from montessori_ray.errors import ModelError
from montessori_ray.training.ray_train import TrainingFailed, _fit, run_training, start_training, training_result


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "4"
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    yield
    ray.shutdown()
    del os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]


@pytest.mark.parametrize(
    "error",
    [WorkerCrashedError(), NodeDiedError("gone"), RayTaskError("train:a", "-", ActorDiedError()).as_instanceof_cause()],
)
def test_the_death_of_the_process_that_drives_a_run_is_a_failed_run(monkeypatch, error):
    monkeypatch.setattr(ray, "get", Mock(side_effect=[GetTimeoutError, error]))
    with pytest.raises(TrainingFailed, match=r"^the process that drives training a died for good \(.*(Died|Crashed)"):
        training_result(None, "a")


def test_a_mistake_in_the_code_is_none(monkeypatch):
    error = RayTaskError("train:a", "-", ZeroDivisionError()).as_instanceof_cause()
    monkeypatch.setattr(ray, "get", Mock(side_effect=error))
    with pytest.raises(ZeroDivisionError):
        training_result(None, "a")


def test_a_run_without_failures_of_its_workers_survives_those_of_its_driver(monkeypatch):
    options = Mock(side_effect=_fit.options)
    monkeypatch.setattr(_fit, "options", options)
    monkeypatch.setattr(ray.remote_function.RemoteFunction, "_remote", Mock())
    start_training(dict, {}, name="a", storage="", workers=1, worker=WorkerResources(), max_failures=0)
    assert options.call_args.kwargs["max_retries"] > 0
    assert not any(issubclass(TrainingFailed, kind) for kind in options.call_args.kwargs["retry_exceptions"])


@pytest.mark.slow
def test_two_runs_at_once_have_their_threads_and_return_what_rank_0_does(cluster, tmp_path):
    def loop(settings):
        import torch

        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        environment = {"threads": torch.get_num_threads(), "accelerator": os.environ["DS_ACCELERATOR"]}
        return {"rank": rank, "world": world, **environment, **settings}

    runs = [
        start_training(
            loop, {"given": index}, name=f"run-{index}", storage=str(tmp_path), workers=1,
            worker=WorkerResources(cpus=1),
        )
        for index in range(2)
    ]  # fmt: skip
    expected = {"rank": 0, "world": 1, "threads": 1, "accelerator": "cpu"}
    assert [training_result(run, "run") for run in runs] == [expected | {"given": 0}, expected | {"given": 1}]


@pytest.mark.slow
def test_the_first_cause_is_named_not_what_followed(cluster, tmp_path):
    def loop(settings):
        import torch

        if torch.distributed.get_rank() == 1:
            raise ValueError("row 17 is odd\nand more")
        torch.distributed.barrier()

    with pytest.raises(TrainingFailed, match=r"^training odd failed: worker 1 of 2 raised ValueError: row 17 is odd$"):
        run_training(loop, {}, name="odd", storage=str(tmp_path), workers=2, worker=WorkerResources(), max_failures=0)


@pytest.mark.slow
def test_a_users_mistake_is_not_tried_again(cluster, tmp_path):
    def loop(settings):
        with (settings["folder"] / "tries").open("a") as file:
            file.write("x")
        raise ModelError("the student has no chat template")

    with pytest.raises(TrainingFailed, match=r"^training mistake failed: the student has no chat template$"):
        run_training(
            loop, {"folder": tmp_path}, name="mistake", storage=str(tmp_path), workers=1, worker=WorkerResources()
        )
    assert (tmp_path / "tries").read_text() == "x"


@pytest.mark.slow
def test_what_finds_no_room_fails_instead_of_waiting(cluster, tmp_path):
    with pytest.raises(TrainingFailed, match=r"training huge failed: 2 workers of 4 CPU could not be started"):
        run_training(
            dict, {}, name="huge", storage=str(tmp_path), workers=2, worker=WorkerResources(cpus=4), max_failures=1
        )
