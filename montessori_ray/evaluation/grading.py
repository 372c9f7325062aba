"""A judge's grade of an example as training data: the preference signal of the paper's LLM-judge ablation.

for row in grade_examples(rows, ask): ...        # commit them as they come
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import tee
from typing import Any

from montessori_ray.evaluation.endpoint import Ask
from montessori_ray.evaluation.mt_bench import parse_rating

PROMPT = """\
Below are an instruction and a response to it, which may be used to train an assistant. Grade the pair as training \
data from 1 (useless or harmful) to 10 (could not be better): is the instruction clear, sensible and worth learning \
from, and is the response correct, complete and to the point?

# Instruction
{instruction}

# Response
{response}

# Your grade
Give your reasons in a few sentences. Then end with one line, the grade as a number:
Rating: <number>
"""


def grade_examples(examples: Iterable[Mapping[str, Any]], ask: Ask) -> Iterator[dict[str, Any]]:
    """Yield the rows (schema GRADES) of examples (`example_id`, `instruction`, `response`), as the replies come.

    `grade` is None where the judge gave none from 1 to 10, refused, or was cut off. Raises what `ask` raises.
    """
    rows, asked = tee(examples)
    replies = ask(
        [{"role": "user", "content": PROMPT.format(instruction=row["instruction"], response=row["response"])}]
        for row in asked
    )
    for row, reply in zip(rows, replies, strict=True):
        grade = parse_rating(reply.text) if reply.whole else None
        yield {"example_id": row["example_id"], "grade": grade, "reply": reply.text}
