"""Synthesize: the teacher writes instructions from few-shot prompts, then answers them (paper section 3.1)."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import compress, groupby, islice
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from ray.exceptions import RayTaskError

from montessori_ray.artifacts.storage import rows_of
from montessori_ray.config import Sampling
from montessori_ray.errors import UserError
from montessori_ray.stages.base import StageContext
from montessori_ray.stages.judging import concurrency_of, rendered
from montessori_ray.stages.schemas import RESPONSES
from montessori_ray.synthesis.client import GenerationRequest, PoolClient
from montessori_ray.synthesis.instructions import KEPT, InstructionWriter
from montessori_ray.synthesis.prompts import prompt_style, render
from montessori_ray.telemetry.progress import ProgressChannel


def synthesize_instructions(
    context: StageContext, *, name: str, stream: str, target: int, learn_shots: bool = True
) -> dict[str, Any]:
    """Sample until `target` instructions are kept; every prompt's samples are committed in prompt order.

    Args:
        context: inputs are the seeds and the teacher.
        name: prefix of the prompt ids.
        stream: what the prompts are drawn from; equal streams give equal prompts.
        target: instructions to keep.
        learn_shots: later prompts show earlier generations too.
    """
    from montessori_ray.training.chat import open_tokenizer  # late: see stages/__init__.py

    settings = context.config.synthesize
    writer = InstructionWriter(
        settings, seeds=context.input(0).column("instruction"), name=name, stream=stream, target=target,
        seed=context.config.seed, learn_shots=learn_shots,
    )  # fmt: skip
    for _, rows in groupby(context.output.rows(), key=lambda row: row["prompt_id"]):
        writer.replay(list(rows))
    style = prompt_style(settings.prompt_style)
    tokenizer = open_tokenizer(context.model(1))
    digest = context.input(1).require().digest
    context.progress.update(writer.num_kept, target, unit="instructions")
    uncommitted: list[dict[str, Any]] = []
    while prompts := writer.next_prompts():
        texts = [render(tokenizer, style, prompt.shots) for prompt in prompts]
        requests = [
            request_for(text, settings.instructions, settings.n, prompt.seed, style.stop)
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        for position, samples in context.pool.generate_all(requests, concurrency=concurrency_of(context)):
            raw_outputs = [sample.text for sample in samples]
            uncommitted += writer.judge(prompts[position], texts[position], raw_outputs, digest)
            if len(uncommitted) >= settings.commit_prompts * settings.n or position == len(prompts) - 1:
                context.append(uncommitted)
                uncommitted = []
                context.progress.update(writer.num_kept, target, unit="instructions")
    return {"samples": writer.statuses.total(), "kept": writer.num_kept, "statuses": dict(writer.statuses)}


DRAINING = 3
"""Times as many parts are answered at once as would fill the pool: a part waits for its longest answer, and none begins
in the place of those it has. Simulated, 256 sequences a replica, answers of 240 tokens on average and 1,024 at most:
31 % of the pool is busy with as many parts as fill it, 84 % with three times as many."""


def request_for(text: str, sampling: Sampling, n: int, seed: int, stop: tuple[str, ...]) -> GenerationRequest:
    """`n` samples of a chat-rendered text."""
    return GenerationRequest(
        prompt=text, n=n, seed=seed, temperature=sampling.temperature, top_p=sampling.top_p,
        presence_penalty=sampling.presence_penalty, max_tokens=sampling.max_tokens, stop=stop,
    )  # fmt: skip


def synthesize_responses(context: StageContext) -> dict[str, Any]:
    """Answer every kept instruction: a Ray Data pipeline over the pool, one part of responses a part of instructions
    that has any.

    The pipeline preserves order, so the parts that are committed are the first ones, and a resumed stage goes on with
    the next part.
    """
    total = context.input(0).require().details["kept"]
    answered = sum(table.num_rows for table in context.output.tables(["example_id"]))
    context.progress.update(answered, total, unit="responses")
    for table in _answered_parts(context, _parts_with_kept(context)[len(context.output.parts()) :]):
        context.output.append(table)
    finish_reasons = context.output.column("finish_reason")
    return {
        "responses": len(finish_reasons),
        "truncated": sum(reason == "length" for reason in finish_reasons),
        "tokens": sum(context.output.column("num_tokens")),
    }


def _parts_with_kept(context: StageContext) -> list[str]:
    """Paths of the parts of instructions in which the filters kept one; Ray Data passes on no empty table."""
    instructions = context.input(0)
    kept = (KEPT in table.column("status").to_pylist() for table in instructions.tables(["status"]))
    return list(compress(instructions.part_paths(), kept))


def _answered_parts(context: StageContext, parts: list[str]) -> Iterator[pa.Table]:
    """A table of responses for each part of instructions, in their order; Ray Data bounds what is in flight.

    Its actors, one a replica, only wait for answers, so they ask for no CPU: the pool may hold all there are.
    """
    import ray.data  # late: see stages/__init__.py

    if not parts:
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # set by its import; the run's own console says what matters
    data_context = ray.data.DataContext.get_current()
    data_context.execution_options.preserve_order = True
    data_context.enable_progress_bars = False
    data_context.raise_original_map_exception = True
    pool, settings = context.config.pool, context.config.synthesize
    of_a_replica = math.ceil(DRAINING * pool.max_num_seqs / (settings.commit_prompts * settings.n))
    actors = ray.data.ActorPoolStrategy(
        size=min(len(parts), pool.replicas),
        max_concurrent_calls_per_actor=of_a_replica, max_tasks_in_flight_per_actor=of_a_replica,
    )  # fmt: skip
    items = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    arguments = (context.pool, settings.responses, context.config.seed, context.progress)
    tables = items.map_batches(
        PartAnswerer, fn_constructor_args=arguments, batch_format="pyarrow", batch_size=None, num_cpus=0, compute=actors
    )
    batches: Any = tables.iter_batches(batch_format="pyarrow", batch_size=None)
    try:
        for table in batches:
            yield table.select(RESPONSES.names).cast(RESPONSES)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


class PartAnswerer:
    """What an actor of Ray Data does, for several parts at once."""

    def __init__(self, client: PoolClient, sampling: Sampling, seed: int, progress: ProgressChannel) -> None:
        self._client = client
        self._sampling = sampling
        self._seed = seed
        self._progress = progress

    async def __call__(self, item: pa.Table) -> pa.Table:
        """Responses (schema RESPONSES) to the kept instructions of one part; `item` has one row, the part's path."""
        with fsspec.open(item["part"][0].as_py(), "rb") as file:
            rows = [row for row in rows_of(pq.read_table(file)) if row["status"] == KEPT]
        await asyncio.gather(*map(self._answer, rows))
        return pa.Table.from_pylist(rows, schema=RESPONSES)

    async def _answer(self, row: dict[str, Any]) -> None:
        """Add its response to the row of an instruction."""
        request = request_for(row["instruction"], self._sampling, 1, seed_of(row["example_id"], self._seed), ())
        (sample,) = await self._client.generate(replace(request, is_message=True))
        row |= {
            "response": sample.text.strip(), "finish_reason": sample.finish_reason, "num_tokens": sample.num_tokens,
        }  # fmt: skip
        self._progress.advance()


def synthesize_candidates(context: StageContext) -> dict[str, Any]:
    """Several responses to each of the first probed instructions, so that responses can be compared (paper, ablations).

    Inputs: the probing set and the teacher that answers. As many instructions are answered as give about the probing
    set's number of examples; every few instructions are committed, in order. Those with `synthesize.drop_truncated` in
    which every answer is cut have no row, and are answered again where a killed stage goes on just there.
    """
    from montessori_ray.training.chat import open_tokenizer  # late: see stages/__init__.py

    config = context.config
    sampling, count = config.synthesize.responses, config.tune_teacher.candidates
    wanted = math.ceil(config.split.probing / count)
    probed = list(islice(context.input(0).rows(["example_id", "instruction"]), wanted))
    tokenizer = open_tokenizer(context.model(1))
    answered = set(context.output.column("prompt_id"))
    todo = probed[max((at for at, row in enumerate(probed, 1) if row["example_id"] in answered), default=0) :]
    texts = [rendered(tokenizer, [{"role": "user", "content": row["instruction"]}]) for row in todo]
    requests = [
        request_for(text, sampling, count, seed_of(row["example_id"], config.seed), ())
        for row, text in zip(todo, texts, strict=True)
    ]
    uncommitted: list[dict[str, Any]] = []
    for number, samples in context.pool.generate_all(requests, concurrency=concurrency_of(context)):
        uncommitted += [
            {
                "example_id": f"{todo[number]['example_id']}-r{position}",
                "prompt_id": todo[number]["example_id"],
                "prompt": texts[number],
                "raw_output": sample.text,
                "instruction": todo[number]["instruction"],
                "response": sample.text.strip(),
            }
            for position, sample in enumerate(samples)
            if not (config.synthesize.drop_truncated and sample.finish_reason == "length")
        ]
        if len(uncommitted) >= config.synthesize.commit_prompts * count or number == len(todo) - 1:
            context.append(uncommitted)
            uncommitted = []
        context.progress.update(len(probed) - len(todo) + number + 1, len(probed), unit="instructions")
    return {"instructions": len(probed)}


def seed_of(example_id: str, seed: int) -> int:
    """A sampling seed of its own for every example, whichever batch it is in."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{example_id}".encode()).digest()[:4], "big")
