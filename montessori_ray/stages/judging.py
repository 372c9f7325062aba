"""What stages that ask a model share: the judge the settings name, and rows committed as its replies come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from montessori_ray.artifacts.run import Run
from montessori_ray.config import Judge
from montessori_ray.errors import ModelError
from montessori_ray.in_order import in_order
from montessori_ray.stages.base import AnySettings, Stage, StageContext
from montessori_ray.synthesis.client import GenerationRequest
from montessori_ray.templates import apply_template

if TYPE_CHECKING:
    from montessori_ray.evaluation.endpoint import Ask, Conversation, Reply

WIN_RATE_JUDGE = "evaluate.judge"
JUDGES = (WIN_RATE_JUDGE, "pair.judge")
"""Settings of a judge; the stage that asks it has them."""

ROWS_A_PART = 32
"""Rows committed together; a kill loses at most these and the ones in flight."""


def commit_parts(context: StageContext, rows: Iterator[dict[str, Any]], total: int, *, unit: str) -> None:
    """Commit rows of the output part by part as they come, with progress; those before an error too."""
    done = len(context.output.column("example_id"))
    part: list[dict[str, Any]] = []
    context.progress.update(done, total, unit=unit)
    try:
        for row in rows:
            part.append(row)
            done += 1
            context.progress.update(done, total, unit=unit)
            if len(part) == ROWS_A_PART:
                whole, part = part, []  # an interrupt after it is written must not write it again
                context.append(whole)
    finally:
        context.append(part)


def require_keys(stages: Iterable[Stage], config: AnySettings, run: Run) -> None:
    """Look for what the judges need that unfinished stages ask, which may be hours into the run: keys, and packages.

    Raises:
        ConfigError: as `ChatEndpoint`, or a win rate is asked for without alpaca-eval.
    """
    asking = [(stage, name) for stage in stages for name in JUDGES if name in stage.settings]
    for stage, name in asking:
        if run.artifact(stage.output).manifest() is None:
            _check_key(attrgetter(name)(stage.config or config))
            if name == WIN_RATE_JUDGE:
                _check_package()


def _check_key(settings: Judge) -> None:
    from montessori_ray.evaluation.endpoint import ChatEndpoint  # late: see stages/__init__.py

    if settings.model != "pool":
        ChatEndpoint(settings)


def _check_package() -> None:
    from montessori_ray.evaluation.alpaca_eval import require_package  # late: see stages/__init__.py

    require_package()


def open_judge(context: StageContext, settings: Judge, *, model: int) -> Ask:
    """The judge; `model` is the position, among the stage's inputs, of the teacher that judges in the pool.

    Raises:
        ConfigError: as `ChatEndpoint`.
    """
    from montessori_ray.evaluation.endpoint import ChatEndpoint  # late: see stages/__init__.py

    return _in_pool(context, settings, model) if settings.model == "pool" else ChatEndpoint(settings)


def _in_pool(context: StageContext, settings: Judge, model: int) -> Ask:
    """Greedy, as a judge at an endpoint is; what does not fit the context is refused, and the others go on."""
    from montessori_ray.evaluation.endpoint import Reply
    from montessori_ray.training.chat import load_tokenizer

    tokenizer, client = load_tokenizer(context.model(model), None), context.pool

    async def answer(conversation: Conversation) -> Reply:
        request = GenerationRequest(
            prompt=rendered(tokenizer, conversation), n=1, seed=0, temperature=0, top_p=1, presence_penalty=0,
            max_tokens=settings.max_tokens,
        )  # fmt: skip
        try:
            (sample,) = await client.generate(request)
        except ModelError as error:
            return Reply(str(error), refused=True)
        return Reply(sample.text, cut=sample.finish_reason == "length")

    def ask(conversations: Iterable[Conversation]) -> Iterator[Reply]:
        return in_order(answer, conversations, concurrency=concurrency_of(context))

    return ask


def concurrency_of(context: StageContext) -> int:
    """Requests in flight that fill every replica's batch, and a few to wait at the door. Of several samples each: as
    many, since a request that waits for its longest sample leaves places free."""
    pool = context.config.pool
    return pool.replicas * (pool.max_num_seqs + 4)


def rendered(tokenizer: Any, conversation: list[dict[str, str]]) -> str:
    """The conversation in the tokenizer's chat template, up to where the model's answer begins."""
    return str(apply_template(tokenizer, conversation, tokenize=False, add_generation_prompt=True))
