"""Few-shot prompts: which example instructions the teacher sees, and how the request is worded.

Paper section 3.1: a prompt shows 8 examples, all seed instructions at first, later 6 seed instructions and 2 that the
teacher wrote earlier, shuffled. Every draw depends on the run's seed, the stream and the prompt's index alone, so a run
that is resumed, or cut into other batches, shows the same prompts.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from montessori_ray.templates import apply_template

OPEN_TAG = "<instruction>"
CLOSE_TAG = "</instruction>"

_PAPER_REQUEST = """\
These are instructions that people gave to a text-only assistant:

{shots}

Write one new instruction that belongs in the same collection.
- It differs from every example in subject and wording. The collection is varied - questions, explanations, writing, \
rewriting, summaries, classification, comparison, planning, arithmetic, code - so feel free to ask for a kind of work \
that the examples lack.
- It is complete: whatever text, list or number the task needs is part of it.
- Words alone can answer it: there is nothing to look at, listen to, open, look up or carry out.
- It is clear and short, a question or a request of one to three sentences in the language of the examples.

Reply with the new instruction in this form, with nothing before or after it:
<instruction>the new instruction</instruction>"""

_PREFILL_REQUEST = """\
Write a varied list of instructions that people give to a text-only assistant: questions, explanations, writing, \
rewriting, summaries, classification, comparison, planning, arithmetic, code. Each one is clear, short, different from \
the others and complete in itself. Put each on a line of its own between <instruction> and </instruction>, and write \
nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FewShotPrompt:
    """One request to the teacher, from which several instructions are sampled."""

    prompt_id: str
    """Unique in the run; later tables join on it."""
    index: int
    """Position in its stream, from 0."""
    shots: tuple[str, ...]
    """Example instructions in the order shown."""
    seed: int
    """Seed of the first sample; sample i has `seed + i` (vLLM). Below 2**63, also with i added."""


def draw_prompts(
    *,
    seeds: Sequence[str],
    generated: Sequence[str],
    stream: str,
    start: int,
    count: int,
    shots: int,
    generated_shots: int,
    num_samples: int,
    seed: int,
) -> list[FewShotPrompt]:
    """Prompts number `start` to `start + count - 1` of a stream (such as "iteration_00").

    A prompt shows `generated_shots` of the instructions `generated` so far and seed instructions for the rest; as long
    as there are fewer than `generated_shots` of them, it shows seed instructions only (paper section 3.1). Prompt k is
    the same however the calls are batched, given the same `seeds` and `generated`.

    Raises ValueError when there are fewer seed instructions than shots, or more generated shots than shots.
    """
    if len(seeds) < shots:
        raise ValueError(
            f"a few-shot prompt shows {shots} example instructions, but there are only {len(seeds)} seed instructions: "
            "add seed instructions or show fewer shots"
        )
    if not 0 <= generated_shots <= shots:
        raise ValueError(f"generated_shots is {generated_shots}, expected 0 to {shots}, the number of shots")
    num_generated = generated_shots if len(generated) >= generated_shots else 0
    first_seed = _digest(seed, stream) % 2**62
    return [
        FewShotPrompt(
            prompt_id=f"{stream.replace('/', '-')}-p{index:06d}",
            index=index,
            shots=_draw_shots(seeds, generated, shots - num_generated, num_generated, _digest(seed, stream, index)),
            # Consecutive, not one digest a prompt: PyTorch's CPU generator keeps 32 bits of a seed, in which digests
            # of some ten thousand prompts would collide.
            seed=first_seed + index * num_samples,
        )
        for index in range(start, start + count)
    ]


def _draw_shots(
    seeds: Sequence[str], generated: Sequence[str], num_seeds: int, num_generated: int, random_state: int
) -> tuple[str, ...]:
    rng = random.Random(random_state)
    drawn = rng.sample(seeds, num_seeds) + rng.sample(generated, num_generated)
    rng.shuffle(drawn)
    return tuple(drawn)


def _digest(*parts: int | str) -> int:
    """64 bits that depend on all parts; unlike `hash`, equal in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8])


class PromptStyle(Protocol):
    """How the teacher is asked for an instruction."""

    @property
    def continues_assistant(self) -> bool:
        """Whether the prompt ends inside the assistant's own message, after an opening tag."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts of which one must end a sample; they are part of its raw output."""

    def messages(self, shots: Sequence[str]) -> list[dict[str, str]]:
        """The chat (role, content) that shows `shots`."""


class PaperStyle:
    """One user message that shows the examples and asks for one new instruction (paper section 3.1, our wording)."""

    continues_assistant = False
    stop: tuple[str, ...] = ()

    def messages(self, shots: Sequence[str]) -> list[dict[str, str]]:
        """A user message with the examples as they are, line breaks included."""
        return [{"role": "user", "content": _PAPER_REQUEST.format(shots="\n".join(map(_tagged, shots)))}]


class PrefillStyle:
    """The examples begin the assistant's own message, which the teacher goes on writing.

    For small models, which do not follow the paper's request: of 128 outputs of a 135M model 6 parse with it and 128
    with this one (measured).
    """

    continues_assistant = True
    stop: tuple[str, ...] = (CLOSE_TAG,)

    def messages(self, shots: Sequence[str]) -> list[dict[str, str]]:
        """A user message that asks for a list and an assistant message that ends with an opening tag."""
        # Line breaks inside an example would teach the model that a line is not an instruction.
        lines = [_tagged(" ".join(shot.split())) for shot in shots]
        return [
            {"role": "user", "content": _PREFILL_REQUEST},
            {"role": "assistant", "content": "\n".join([*lines, OPEN_TAG])},
        ]


def _tagged(instruction: str) -> str:
    return f"{OPEN_TAG}{instruction}{CLOSE_TAG}"


_STYLES: dict[str, PromptStyle] = {"paper": PaperStyle(), "prefill": PrefillStyle()}


def prompt_style(name: str) -> PromptStyle:
    """The style called `name`: "paper" or "prefill". Raises ValueError for any other name."""
    if name not in _STYLES:
        raise ValueError(f"there is no prompt style {name!r}, expected one of: {', '.join(_STYLES)}")
    return _STYLES[name]


class ChatTokenizer(Protocol):
    """What rendering needs of a tokenizer; every Hugging Face tokenizer with a chat template has it."""

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        continue_final_message: bool,
        **variables: Any,
    ) -> Any:
        """The chat as one text when `tokenize` is false."""


def render(tokenizer: ChatTokenizer, style: PromptStyle, shots: Sequence[str]) -> str:
    """The prompt as text, with the template's special tokens: tokenize it with `add_special_tokens=False`.

    Raises ValueError (from transformers) when the tokenizer has no chat template or its template alters the
    assistant's message.
    """
    text: str = apply_template(
        tokenizer,
        style.messages(shots),
        tokenize=False,
        add_generation_prompt=not style.continues_assistant,
        continue_final_message=style.continues_assistant,
    )
    return text
