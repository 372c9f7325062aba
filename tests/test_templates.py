"""Chat templates are rendered on one day, whenever a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from montessori_ray.stages.judging import rendered
from montessori_ray.synthesis.prompts import prompt_style, render
from montessori_ray.training.chat import ChatFormat
from tests.tiny import write_student

DATED = (
    "{{ strftime_now('%d %b %Y') }}{% for message in messages %}"
    "{{ '<user>' if message['role'] == 'user' else '<assistant>' }}{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    write_student(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = DATED
    return tokenizer


def test_a_template_that_prints_the_date_prints_one_date(tokenizer: Any) -> None:
    turn = [{"role": "user", "content": "w1"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False)[:11] != "26 Jul 2024", "what transformers does by itself"
    assert rendered(tokenizer, turn) == "26 Jul 2024<user>w1<end><assistant>"
    assert render(tokenizer, prompt_style("paper"), ["w2"]).startswith("26 Jul 2024<user>")


def test_nor_do_losses_depend_on_the_day(tokenizer: Any) -> None:
    tokenizer.chat_template = DATED.replace("%d %b %Y", "w%d ")
    ids = ChatFormat(tokenizer, 64).encode("w1", "w2").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["w26", "<user>", "w1", "<end>", "<assistant>", "w2", "<end>"]
