"""Rendering chat templates, the same way at any time.

Some templates (Llama 3.2, gpt-oss) print the day on which they are rendered. A run that goes on after midnight would
show other prompts, and losses of one model on one text differ from day to day by as much as influences do: 3e-3 nats a
token on the embedded model (measured on 6 reference rows).
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

DAY = datetime(2024, 7, 26)
"""The day on which templates are rendered: the one that Llama 3's own fall back on where they are told none."""


def apply_template(tokenizer: Any, conversation: list[dict[str, str]], **options: Any) -> Any:
    """`tokenizer.apply_chat_template` on DAY."""
    return tokenizer.apply_chat_template(conversation, strftime_now=DAY.strftime, **options)
