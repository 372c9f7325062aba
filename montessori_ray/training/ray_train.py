"""Ray Train runs: start one, wait for it so that Ctrl-C works, say in a sentence why it failed.

    metrics = run_training(loop, settings, name="warm_up-1f2e", storage="/run/train", workers=2, worker=resources)

`loop(settings)` runs on every worker with `torch.distributed` set up (gloo, or nccl where workers have GPUs). A worker
that dies, or a later call with the same name and storage, goes on from the last checkpoint given to
`ray.train.report`, which the loop reads with `ray.train.get_checkpoint`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import ray
import torch
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.train import UserCallback
from ray.train.torch import TorchConfig
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

# What `ray.train` and `ray.train.torch` hand out at run time; type checkers find version 1 of them there.
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2.api.result import Result
from ray.train.v2.torch.torch_trainer import TorchTrainer

from montessori_ray.config import WorkerResources
from montessori_ray.errors import UserError

Loop = Callable[[dict[str, Any]], dict[str, Any] | None]

START_TIMEOUT_S = 300
"""Seconds one attempt to place the workers may wait, with `max_failures` more attempts, where the environment does not
set Ray's own variable. Ray's default is 60, too short where several runs queue or nodes are being added, and attempts
without limit, which hangs where they never come."""

POLL_S = 0.5
"""Seconds between looks at a run, for the driver (Ctrl-C) and for Ray Train's controller (its default is 2)."""

DRIVER_RETRIES = 3
"""Times a run's own process, or Ray Train's controller, is started again when it dies: no failure of the workers."""

STOP_TIMEOUT_S = 20
"""Seconds a cancelled run may take to stop its workers before its process is killed."""


class TrainingFailed(UserError):  # noqa: N818 - what happened, as TrainingFailedError is Ray Train's own
    """A training run could not be placed or failed more often than allowed; the first cause in a sentence."""


class NotPlaced(TrainingFailed):
    """The workers of a training run found no room in time: nothing is wrong with the run itself."""


def run_training(
    loop: Loop,
    settings: dict[str, Any],
    *,
    name: str,
    storage: str,
    workers: int,
    worker: WorkerResources,
    max_failures: int = 3,
) -> dict[str, Any]:
    """Run `loop(settings)` on `workers` ranks and wait; returns what the loop of rank 0 returned ({} for None).

    Args:
        loop: importable on the workers. Its result comes back through Ray, so keep it small.
        settings: argument of the loop; paths in it must be absolute, workers change their directory.
        name: name of the run; the same name and storage continue from the last checkpoint.
        storage: folder or URL that all nodes see, for checkpoints.
        workers: number of ranks.
        worker: resources of one rank.
        max_failures: times the workers are started again after one died, raised or could not be placed.

    Raises:
        TrainingFailed: see the class.
    """
    training = start_training(
        loop, settings, name=name, storage=storage, workers=workers, worker=worker, max_failures=max_failures
    )
    return training_result(training, name)


def start_training(
    loop: Loop,
    settings: dict[str, Any],
    *,
    name: str,
    storage: str,
    workers: int,
    worker: WorkerResources,
    max_failures: int = 3,
    on_failure: Callable[[], None] | None = None,
) -> ray.ObjectRef[dict[str, Any]]:
    """`run_training` without the wait: several runs at once. Hand the reference to `training_result`.

    `on_failure` is called, in a process of Ray Train's, as soon as a worker has died or raised, before it is replaced.
    """
    # What a user did wrong comes out of it as `TrainingFailed`, which is not tried again.
    fit = _fit.options(name=f"train:{name}", max_retries=DRIVER_RETRIES, retry_exceptions=[RayActorError])
    # As bytes: only the workers import what the loop needs, not the two processes of Ray Train between here and them.
    call = cloudpickle.dumps((loop, settings))
    return fit.remote(call, name, storage, workers, worker, max_failures, on_failure)


def training_result(training: ray.ObjectRef[dict[str, Any]], name: str) -> dict[str, Any]:
    """Wait for the started run `name`; an exception here stops the run and frees its workers before it goes on.

    Raises:
        TrainingFailed: see the class.
    """
    try:
        while True:
            try:
                return ray.get(training, timeout=POLL_S)
            except GetTimeoutError:
                continue
    except RayTaskError as error:
        if isinstance(error.cause, TrainingFailed):
            raise error.cause from None
        if isinstance(error.cause, RayError):
            raise _driver_died(name, error.cause) from None
        raise
    except RayError as error:
        raise _driver_died(name, error) from None
    except KeyboardInterrupt:
        raise  # the driver ends, and Ray ends with it all that it started; see `stop_training` on cancelling
    except BaseException:
        stop_training(training)
        raise


def _driver_died(name: str, error: RayError) -> TrainingFailed:
    return TrainingFailed(
        f"the process that drives training {name} died for good ({type(error).__name__}: killed, out of memory, or its "
        "node was lost): give its node more memory, then start the same command again, which continues"
    )


def stop_training(*trainings: ray.ObjectRef[dict[str, Any]]) -> None:
    """Stop runs: when this returns their workers and placement groups are gone. Finished runs are left alone."""
    # Never a finished run: Ray 2.60 aborts the driver when a task it is told to cancel completes at that moment ("Tried
    # to complete task that was not pending").
    running = _unfinished(trainings, 0)
    for training in running:
        ray.cancel(training)  # reaches Ray Train's interrupt handler, which aborts the controller and its workers
    hanging = _unfinished(running, STOP_TIMEOUT_S)
    for training in hanging:
        ray.cancel(training, force=True)
    _unfinished(hanging, STOP_TIMEOUT_S)


def _unfinished(trainings: Sequence[ray.ObjectRef[Any]], timeout: float) -> list[ray.ObjectRef[Any]]:
    """Those of the runs that have not ended after `timeout` seconds."""
    return ray.wait(list(trainings), num_returns=len(trainings), timeout=timeout)[1] if trainings else []


@ray.remote(num_cpus=0, max_calls=1)
def _fit(
    call: bytes,
    name: str,
    storage: str,
    workers: int,
    worker: WorkerResources,
    max_failures: int,
    on_failure: Callable[[], None] | None,
) -> dict[str, Any]:
    """`TorchTrainer.fit` in a task: beside other runs, away from the driver's signal handlers, retried elsewhere if its
    node dies."""
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_S))
    trainer = TorchTrainer(
        _run_loop,
        train_loop_config={"call": call, "threads": None if worker.gpus else worker.threads},
        torch_config=TorchConfig(backend="nccl" if worker.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=worker.gpus > 0, resources_per_worker=worker.bundle, placement_strategy="PACK"
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[_AfterFailure(on_failure)],
            worker_runtime_env={"env_vars": worker_environment(worker)},
        ),
    )
    try:
        return cast(Result, trainer.fit()).return_value or {}
    except TrainingFailedError as error:
        failed = NotPlaced if _found_no_room(error) else TrainingFailed
        raise failed(f"training {name} failed: {_first_cause(error, workers, worker)}") from None


def worker_environment(worker: WorkerResources) -> dict[str, str]:
    """Environment of a worker process; Ray hands none of the driver's on."""
    variables = {"OMP_NUM_THREADS": str(worker.threads), "TOKENIZERS_PARALLELISM": "false"}
    if not worker.gpus:
        variables["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed takes whatever accelerator library it can import
        variables["CUDA_VISIBLE_DEVICES"] = ""  # or PyTorch finds a GPU node's first one, which is another worker's
    return variables


def _run_loop(config: dict[str, Any]) -> dict[str, Any] | None:
    """The loop, with this thread's share of cores: Ray Train runs it in a thread of its own, which OpenMP's setting of
    the main thread does not reach."""
    if config["threads"] is not None:
        torch.set_num_threads(config["threads"])
    loop, settings = cloudpickle.loads(config["call"])
    return cast(Loop, loop)(settings)


class _AfterFailure(UserCallback):
    """Says that workers failed, and ends a run where it was a mistake of the user's, the same at every attempt."""

    def __init__(self, on_failure: Callable[[], None] | None) -> None:
        self._on_failure = on_failure

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if self._on_failure is not None:
            self._on_failure()
        for failure in worker_exceptions.values():
            cause = _unwrapped(failure)
            if isinstance(cause, UserError):
                raise cause


def _found_no_room(error: TrainingFailedError) -> bool:
    """Whether the last attempt to place the workers ran into its timeout."""
    return isinstance(error, ControllerError) and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)


def _first_cause(error: TrainingFailedError, workers: int, worker: WorkerResources) -> str:
    """What went wrong first, in a sentence."""
    if isinstance(error, ControllerError):
        cause = error.controller_failure
        if isinstance(cause, UserError):
            return str(cause)
        resources = ", ".join(f"{amount:g} {kind}" for kind, amount in worker.bundle.items())
        reason = str(cause).split(". Potential causes")[0].splitlines()[0]
        return f"{workers} workers of {resources} could not be started: {type(cause).__name__}: {reason}"
    assert isinstance(error, WorkerGroupError), error
    failures = [(rank, _unwrapped(failure)) for rank, failure in error.worker_failures.items()]
    rank, cause = min(failures, key=lambda failure: (_is_collateral(failure[1]), failure[0]))
    if isinstance(cause, RayActorError):
        return f"worker {rank} of {workers} died (killed, out of memory, or its node was lost)"
    return f"worker {rank} of {workers} raised {type(cause).__name__}: {(str(cause).strip() or '-').splitlines()[0]}"


def _unwrapped(failure: Exception) -> Exception:
    """The exception itself, out of Ray Train's wrappers (which are not public; the version is pinned)."""
    if isinstance(failure, WorkerHealthCheckFailedError):
        return failure.health_check_failure
    return cast(Exception, failure._base_exc) if isinstance(failure, UserExceptionWithTraceback) else failure


def _is_collateral(cause: Exception) -> bool:
    """Whether an exception is what a collective raises because another rank is gone."""
    return isinstance(cause, RuntimeError) and any(
        sign in str(cause) for sign in ("Connection closed by peer", "Connection reset by peer", "NCCL", "gloo")
    )
