"""Which few-shot prompts are sent, and which samples become instructions: the state of one synthesis.

Prompts go out in rounds. A round's shots come from the seeds and from what earlier rounds kept, so the prompts follow
from the committed rows alone: a resumed synthesis replays them (`replay`) and goes on with the very next prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from montessori_ray.config import Synthesize
from montessori_ray.errors import DataError
from montessori_ray.synthesis.deduplication import NearDuplicates
from montessori_ray.synthesis.parsing import Rejection, parse_instruction, rejection
from montessori_ray.synthesis.prompts import FewShotPrompt, draw_prompts

KEPT = "kept"
"""Status of a sample that became an instruction; others carry the reason of their rejection."""

MIN_JUDGED = 200
"""Samples before the share of rejected ones may end a synthesis: fewer say too little about the teacher."""


class InstructionWriter:
    """Draws the prompts of one stream round by round and judges their samples, in prompt order.

    Memory grows with the kept instructions, which the duplicate check compares every new one with.
    """

    def __init__(
        self,
        settings: Synthesize,
        *,
        seeds: Sequence[str],
        name: str,
        stream: str,
        target: int,
        seed: int,
        learn_shots: bool = True,
    ) -> None:
        """Begin at the first prompt.

        Args:
            settings: shots, samples a prompt, filters.
            seeds: seed instructions.
            name: prefix of the prompt ids, unique in the run.
            stream: what the prompts are drawn from; two teachers given equal streams are shown equal prompts.
            target: instructions to keep.
            seed: the run's seed.
            learn_shots: later prompts show earlier generations too (paper: 6 seeds + 2).
        """
        self._settings = settings
        self._seeds = seeds
        self._name = name
        self._stream = stream
        self._target = target
        self._seed = seed
        self._generated_shots = settings.generated_shots if learn_shots else 0
        self._kept: list[str] = []
        self._shown: list[str] = []  # what prompts of the current round may show: kept before it began
        self._duplicates = NearDuplicates(settings.duplicate_rouge_l)
        self._round = -1
        self._next = 0
        self._round_end = 0
        self.statuses: Counter[str] = Counter()
        self._before_rounds: list[Counter[str]] = []

    @property
    def num_kept(self) -> int:
        """Instructions kept so far."""
        return len(self._kept)

    def next_prompts(self) -> list[FewShotPrompt]:
        """The prompts still to send in this round, or those of the next one; empty when the target is reached.

        Raises:
            DataError: nearly all samples are rejected, so that the target is out of reach.
        """
        if self._next == self._round_end:
            if self.num_kept >= self._target:
                return []
            self._begin_round()
        settings = self._settings
        drawn = draw_prompts(
            seeds=self._seeds, generated=self._shown, stream=self._stream, start=self._next,
            count=self._round_end - self._next, shots=settings.shots, generated_shots=self._generated_shots,
            num_samples=settings.n, seed=self._seed,
        )  # fmt: skip
        return [replace(prompt, prompt_id=f"{self._name}-p{prompt.index:06d}") for prompt in drawn]

    def judge(
        self, prompt: FewShotPrompt, text: str, samples: Sequence[str], teacher_digest: str
    ) -> list[dict[str, Any]]:
        """Rows (schema INSTRUCTIONS) of the samples of `prompt`, whose rendered text is `text`, kept or rejected."""
        assert prompt.index == self._next, "samples must be judged in prompt order"
        rows = []
        for number, raw_output in enumerate(samples):
            instruction = parse_instruction(raw_output, prefilled=self._settings.prompt_style == "prefill")
            status = self._status(instruction, prompt.shots)
            rows.append(
                {
                    "example_id": f"{prompt.prompt_id}-{number}",
                    "prompt_id": prompt.prompt_id,
                    "prompt": text,
                    "raw_output": raw_output,
                    "instruction": instruction,
                    "teacher_digest": teacher_digest,
                    "status": status,
                    "round": self._round,
                }
            )
            self._count(status, instruction)
        self._next += 1
        return rows

    def replay(self, rows: Sequence[dict[str, Any]]) -> None:
        """Take over the committed rows of one prompt, as `judge` did when they were made."""
        if self._next == self._round_end:
            self._begin_round()
        for row in rows:
            assert row["round"] == self._round, f"{row['example_id']} was committed in another round"
            self._count(row["status"], row["instruction"])
        self._next += 1

    def _begin_round(self) -> None:
        self._refuse_hopeless()
        samples = self.statuses.total()
        kept_a_prompt = self._settings.n * max(self.num_kept, 1) / samples if samples else self._settings.n
        wanted = math.ceil((self._target - self.num_kept) / kept_a_prompt)
        self._round += 1
        self._round_end = self._next + min(wanted, self._settings.prompts_per_round)
        self._shown = list(self._kept)

    def _refuse_hopeless(self) -> None:
        """By the last rounds: a teacher that has nothing new to say would else take ten times as long to be noticed."""
        self._before_rounds.append(self.statuses.copy())
        for before in reversed(self._before_rounds):
            judged = self.statuses - before
            if judged.total() >= MIN_JUDGED:
                break
        else:
            return
        if judged[KEPT] < (1 - self._settings.max_rejected) * judged.total():
            reasons = ", ".join(f"{count} {reason}" for reason, count in judged.most_common() if reason != KEPT)
            raise DataError(
                f"{judged.total() - judged[KEPT]} of the last {judged.total()} samples were rejected ({reasons}), "
                "above synthesize.max_rejected: a small teacher needs synthesize.prompt_style=prefill, many duplicates "
                "need more seeds or a higher temperature, and bad_start is what does not begin with an ASCII letter or "
                "digit, as in many languages, which the paper's filters reject"
            )

    def _status(self, instruction: str | None, shots: Sequence[str]) -> str:
        if instruction is None:
            return Rejection.UNPARSED
        settings = self._settings
        reason = rejection(instruction, min_characters=settings.min_characters, max_characters=settings.max_characters)
        if reason is None and self._duplicates.is_duplicate(instruction, shots):
            reason = Rejection.DUPLICATE
        return reason or KEPT

    def _count(self, status: str, instruction: str | None) -> None:
        self.statuses[status] += 1
        if status == KEPT:
            assert instruction is not None
            self._kept.append(instruction)
            self._duplicates.add(instruction)
