"""The teacher pool on tiny random models: order, seeds, replacement of the model, errors, and killed processes."""

import asyncio
import itertools
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
import torch
from ray.exceptions import ActorDiedError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from montessori_ray.config import Pool, WorkerResources
from montessori_ray.errors import ModelError, ResourceError
from montessori_ray.synthesis import client as client_module
from montessori_ray.synthesis.client import GenerationRequest, PoolClient, Sample
from montessori_ray.synthesis.pool import TeacherPool

CONTEXT = 512

POOL = Pool(
    worker=WorkerResources(cpus=2),
    max_model_len=CONTEXT,
    max_num_seqs=64,
    kv_cache_gb=0.01,  # 5,120 tokens of the tiny model: busy tests preempt sequences, which are then prefilled again
    dtype="float32",
    engine={"enforce_eager": True, "max_num_batched_tokens": CONTEXT},  # the least vLLM takes: one long prompt a batch
    start_timeout_s=300,
)


def request(prompt: str, *, n: int = 1, seed: int = 0, max_tokens: int = 16, stop: tuple[str, ...] = ()):
    return GenerationRequest(
        f"<s>{prompt}",
        n=n,
        seed=seed,
        temperature=1.0,
        top_p=1.0,
        presence_penalty=0.0,
        max_tokens=max_tokens,
        stop=stop,
    )


def generate(client: PoolClient, *requests: GenerationRequest, concurrency: int = 16) -> list[list[Sample]]:
    return [samples for _, samples in client.generate_all(requests, concurrency=concurrency)]


# The client alone ------------------------------------------------------------------------------------------------


class ScriptedClient(PoolClient):
    """Answers request i after `delay(i)` seconds with its seed; keeps count of what is under way."""

    def __init__(self, delay: Callable[[int], float]) -> None:
        super().__init__("none", max_retries=2, patience_s=1)
        self.delay = delay
        self.running = self.most_running = self.cancelled = 0

    async def _send(self, request: GenerationRequest) -> list[Sample]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.delay(request.seed))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return [Sample(str(request.seed), "stop", 1)]


def test_results_come_in_order_and_concurrency_is_bounded() -> None:
    client = ScriptedClient(lambda index: 0.02 if index % 5 == 0 else 0.001)
    results = list(client.generate_all((request("", seed=i) for i in range(50)), concurrency=4))
    assert results == [(i, [Sample(str(i), "stop", 1)]) for i in range(50)]
    assert client.most_running == 4


def test_requests_are_read_a_bounded_number_ahead_and_cancelled_at_an_early_end() -> None:
    client = ScriptedClient(lambda index: 0 if index == 0 else 60)
    read: list[int] = []

    def requests() -> Iterator[GenerationRequest]:
        for i in itertools.count():
            read.append(i)
            yield request("", seed=i)

    results = client.generate_all(requests(), concurrency=2)
    assert next(results)[0] == 0
    time.sleep(0.1)
    assert len(read) == 8
    results.close()  # type: ignore[attr-defined]
    assert client.running == 0
    assert client.cancelled == 2


def test_results_before_a_failed_request_are_yielded() -> None:
    class Failing(ScriptedClient):
        async def _send(self, request: GenerationRequest) -> list[Sample]:
            if request.seed == 2:
                raise ModelError("too long")
            return await super()._send(request)

    results = Failing(lambda index: 0.01).generate_all((request("", seed=i) for i in range(5)), concurrency=5)
    assert [next(results)[0], next(results)[0]] == [0, 1]
    with pytest.raises(ModelError, match="too long"):
        next(results)


@pytest.mark.parametrize("deaths", [1, 2, 3])
def test_a_lost_request_is_sent_again_as_it_was(deaths: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_WAIT_S", 0.001)
    sent: list[GenerationRequest] = []

    class Dying(ScriptedClient):
        async def _send(self, request: GenerationRequest) -> list[Sample]:
            sent.append(request)
            if len(sent) <= deaths:
                raise ActorDiedError
            return await super()._send(request)

    one = request("", seed=7)
    if deaths <= 2:  # max_retries
        assert asyncio.run(Dying(lambda _: 0).generate(one)) == [Sample("7", "stop", 1)]
        assert sent == [one] * (deaths + 1)
    else:
        with pytest.raises(ResourceError, match="sent to the teacher pool 3 times"):
            asyncio.run(Dying(lambda _: 0).generate(one))


def test_a_client_can_be_pickled() -> None:
    client = pickle.loads(pickle.dumps(PoolClient("teacher", max_retries=3, patience_s=9)))
    assert (client._app, client._max_retries, client._patience_s) == ("teacher", 3, 9)


def test_the_first_cause_is_found_in_vllms_log() -> None:
    from montessori_ray.synthesis.engine import first_exception

    log = (
        "(EngineCore pid=9) ERROR 11-23 22:16:12 [core.py:1136] EngineCore failed to start.\n"
        "(EngineCore pid=9) ERROR 11-23 22:16:12 [core.py:1136] Traceback (most recent call last):\n"
        '(EngineCore pid=9) ERROR 11-23 22:16:12 [core.py:1136]   File "kv.py", line 1, in check\n'
        "(EngineCore pid=9) ERROR 11-23 22:16:12 [core.py:1136]     raise ValueError(\n"
        "(EngineCore pid=9) ERROR 11-23 22:16:12 [core.py:1136] ValueError: the KV cache  is too small\n"
        "RuntimeError: Engine core initialization failed.\n"
    )
    assert first_exception(log) == "ValueError: the KV cache is too small"
    assert first_exception("INFO all is well") is None


@pytest.mark.parametrize(("gpus", "on_cpu"), [(1, True), (0, False)])
def test_a_replica_without_the_device_its_vllm_is_for_is_refused(gpus: int, on_cpu: bool) -> None:
    from montessori_ray.synthesis.engine import require_device

    require_device(Pool(worker=WorkerResources(gpus=gpus)), on_cpu=not on_cpu)
    with pytest.raises(ModelError, match=rf"pool\.worker\.gpus is {gpus}, but the installed vLLM is the one for"):
        require_device(Pool(worker=WorkerResources(gpus=gpus)), on_cpu=on_cpu)


# With replicas ---------------------------------------------------------------------------------------------------


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; like Llama's, it puts <s> before a text unless told not to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two directories of tiny Llamas with different random weights."""
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
    )
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        path = tmp_path_factory.mktemp(f"teacher_{seed}")
        LlamaForCausalLM(config).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        paths.append(str(path))
    return paths[0], paths[1]


@pytest.fixture(scope="module")
def pool() -> Iterator[TeacherPool]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        environment.setenv("OMP_NUM_THREADS", "2")
        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000)
        pool = TeacherPool(POOL)
        try:
            yield pool
        finally:
            pool.release()
            ray.shutdown()


@pytest.fixture
def client(pool: TeacherPool, teachers: tuple[str, str]) -> PoolClient:
    """A client of the pool with the first teacher hosted (which costs nothing where it is already)."""
    pool.host(teachers[0])
    return pool.client()


def replica_processes() -> list[psutil.Process]:
    """The replica's process, its engine core and the engine's worker, in this order."""
    for process in psutil.Process().children(recursive=True):
        if process.status() != psutil.STATUS_ZOMBIE and "TeacherReplica" in process.name() + "".join(process.cmdline()):
            (core,) = [child for child in process.children() if "EngineCore" in child.name()]
            (worker,) = [child for child in core.children() if "Worker" in child.name()]
            return [process, core, worker]
    raise AssertionError("there is no replica")


def gone(processes: list[psutil.Process], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
def test_samples_depend_on_their_seed_only(client: PoolClient) -> None:
    together, *single = generate(
        client, request("a", n=3, seed=10), *(request("a", seed=10 + i) for i in range(3)), request("a", seed=99)
    )
    texts = [sample.text for sample in together]
    assert len(set(texts)) == 3
    assert [samples[0].text for samples in single[:3]] == texts
    assert single[3][0].text not in texts
    assert generate(client, request("a", n=3, seed=10)) == [together]
    assert {(sample.finish_reason, sample.num_tokens) for sample in together} == {("length", 16)}


@pytest.mark.slow
def test_a_stop_text_ends_a_sample_and_is_part_of_it(client: PoolClient) -> None:
    ((free,),) = generate(client, request("a", seed=3, max_tokens=64))
    stop = next(character for character in free.text[8:] if character.isascii())
    ((stopped,),) = generate(client, request("a", seed=3, max_tokens=64, stop=(stop,)))
    assert stopped.text == free.text[: free.text.index(stop) + 1]
    assert stopped.finish_reason == "stop"


@pytest.mark.slow
def test_a_turn_does_not_end_where_a_stop_text_is_due(client: PoolClient) -> None:
    """One token of 258 ends a turn, so of 32 samples with 64 tokens seven or so end early when they may."""
    free, bound = generate(
        client, request("a", n=32, max_tokens=64), request("a", n=32, max_tokens=64, stop=("</instruction>",))
    )
    ended = [sample.finish_reason == "stop" for sample in free]
    assert any(ended)
    assert {sample.finish_reason for sample in bound} == {"length"}
    for early, without, with_stop in zip(ended, free, bound, strict=True):
        assert with_stop.text.startswith(without.text)
        assert early or with_stop.text == without.text, "nothing else changes"


@pytest.mark.slow
def test_a_crowd_of_seeded_prompts_does_not_crash_the_engine(client: PoolClient) -> None:
    # A batch of 512 tokens holds one prompt of 380 and a piece of the next, and that piece crashes seeded requests on
    # CPUs where vLLM may cut (this test fails with enable_chunked_prefill). Each sample then needs one cache block (128
    # tokens) more than its prompt, and of the 40 blocks none is left: sequences are preempted and prefilled again.
    requests = [request(f"{i:03d}" + "x" * 376, n=2, seed=2 * i, max_tokens=24) for i in range(60)]
    results = list(client.generate_all(requests, concurrency=60))
    assert [index for index, _ in results] == list(range(60))
    assert all(len(samples) == 2 for _, samples in results)
    assert replica_processes()


@pytest.mark.slow
def test_an_answer_ends_with_the_context_and_a_prompt_without_room_is_refused(client: PoolClient) -> None:
    room = CONTEXT - 1  # the prompt's own <s> is a token, and no second one is added
    ((sample,),) = generate(client, request("y" * (room - 2), max_tokens=8))
    assert sample.num_tokens <= 2
    with pytest.raises(ModelError, match=rf"prompt of {CONTEXT} tokens does not fit the context of {CONTEXT} tokens"):
        generate(client, request("y" * room, max_tokens=8))


@pytest.mark.slow
def test_a_client_works_inside_a_task(client: PoolClient) -> None:
    @ray.remote(num_cpus=0)
    def remote(client: PoolClient) -> list[Sample]:
        return asyncio.run(client.generate(request("a", n=2, seed=5)))

    assert ray.get(remote.remote(client)) == generate(client, request("a", n=2, seed=5))[0]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2], ids=["replica", "engine core", "engine worker"])
def test_no_request_is_lost_and_no_process_left_when_one_is_killed(client: PoolClient, victim: int) -> None:
    requests = [request(f"{i}", n=2, seed=2 * i, max_tokens=200) for i in range(80)]
    processes = replica_processes()
    results = []
    for index, samples in client.generate_all(requests, concurrency=16):
        if index == 10:
            os.kill(processes[victim].pid, signal.SIGKILL)
        results.append((index, len(samples)))
    assert results == [(i, 2) for i in range(80)]
    assert gone(processes, within_s=5)


@pytest.mark.slow
def test_another_model_takes_the_place_of_the_hosted_one(
    pool: TeacherPool, client: PoolClient, teachers: tuple[str, str]
) -> None:
    one = request("a", n=2, seed=5)
    of_first = generate(client, one)
    processes = replica_processes()
    pool.host(teachers[0])
    assert replica_processes() == processes
    pool.host(teachers[1])
    assert gone(processes, within_s=0.5)
    assert generate(client, one) != of_first


@pytest.mark.slow
def test_release_ends_the_processes_and_frees_the_resources(pool: TeacherPool, client: PoolClient) -> None:
    processes = replica_processes()
    assert "CPU" not in ray.available_resources()
    pool.release()
    assert gone(processes, within_s=0.5)
    assert ray.available_resources()["CPU"] == 2
    with pytest.raises(ResourceError, match="hosts no model"):
        generate(pool.client(), request("a"))


@pytest.mark.slow
def test_a_model_with_a_shorter_context_is_served_with_its_own(
    pool: TeacherPool, teachers: tuple[str, str], tmp_path: Path
) -> None:
    """A student that answers in the pool need not have the teacher's context."""
    short = AutoConfig.from_pretrained(teachers[0], max_position_embeddings=CONTEXT // 2)
    AutoModelForCausalLM.from_pretrained(teachers[0], config=short).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    pool.host(str(tmp_path))
    (samples,) = generate(pool.client(), request("a"))
    assert samples[0].num_tokens == 16
    with pytest.raises(ModelError, match=rf"context of {CONTEXT // 2} tokens"):
        generate(pool.client(), request("a" * (CONTEXT // 2)))


@pytest.mark.slow
def test_a_directory_without_a_model_is_refused(pool: TeacherPool, tmp_path) -> None:
    with pytest.raises(ModelError, match=r"is not a model directory .* no config.json"):
        pool.host(str(tmp_path))
    assert ray.available_resources()["CPU"] == 2


@pytest.mark.slow
def test_vllms_own_reason_is_told(pool: TeacherPool, teachers: tuple[str, str]) -> None:
    starved = TeacherPool(POOL.model_copy(update={"kv_cache_gb": 0.0005}), name="starved")
    with pytest.raises(ModelError, match=r"could not start on .* ValueError: .* KV cache"):
        starved.host(teachers[0])


@pytest.mark.slow
def test_the_next_driver_finds_the_replicas_of_one_that_was_killed(
    pool: TeacherPool, teachers: tuple[str, str]
) -> None:
    pool.host(teachers[0])
    next_drivers = TeacherPool(POOL, name=pool._name)
    assert next_drivers.is_left_over()
    assert not pool.is_left_over()
    next_drivers.release()
    assert not next_drivers.is_left_over()
    assert ray.available_resources()["CPU"] == 2


@pytest.mark.slow
def test_a_shared_gpu_is_shared(teachers: tuple[str, str]) -> None:
    from montessori_ray.synthesis.engine import _engine_arguments

    shares = {
        gpus: _engine_arguments(teachers[0], POOL.model_copy(update={"worker": WorkerResources(gpus=gpus)}))
        for gpus in (0.5, 1)
    }
    assert shares[0.5]["gpu_memory_utilization"] == 0.45
    assert "gpu_memory_utilization" not in shares[1]


@pytest.mark.slow
def test_a_pool_that_the_cluster_cannot_place_fails_in_time(pool: TeacherPool, teachers: tuple[str, str]) -> None:
    pool.release()
    too_big = TeacherPool(
        POOL.model_copy(update={"worker": WorkerResources(cpus=64), "start_timeout_s": 3}), name="too-big"
    )
    with pytest.raises(ResourceError, match=r"not healthy .* within 3 s .* 1 x {'CPU': 64.0}.* CPU 2"):
        too_big.host(teachers[0])
