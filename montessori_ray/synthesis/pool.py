"""The teacher pool: vLLM replicas of one model as a Ray Serve deployment, and its driver-side owner.

    pool = TeacherPool(config.pool)
    pool.host("/shared/teacher")          # returns when every replica is healthy
    client = pool.client()                # see montessori_ray.synthesis.client
    pool.host("/shared/tuned-teacher")    # the old replicas go first: there need not be room for both
    pool.release()                        # resources are back

Serve checks the replicas' health and restarts dead ones; nothing here listens on a port. Serve itself stays up, without
a replica, for as long as the cluster: on a shared one other runs hold handles of its controller between their pools.
"""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING

import ray
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, LoggingConfig

from montessori_ray.config import Pool
from montessori_ray.errors import ModelError, ResourceError, UserError
from montessori_ray.synthesis.client import GenerationRequest, PoolClient, Sample

if TYPE_CHECKING:
    from montessori_ray.synthesis.engine import TeacherEngine

_HEALTH_CHECK_PERIOD_S = 2.0
_SHUTDOWN_S = 10.0
"""Seconds a replica has to end its requests and its engine; then it is killed."""

_START_ATTEMPTS = 2
"""Failed starts allowed for each replica (ports and memory may be taken for a moment)."""

_POLL_S = 0.5

_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""Serve's own log; by default it has a line for every request."""


class TeacherReplica:
    """One replica: a vLLM engine in a Ray Serve replica's process."""

    _engine: TeacherEngine | None = None

    def __init__(self, model_dir: str, config: Pool) -> None:
        # Imported here and not above: the driver needs no vLLM, whose import takes 6 s and 0.7 GB.
        from montessori_ray.synthesis.engine import TeacherEngine

        self._engine = TeacherEngine(model_dir, config)

    async def generate(self, request: GenerationRequest) -> list[Sample] | UserError:
        """The samples of a request (see `TeacherEngine.generate`), or what is wrong with it.

        The error is returned because Serve would log the traceback of one that is raised.
        """
        assert self._engine is not None
        try:
            return await self._engine.generate(request)
        except UserError as error:
            return error

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises."""
        assert self._engine is not None
        await self._engine.check_health()

    def __del__(self) -> None:
        """Called by Serve when the replica is to go."""
        if self._engine is not None:
            self._engine.close()


class TeacherPool:
    """Owns the replicas: which model they serve, and when they give their resources back.

    Args:
        config: the pool's settings.
        name: name of its Ray Serve application. A pool takes over the name from an earlier driver's pool that was not
            released (a driver that was killed); runs that share a cluster need different names.
    """

    def __init__(self, config: Pool, *, name: str = "teacher") -> None:
        self._config = config
        self._name = name
        self._hosted: str | None = None

    def host(self, model_dir: str) -> bool:
        """Have all replicas serve a model directory, and return when they are healthy.

        The directory must be visible from every node that may get a replica. Hosting the model already hosted does
        nothing and returns False; another model's replicas are ended before the new ones start.

        Raises:
            ModelError: vLLM cannot serve the directory with these settings.
            ResourceError: not all replicas were healthy within `start_timeout_s`.
        """
        model_dir = os.path.abspath(model_dir)
        if model_dir == self._hosted:
            return False
        self.release()
        serve.start(proxy_location=ProxyLocation.Disabled, logging_config=_QUIET)
        deployment = _deployment(self._config).bind(model_dir, self._config)
        target = serve.RunTarget(deployment, name=self._name, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)
        try:
            self._wait_until_healthy(model_dir)
        except (ModelError, ResourceError):
            self.release()
            raise
        self._hosted = model_dir
        return True

    def is_left_over(self) -> bool:
        """Whether the replicas of an earlier driver, which was killed, still hold resources."""
        return self._hosted is None and self._name in serve.status().applications

    def client(self) -> PoolClient:
        """A client of this pool; it stays valid when the pool hosts another model."""
        return PoolClient(self._name, max_retries=self._config.max_retries, patience_s=self._config.start_timeout_s)

    def release(self) -> None:
        """End the replicas, and return when their processes have ended and Ray has their resources back."""
        self._hosted = None
        if self._name in serve.status().applications:
            serve.delete(self._name)

    def _wait_until_healthy(self, model_dir: str) -> None:
        deadline = time.monotonic() + self._config.start_timeout_s
        while (application := serve.status().applications[self._name]).status != ApplicationStatus.RUNNING:
            failed = application.status == ApplicationStatus.DEPLOY_FAILED  # never where one replica runs
            if failed or time.monotonic() > deadline:
                message = _failure(application)
                if refused := re.search(r"montessori_ray\.errors\.ModelError: (.+)", message):
                    raise ModelError(refused[1])
                if failed:
                    raise ResourceError(f"the teacher pool could not be started on {model_dir}: {message}")
                raise ResourceError(self._too_slow(model_dir))
            time.sleep(_POLL_S)

    def _too_slow(self, model_dir: str) -> str:
        config = self._config
        return (
            f"the teacher pool was not healthy on {model_dir} within {config.start_timeout_s:.0f} s "
            f"(pool.start_timeout_s): it asks for {config.replicas} x {config.worker.bundle}, and of the cluster's "
            f"{_amounts(ray.cluster_resources())} these are free: {_amounts(ray.available_resources())}; ask for less, "
            f"or give it more time{self._others()}"
        )

    def _others(self) -> str:
        others = sorted(serve.status().applications.keys() - {self._name})
        if not others:
            return ""
        return (
            f". Other applications on this cluster: {', '.join(others)}; a teacher pool whose driver was killed stays "
            "until its run is continued, or until `serve shutdown` on this node ends all of them"
        )


def replica_environment(config: Pool) -> dict[str, str]:
    """Environment variables of a replica's process; vLLM's processes inherit them."""
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "OMP_NUM_THREADS": str(config.worker.threads),
    }
    if not config.worker.gpus:
        # vLLM's own binding takes every core but one whatever Ray granted (148 instead of 182 tokens/s on two cores)
        # and puts several engines of a node on the same cores. Without it, the process that computes obeys
        # OMP_NUM_THREADS.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return environment


def _deployment(config: Pool) -> serve.Deployment:
    deploy = serve.deployment(
        num_replicas=config.replicas,
        ray_actor_options={
            "num_cpus": config.worker.cpus,
            "num_gpus": config.worker.gpus,
            "runtime_env": {"env_vars": replica_environment(config)},
        },
        # The engine queues by itself; Serve need only spread requests over replicas.
        max_ongoing_requests=config.max_num_seqs,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=_SHUTDOWN_S,
        max_constructor_retry_count=_START_ATTEMPTS * config.replicas,
        logging_config=_QUIET,
    )
    return deploy(TeacherReplica)


def _failure(application: ApplicationStatusOverview) -> str:
    """What Serve says about an application and its replicas, tracebacks included."""
    return "\n".join([application.message, *(deployment.message for deployment in application.deployments.values())])


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{name} {resources.get(name, 0):g}" for name in ("CPU", "GPU"))
