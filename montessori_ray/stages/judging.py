"""What stages that ask a judge share: the judge itself, behind an endpoint or in the pool, and rows committed as they
come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from montessori_ray.config import Judge
from montessori_ray.errors import ModelError
from montessori_ray.stages.base import StageContext
from montessori_ray.synthesis.client import GenerationRequest

if TYPE_CHECKING:
    from montessori_ray.evaluation.endpoint import Ask, Conversation, Reply

ROWS_A_PART = 32
"""Rows committed together; a kill loses at most these and the ones in flight."""


def open_judge(context: StageContext, settings: Judge, *, position: int) -> Ask:
    """The judge of these settings; the stage's input at `position` is the original teacher where it is the judge."""
    from montessori_ray.evaluation.endpoint import ChatEndpoint  # late: see stages/__init__.py

    return _pool_judge(context, settings, position) if settings.model == "pool" else ChatEndpoint(settings)


def commit_parts(context: StageContext, rows: Iterator[dict[str, Any]], total: int, *, unit: str) -> None:
    """Commit rows part by part as they come, with progress."""
    done = len(context.output.column("example_id"))
    context.progress.update(done, total, unit=unit)
    while part := list(islice(rows, ROWS_A_PART)):
        context.append(part)
        done += len(part)
        context.progress.update(done, total, unit=unit)


def rendered(tokenizer: Any, conversation: Conversation) -> str:
    """A conversation as text that an assistant's message follows."""
    return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))


def _pool_judge(context: StageContext, settings: Judge, position: int) -> Ask:
    """The original teacher in the pool, greedy as a judge at an endpoint is."""
    from montessori_ray.evaluation.endpoint import Reply
    from montessori_ray.in_order import in_order
    from montessori_ray.training.chat import load_tokenizer

    tokenizer, client = load_tokenizer(context.model(position), None), context.pool

    async def answer(conversation: Conversation) -> Reply:
        request = GenerationRequest(
            prompt=rendered(tokenizer, conversation), n=1, seed=0, temperature=0, top_p=1, presence_penalty=0,
            max_tokens=settings.max_tokens,
        )  # fmt: skip
        try:
            (sample,) = await client.generate(request)
        except ModelError as error:
            return Reply(str(error), refused=True)
        return Reply(sample.text)

    def ask(conversations: Iterable[Conversation]) -> Iterator[Reply]:
        return in_order(answer, conversations, concurrency=settings.concurrency)

    return ask
