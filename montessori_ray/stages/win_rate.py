"""Win rate: students answer the held-out instructions in the teacher pool, and a judge compares their answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from montessori_ray.artifacts.run import Artifact
from montessori_ray.stages.base import StageContext
from montessori_ray.stages.judging import commit_parts, concurrency_of, open_judge, rendered
from montessori_ray.stages.synthesize import request_for, seed_of

if TYPE_CHECKING:
    from montessori_ray.evaluation.judge import Pair
    from montessori_ray.synthesis.client import GenerationRequest


def answer_held_out(context: StageContext) -> dict[str, Any]:
    """A student's answers to the held-out instructions, sampled as the teacher's responses are; continues in order.

    Inputs: held-out rows and the student, which the pool hosts.
    """
    from montessori_ray.training.chat import load_tokenizer  # late: see stages/__init__.py

    config, rows = context.config, list(context.input(0).rows(["example_id", "instruction"]))
    tokenizer = load_tokenizer(context.model(1), config.student.chat_template)
    todo = rows[len(context.output.column("example_id")) :]

    def request(row: dict[str, Any]) -> GenerationRequest:
        text = rendered(tokenizer, [{"role": "user", "content": row["instruction"]}])
        return request_for(text, config.synthesize.responses, 1, seed_of(row["example_id"], config.seed), ())

    requests = map(request, todo)
    samples = context.pool.generate_all(requests, concurrency=concurrency_of(context))
    answers = (
        todo[number]
        | {"response": sample.text.strip(), "finish_reason": sample.finish_reason, "num_tokens": sample.num_tokens}
        for number, (sample,) in samples
    )
    commit_parts(context, answers, len(rows), unit="answers")
    return {
        "truncated": context.output.column("finish_reason").count("length"),
        "tokens": sum(context.output.column("num_tokens")),
    }


def judge_answers(context: StageContext) -> dict[str, Any]:
    """Verdicts on the trained student's answers against the original's, in both orders; continues with what is left.

    Inputs: answers of the trained student, of the original student, and the judge where it is in the pool.
    """
    from montessori_ray.evaluation.alpaca_eval import length_controlled_win_rate  # late: see stages/__init__.py
    from montessori_ray.evaluation.judge import judge_pairs, pair_scores, win_rate

    settings = context.config.evaluate.judge
    assert settings is not None, "the stage exists where there is a judge"
    ask = open_judge(context, settings, model=2)
    pairs = _pairs(context.input(0), context.input(1))
    done = {(row["example_id"], row["shown_first"]) for row in context.output.rows(["example_id", "shown_first"])}
    commit_parts(context, judge_pairs(pairs, ask, done=done), 2 * len(pairs), unit="verdicts")
    verdicts = list(context.output.rows())
    return win_rate(verdicts) | {
        "judge": settings.model,
        "length_controlled": length_controlled_win_rate(pairs, pair_scores(verdicts)),
    }


def _pairs(candidate: Artifact, baseline: Artifact) -> list[Pair]:
    from montessori_ray.evaluation.judge import Pair  # late: see stages/__init__.py

    answers = {row["example_id"]: row["response"] for row in baseline.rows()}
    return [
        Pair(row["example_id"], row["instruction"], row["response"], answers[row["example_id"]])
        for row in candidate.rows()
    ]
