"""One vLLM engine, as a replica of the teacher pool runs it.

vLLM's processes (the engine core and its workers) are children of this one, but do not notice when it is killed: they
would live on with their memory and their GPU (measured, vLLM 0.32). `_bind_children` sees to it that they do not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from montessori_ray.config import Pool
from montessori_ray.errors import ModelError
from montessori_ray.synthesis.client import GenerationRequest, Sample
from montessori_ray.templates import apply_template
from montessori_ray.training.chat import context_of

_GIB = 2**30

NEVER = -100.0
"""Bias on the logit of a token that is not to be sampled, the strongest vLLM takes."""


class TeacherEngine:
    """An asynchronous vLLM engine for one model directory; many `generate` calls at once share its batches.

    Create it in a process of its own, started with the variables of `pool.replica_environment`: it changes the process
    group, and when vLLM's processes die, `generate` ends this one.

    Raises ModelError when vLLM cannot serve the directory with these settings; the message holds vLLM's first cause.
    """

    def __init__(self, model_dir: str, pool: Pool) -> None:
        if not (Path(model_dir) / "config.json").is_file():
            raise ModelError(
                f"{model_dir} is not a model directory on this node: it has no config.json; give a Hugging Face model "
                "directory that every node sees, and for models of the Hub an HF_HOME that they share"
            )
        require_device(pool, on_cpu=current_platform.is_cpu())
        _bind_children()
        self._engine = _start(model_dir, pool)
        settings = self._engine.vllm_config.model_config
        self._max_model_len: int = settings.max_model_len
        self._tokenizer = AutoTokenizer.from_pretrained(
            settings.tokenizer,
            trust_remote_code=settings.trust_remote_code,
            mistral_format=False,  # see open_tokenizer
        )
        ending = SamplingParams()  # by vLLM's own rule
        ending.update_from_generation_config(settings.try_get_generation_config(), self._tokenizer.eos_token_id)
        self._turn_ends = ending.all_stop_token_ids

    async def generate(self, request: GenerationRequest) -> list[Sample]:
        """The `n` samples of a request, in sample order, cut where the context ends.

        Raises ModelError when the prompt leaves no room in it.
        """
        # vLLM would add a second beginning-of-sequence token to a text prompt.
        token_ids = self._tokenizer.encode(self._rendered(request), add_special_tokens=False)
        room = self._max_model_len - len(token_ids)
        if room < 1:
            raise ModelError(
                f"a prompt of {len(token_ids)} tokens does not fit the context of {self._max_model_len} tokens: raise "
                "pool.max_model_len, take a model with a longer context, or use shorter prompts"
            )
        request = replace(request, max_tokens=min(request.max_tokens, room))
        try:
            final = await self._final_output(token_ids, _sampling_params(request, self._turn_ends))
        except EngineDeadError:
            # Failing health checks would take three periods, in which an idle-looking replica draws ever more requests
            # and loses them. A dead process is noticed at once, and callers know that case already.
            os._exit(1)
        assert [output.index for output in final.outputs] == list(range(request.n))
        return [_to_sample(output) for output in final.outputs]

    def _rendered(self, request: GenerationRequest) -> str:
        if not request.is_message:
            return request.prompt
        chat = [{"role": "user", "content": request.prompt}]
        return str(apply_template(self._tokenizer, chat, tokenize=False, add_generation_prompt=True))

    async def _final_output(self, token_ids: list[int], params: SamplingParams) -> RequestOutput:
        outputs = self._engine.generate(TokensPrompt(prompt_token_ids=token_ids), params, uuid.uuid4().hex)
        (final,) = [output async for output in outputs]
        return final

    async def check_health(self) -> None:
        """Raise `EngineDeadError` when the engine is dead."""
        await self._engine.check_health()

    def close(self) -> None:
        """End vLLM's processes and wait for them, so that their memory is free."""
        self._engine.shutdown()


def require_device(pool: Pool, *, on_cpu: bool) -> None:
    """Refuse a replica without a GPU where vLLM would take one that Ray has not given it, and one it cannot use.

    Raises:
        ModelError: see above.
    """
    if on_cpu and pool.worker.gpus:
        raise ModelError(
            f"pool.worker.gpus is {pool.worker.gpus:g}, but the installed vLLM is the one for CPUs: set it to 0, or "
            "install the CUDA packages (make setup LOCK=cuda)"
        )
    if not on_cpu and not pool.worker.gpus:
        raise ModelError(
            "pool.worker.gpus is 0, but the installed vLLM is the one for GPUs: set it to 1 or more (as "
            "configs/quickstart_gpu.yaml does), or install the CPU packages (make setup LOCK=cpu)"
        )


def _engine_arguments(model_dir: str, pool: Pool) -> dict[str, Any]:
    """Arguments of the engine; what `pool.engine` says comes last."""
    arguments: dict[str, Any] = {
        "model": model_dir,
        "dtype": pool.dtype,
        "max_model_len": context_of(model_dir, pool.max_model_len),
        "max_num_seqs": pool.max_num_seqs,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    kv_cache_gb = pool.kv_cache_gb
    if pool.worker.gpus > 1:
        # "mp": inside an actor with a placement group vLLM would choose Ray, whose actors outlive a killed replica.
        arguments |= {"tensor_parallel_size": int(pool.worker.gpus), "distributed_executor_backend": "mp"}
    if not pool.worker.gpus:
        kv_cache_gb = kv_cache_gb or 1.0
        # A seeded request that is prefilled in chunks crashes the engine on CPUs: vLLM then rewinds the request's
        # generator, which PyTorch's CPU generator cannot do. With chunked prefill off the scheduler lets a prompt wait
        # until it fits whole, also one that is prefilled again after preemption, and vLLM itself insists on
        # max_num_batched_tokens >= max_model_len, so every prompt does fit. How many prompts wait does not matter.
        arguments |= {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(pool.max_model_len, pool.max_num_seqs, 4096),
        }
    if 0 < pool.worker.gpus < 1:  # vLLM wants its share free of the whole GPU, whatever the cache takes
        arguments["gpu_memory_utilization"] = 0.9 * pool.worker.gpus
    if kv_cache_gb is not None:
        arguments["kv_cache_memory_bytes"] = int(kv_cache_gb * _GIB)
    return arguments | pool.engine


def _sampling_params(request: GenerationRequest, turn_ends: Iterable[int]) -> SamplingParams:
    return SamplingParams(
        n=request.n,
        seed=request.seed,
        temperature=request.temperature,
        top_p=request.top_p,
        presence_penalty=request.presence_penalty,
        max_tokens=request.max_tokens,
        stop=list(request.stop),
        logit_bias=dict.fromkeys(turn_ends, NEVER) if request.stop else None,
        include_stop_str_in_output=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _to_sample(output: Any) -> Sample:
    assert output.finish_reason in ("stop", "length"), f"vLLM ended a sample with {output.finish_reason!r}"
    return Sample(output.text, output.finish_reason, len(output.token_ids))


def _start(model_dir: str, pool: Pool) -> AsyncLLM:
    """Start vLLM, turning its refusals into `ModelError`s that name their first cause."""
    try:
        arguments = AsyncEngineArgs(**_engine_arguments(model_dir, pool))
        engine_config = arguments.create_engine_config()
    except (ValueError, TypeError, OSError) as error:  # pydantic's ValidationError is a ValueError
        raise ModelError(f"vLLM cannot serve {model_dir} with these pool settings: {_one_line(str(error))}") from error
    log = _OwnLog()
    try:
        return AsyncLLM.from_vllm_config(engine_config, disable_log_stats=True)
    except RuntimeError as error:
        # The cause happened in a child process; vLLM says it in the log only.
        cause = first_exception(log.new_text()) or _one_line(str(error))
        raise ModelError(f"vLLM could not start on {model_dir}: {cause}") from error


class _OwnLog:
    """What this process and its children write to standard output and error, where these are files (Ray workers)."""

    def __init__(self) -> None:
        paths = {os.path.realpath(f"/proc/self/fd/{stream}") for stream in (1, 2)}
        self._starts = {path: os.path.getsize(path) for path in paths if os.path.isfile(path)}

    def new_text(self) -> str:
        """What was written since this object was made."""
        texts = []
        for path, start in self._starts.items():
            with open(path, "rb") as file:
                file.seek(start)
                texts.append(file.read().decode(errors="replace"))
        return "\n".join(texts)


_EXCEPTION_LINE = re.compile(r"(?:^|[\]\s])(?:[a-z_]\w*\.)*([A-Z]\w*(?:Error|Exception)): (.+)$", re.MULTILINE)


def first_exception(text: str) -> str | None:
    """The first exception that tracebacks in a text end with, as "Type: message"; None if there is none."""
    found = _EXCEPTION_LINE.search(text)
    return None if found is None else f"{found[1]}: {_one_line(found[2])}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


_GUARD = """
import os, signal, sys
sys.stdin.buffer.read()
os.killpg(int(sys.argv[1]), signal.SIGKILL)
"""


def _bind_children() -> None:
    """Have every later child process of this one killed when this one ends, however it ends.

    This process becomes the leader of a new process group, which its children share. A small process outside of the
    group waits for the end of a pipe that only this process holds open, and then kills the group.
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    read_end, _write_end = os.pipe()  # the write end is never closed, and no child inherits it (PEP 446)
    subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _GUARD, str(os.getpid())], stdin=read_end, start_new_session=True
    )
    os.close(read_end)
