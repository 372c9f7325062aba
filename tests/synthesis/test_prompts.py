"""Few-shot prompts: what is drawn, that it is reproducible, and how it is rendered."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from montessori_ray.synthesis.parsing import parse_instruction
from montessori_ray.synthesis.prompts import FewShotPrompt, draw_prompts, prompt_style, render

SEEDS = [f"seed instruction {i}" for i in range(50)]
GENERATED = [f"generated instruction {i}" for i in range(20)]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def draw(**changes: Any) -> list[FewShotPrompt]:
    settings: dict[str, Any] = {
        "seeds": SEEDS,
        "generated": GENERATED,
        "stream": "iteration_00",
        "start": 0,
        "count": 40,
        "shots": 8,
        "generated_shots": 2,
        "num_samples": 4,
        "seed": 0,
    }
    return draw_prompts(**{**settings, **changes})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", chat_template=CHATML)


def test_same_arguments_give_same_prompts() -> None:
    assert draw() == draw()


def test_prompts_are_the_same_in_another_process() -> None:
    code = (
        "from montessori_ray.synthesis.prompts import draw_prompts; print(draw_prompts(seeds=[str(i) for i in "
        "range(9)], generated=[], stream='final', start=3, count=2, shots=4, generated_shots=1, num_samples=4, seed=7))"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env).stdout
        for env in ({**os.environ, "PYTHONHASHSEED": hash_seed} for hash_seed in "12")
    }
    here = draw(seeds=[str(i) for i in range(9)], generated=[], stream="final", start=3, count=2, shots=4, seed=7)
    assert outputs == {f"{here}\n"}


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [7, 13, 20]])
def test_prompts_do_not_depend_on_batches(sizes: list[int]) -> None:
    batches = [draw(start=sum(sizes[:i]), count=size) for i, size in enumerate(sizes)]
    assert [prompt for batch in batches for prompt in batch] == draw()


@pytest.mark.parametrize("change", [{"seed": 1}, {"stream": "iteration_01"}])
def test_other_runs_and_streams_draw_otherwise(change: dict[str, Any]) -> None:
    ours, theirs = draw(), draw(**change)
    assert all(a.shots != b.shots for a, b in zip(ours, theirs, strict=True))
    assert {p.seed for p in ours}.isdisjoint(p.seed for p in theirs)


def test_prompt_ids_name_stream_and_index() -> None:
    ids = [prompt.prompt_id for prompt in draw(stream="final/a", start=9, count=2)]
    assert ids == ["final-a-p000009", "final-a-p000010"]
    assert [prompt.index for prompt in draw(start=9, count=2)] == [9, 10]


@pytest.mark.parametrize("num_generated", [0, 1])
def test_shots_are_seed_instructions_until_enough_are_generated(num_generated: int) -> None:
    for prompt in draw(generated=GENERATED[:num_generated]):
        assert len(set(prompt.shots)) == 8
        assert set(prompt.shots) <= set(SEEDS)


@pytest.mark.parametrize("num_generated", [2, 20])
def test_later_prompts_mix_six_seed_and_two_generated_instructions(num_generated: int) -> None:
    for prompt in draw(generated=GENERATED[:num_generated]):
        assert len(set(prompt.shots)) == 8
        assert sum(shot in SEEDS for shot in prompt.shots) == 6
        assert sum(shot in GENERATED[:num_generated] for shot in prompt.shots) == 2


def test_shots_are_shuffled_and_every_instruction_is_used() -> None:
    prompts = draw(count=400)
    generated_at = Counter(i for prompt in prompts for i, shot in enumerate(prompt.shots) if shot in GENERATED)
    assert set(generated_at) == set(range(8))
    assert min(generated_at.values()) > 60  # 100 expected, standard deviation below 10
    assert {shot for prompt in prompts for shot in prompt.shots} == {*SEEDS, *GENERATED}


@pytest.mark.parametrize("num_samples", [1, 4, 64])
def test_samples_of_different_prompts_never_share_a_seed(num_samples: int) -> None:
    sample_seeds = [prompt.seed + i for prompt in draw(count=300, num_samples=num_samples) for i in range(num_samples)]
    assert len({seed % 2**32 for seed in sample_seeds}) == len(sample_seeds)
    assert all(0 <= seed < 2**63 for seed in sample_seeds)


@pytest.mark.parametrize("generated", [[], GENERATED])
def test_too_few_seed_instructions_is_an_error(generated: list[str]) -> None:
    assert len(draw(seeds=SEEDS[:8], generated=generated)) == 40
    with pytest.raises(ValueError, match="shows 8 example instructions, but there are only 7 seed instructions"):
        draw(seeds=SEEDS[:7], generated=generated)


@pytest.mark.parametrize("generated_shots", [-1, 9])
def test_impossible_number_of_generated_shots_is_an_error(generated_shots: int) -> None:
    with pytest.raises(ValueError, match="expected 0 to 8"):
        draw(generated_shots=generated_shots)


def test_paper_style_asks_in_one_user_message(tokenizer: PreTrainedTokenizerFast) -> None:
    style = prompt_style("paper")
    shots = ["What is a {noun}?", "Sum up:\n  two lines"]
    [message] = style.messages(shots)
    assert message["role"] == "user"
    assert all(f"<instruction>{shot}</instruction>\n" in message["content"] for shot in shots)
    assert render(tokenizer, style, shots) == (
        f"<|im_start|>user\n{message['content']}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not style.continues_assistant
    assert style.stop == ()


def test_prefill_style_ends_inside_the_assistants_message(tokenizer: PreTrainedTokenizerFast) -> None:
    style = prompt_style("prefill")
    prompt = render(tokenizer, style, ["What is a {noun}?", "Sum up:\n  two lines"])
    assert prompt.startswith("<|im_start|>user\n")
    assert prompt.endswith(
        "<|im_end|>\n<|im_start|>assistant\n"
        "<instruction>What is a {noun}?</instruction>\n<instruction>Sum up: two lines</instruction>\n<instruction>"
    )
    assert style.continues_assistant
    assert style.stop == ("</instruction>",)


@pytest.mark.parametrize(
    ("name", "raw_output"),
    [("paper", "<instruction>Name a bird.</instruction>"), ("prefill", "Name a bird.</instruction>")],
)
def test_what_a_style_asks_for_is_what_the_parser_reads(name: str, raw_output: str) -> None:
    assert parse_instruction(raw_output, prefilled=prompt_style(name).continues_assistant) == "Name a bird."


def test_unknown_style_is_an_error() -> None:
    with pytest.raises(ValueError, match="no prompt style 'papre', expected one of: paper, prefill"):
        prompt_style("papre")
