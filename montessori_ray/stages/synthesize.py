"""Synthesize: the teacher writes instructions from few-shot prompts, then answers them (paper section 3.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from montessori_ray.config import Sampling
from montessori_ray.stages.base import StageContext
from montessori_ray.stages.schemas import RESPONSES
from montessori_ray.synthesis.client import GenerationRequest, PoolClient
from montessori_ray.synthesis.instructions import KEPT, InstructionWriter
from montessori_ray.synthesis.prompts import prompt_style, render

RESPONSES_A_BLOCK = 32
"""Responses committed together, and the rows of one Ray Data block."""


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
    from transformers import AutoTokenizer  # late: see stages/__init__.py

    settings = context.config.synthesize
    writer = InstructionWriter(
        settings, seeds=context.input(0).column("instruction"), name=name, stream=stream, target=target,
        seed=context.config.seed, learn_shots=learn_shots,
    )  # fmt: skip
    for _, rows in groupby(context.output.rows(), key=lambda row: row["prompt_id"]):
        writer.replay(list(rows))
    style = prompt_style(settings.prompt_style)
    tokenizer = AutoTokenizer.from_pretrained(context.model(1))
    digest = context.input(1).require().digest
    context.progress.update(writer.num_kept, target, unit="instructions")
    uncommitted: list[dict[str, Any]] = []
    while prompts := writer.next_prompts():
        texts = [render(tokenizer, style, prompt.shots) for prompt in prompts]
        requests = [
            _request(text, settings.instructions, settings.n, prompt.seed, style.stop)
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        for position, samples in context.pool.generate_all(requests, concurrency=_concurrency(context, settings.n)):
            raw_outputs = [sample.text for sample in samples]
            uncommitted += writer.judge(prompts[position], texts[position], raw_outputs, digest)
            if len(uncommitted) >= settings.commit_prompts * settings.n or position == len(prompts) - 1:
                context.append(uncommitted)
                uncommitted = []
                context.progress.update(writer.num_kept, target, unit="instructions")
    return {"samples": writer.statuses.total(), "kept": writer.num_kept, "statuses": dict(writer.statuses)}


def _concurrency(context: StageContext, n: int) -> int:
    """Requests in flight that fill every replica's batch, and a few to wait at the door."""
    pool = context.config.pool
    return pool.replicas * (max(1, pool.max_num_seqs // n) + 4)


def _request(text: str, sampling: Sampling, n: int, seed: int, stop: tuple[str, ...]) -> GenerationRequest:
    return GenerationRequest(
        prompt=text, n=n, seed=seed, temperature=sampling.temperature, top_p=sampling.top_p,
        presence_penalty=sampling.presence_penalty, max_tokens=sampling.max_tokens, stop=stop,
    )  # fmt: skip


def synthesize_responses(context: StageContext) -> dict[str, Any]:
    """Answer every kept instruction: a Ray Data pipeline over the pool, committed in the order of the instructions.

    The order is preserved, so what is committed is a prefix and a resumed stage skips just that many rows.
    """
    committed = sum(table.num_rows for table in context.output.tables(["example_id"]))
    total = context.input(0).require().details["kept"]
    context.progress.update(committed, total, unit="responses")
    if committed < total:
        answer = partial(
            _answer, client=context.pool, sampling=context.config.synthesize.responses, seed=context.config.seed,
            tokenizer_folder=str(context.model(1)), concurrency=RESPONSES_A_BLOCK,
        )  # fmt: skip
        for table in _stream(context, committed, answer):
            context.output.append(table.select(RESPONSES.names).cast(RESPONSES))
            committed += table.num_rows
            context.progress.update(committed, total, unit="responses")
    finish_reasons = context.output.column("finish_reason")
    num_tokens = context.output.column("num_tokens")
    return {
        "responses": len(finish_reasons),
        "truncated": sum(reason == "length" for reason in finish_reasons),
        "tokens": sum(num_tokens),
    }


def _stream(context: StageContext, skip: int, answer: Any) -> Iterator[pa.Table]:
    """Tables of answered instructions, in order; Ray Data bounds what is in flight."""
    import ray.data  # late: see stages/__init__.py

    data_context = ray.data.DataContext.get_current()
    data_context.execution_options.preserve_order = True
    data_context.enable_progress_bars = False
    blocks = _instruction_blocks(context, skip)
    pool = context.config.pool
    in_flight = max(2, pool.replicas * pool.max_num_seqs // RESPONSES_A_BLOCK)
    answered = ray.data.from_arrow(blocks).map_batches(
        answer, batch_format="pyarrow", batch_size=None, num_cpus=0, concurrency=in_flight
    )
    yield from answered.iter_batches(batch_format="pyarrow", batch_size=RESPONSES_A_BLOCK)


def _instruction_blocks(context: StageContext, skip: int) -> list[pa.Table]:
    """The kept instructions after the first `skip`, in blocks of RESPONSES_A_BLOCK rows."""
    columns = ["example_id", "prompt_id", "instruction", "teacher_digest", "status"]
    table = pa.concat_tables(list(context.input(0).tables(columns)))
    kept = table.filter(pc.equal(table["status"], KEPT)).drop_columns("status").slice(skip)
    return [kept.slice(start, RESPONSES_A_BLOCK) for start in range(0, kept.num_rows, RESPONSES_A_BLOCK)]


def _answer(
    table: pa.Table, *, client: PoolClient, sampling: Sampling, seed: int, tokenizer_folder: str, concurrency: int
) -> pa.Table:
    """The block with the columns `response`, `finish_reason`, `num_tokens`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    requests = []
    for row in table.to_pylist():
        message = [{"role": "user", "content": row["instruction"]}]
        text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        requests.append(_request(text, sampling, 1, _seed_of(row["example_id"], seed), ()))
    samples = [answers[0] for _, answers in client.generate_all(requests, concurrency=concurrency)]
    table = table.append_column("response", pa.array([sample.text.strip() for sample in samples], pa.string()))
    table = table.append_column("finish_reason", pa.array([sample.finish_reason for sample in samples], pa.string()))
    return table.append_column("num_tokens", pa.array([sample.num_tokens for sample in samples], pa.int32()))


def _seed_of(example_id: str, seed: int) -> int:
    """A sampling seed of its own for every example, whichever batch it is in."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{example_id}".encode()).digest()[:4], "big")
