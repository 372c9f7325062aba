"""Examples as token ids: the student's chat template around them, and which tokens are learned.

The mask is found by token ids, never by searching text: the template rendered up to the opening of the assistant's turn
gives the prompt's ids, the whole conversation must begin with exactly these, and what follows, up to and with the
end-of-turn token, is the response.

Shapes: B examples of a batch, L padded tokens.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from montessori_ray.config import template_text
from montessori_ray.errors import ModelError
from montessori_ray.templates import apply_template

FILLING = 0
"""Token that fills up short rows of a batch: every model has one of this id, which its padding token need not have.

Rows are filled up at their end, so that positions do not depend on the batch, and no other token attends to it."""

IGNORED = -100
"""Label of a token whose loss is not asked for; torch's cross entropy leaves it out."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as token ids, and labels of the same length: the id itself on the response, -100 on the prompt."""

    input_ids: list[int]
    labels: list[int]

    @property
    def response_tokens(self) -> int:
        """Tokens with a loss. 0 where the prompt alone fills `max_length`: such an example teaches nothing."""
        return sum(label != IGNORED for label in self.labels)


class ChatFormat:
    """A tokenizer with the chat template and length limit of one student."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        """`tokenizer` must have a chat template; use `load`."""
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._turn_end = turn_end(tokenizer)

    @staticmethod
    def load(model: Path | str, chat_template: str | None, max_length: int) -> ChatFormat:
        """The format of a model directory.

        Args:
            model: directory with a tokenizer.
            chat_template: Jinja text or a path of a file with it; None takes the tokenizer's own.
            max_length: tokens of a prompt and response; the end is cut off.

        Raises:
            ModelError: no tokenizer can be loaded, or there is no chat template.
        """
        return ChatFormat(load_tokenizer(model, chat_template), max_length)

    def encode(self, instruction: str, response: str) -> Encoded:
        """An instruction and its response as ids and labels, cut to `max_length`.

        Raises:
            ModelError: a text is no valid Unicode, or the template does not render a single turn, or renders a
                conversation that does not begin with its own prompt, so that no token can be said to be the response's
                first.
        """
        require_unicode(instruction + response)
        turn = [{"role": "user", "content": instruction}]
        prompt_ids = self._render(turn, add_generation_prompt=True)
        ids = self._render([*turn, {"role": "assistant", "content": response}], add_generation_prompt=False)
        start = len(prompt_ids)
        if ids[:start] != prompt_ids:
            raise ModelError(
                "the chat template renders a conversation that does not begin with the same conversation up to the "
                f"assistant's turn ({self.tokenizer.decode(prompt_ids)[-60:]!r}), so the response cannot be told from "
                "the prompt: set student.chat_template to one that appends"
            )
        ids = ids[: _end_of_turn(ids, start, self._turn_end)]
        labels = [IGNORED] * start + ids[start:]
        return Encoded(ids[: self.max_length], labels[: self.max_length])

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        try:
            ids: list[int] = apply_template(
                self.tokenizer,
                messages,
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=False,
            )
        except TemplateError as error:
            raise ModelError(f"the chat template cannot render a user's turn and an answer: {error}") from None
        return ids


def require_unicode(text: str) -> None:
    """Refuse a text that no tokenizer takes: half of a surrogate pair, as JSON may hold it.

    Raises:
        ModelError: says so.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ModelError(f"the text is no valid Unicode ({error.reason} at character {error.start})") from None


def end_of_turn(tokenizer: Any) -> int:
    """The token that ends an assistant's message in the chat template; the tokenizer's EOS where nothing does.

    The two differ for some models: Gemma ends a turn with <end_of_turn>, its EOS is <eos>.
    """
    ending = _ending(tokenizer)
    eos: int = tokenizer.eos_token_id
    return ending[0] if ending else eos


def turn_end(tokenizer: Any) -> int | None:
    """As `end_of_turn`, if it is a token of its own and not the beginning of plain words; else EOS where the template
    writes it, and None where it ends a turn in words or not at all."""
    try:
        ending = _ending(tokenizer)
    except (TemplateError, ValueError):  # no turn can be rendered, or not with this mark; `encode` says what is wrong
        return None
    if ending and ending[0] in tokenizer.added_tokens_decoder:
        return ending[0]
    return tokenizer.eos_token_id if tokenizer.eos_token_id in ending else None


def _ending(tokenizer: Any) -> list[int]:
    """What the chat template puts behind an assistant's message."""
    mark = "montessori"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    text: str = apply_template(tokenizer, chat, tokenize=False)
    return token_ids(tokenizer, text[text.rindex(mark) + len(mark) :].strip())


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text whose special tokens are written out in it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _end_of_turn(ids: list[int], start: int, turn_end_id: int | None) -> int:
    """Where the response ends: after its last end-of-turn token, or with the text if the template has none.

    What templates put behind that token (a line break, mostly) is never generated: the sampler has stopped before it.
    """
    ends = [position for position in range(start, len(ids)) if ids[position] == turn_end_id]
    return ends[-1] + 1 if ends else len(ids)


def collate(encoded: Sequence[Encoded]) -> dict[str, Tensor]:
    """A right-padded batch: `input_ids`, `attention_mask` and `labels`, each int64 (B, L)."""
    length = max(len(example.input_ids) for example in encoded)
    input_ids_BL = torch.full((len(encoded), length), FILLING)  # noqa: N806
    attention_mask_BL = torch.zeros_like(input_ids_BL)  # noqa: N806
    labels_BL = torch.full_like(input_ids_BL, IGNORED)  # noqa: N806
    for row, example in enumerate(encoded):
        size = len(example.input_ids)
        input_ids_BL[row, :size] = torch.tensor(example.input_ids)
        attention_mask_BL[row, :size] = 1
        labels_BL[row, :size] = torch.tensor(example.labels)
    return {"input_ids": input_ids_BL, "attention_mask": attention_mask_BL, "labels": labels_BL}


def context_of(model: Path | str, at_most: int) -> int:
    """Tokens of the context in which the pool serves a model: students may have a shorter one than the teacher."""
    limit = getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
    return min(at_most, limit or at_most)


def open_tokenizer(model: Path | str) -> Any:
    """The tokenizer of a model directory, as transformers has it. Of models with a `tekken.json` it would else take
    Mistral's own, which knows no template and reads special tokens as plain text."""
    return AutoTokenizer.from_pretrained(str(model), mistral_format=False)


def load_tokenizer(model: Path | str, chat_template: str | None, role: str = "student") -> Any:
    """The tokenizer of a model directory with a chat template (Jinja text, a path, or None for its own); `role`, of
    the model, is for messages.

    Raises:
        ModelError: there is no tokenizer, or neither it nor `chat_template` is a chat template.
    """
    if Path(model).is_absolute() and not Path(model).is_dir():  # transformers would take it for a name of the Hub
        where = socket.gethostname()
        raise ModelError(f"there is no folder {model} on {where}: models must lie where all nodes see them")
    try:
        tokenizer = open_tokenizer(model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"no tokenizer can be loaded from {model} ({reason}): save one there") from None
    if chat_template is not None:
        try:
            tokenizer.chat_template = template_text(chat_template)
        except ValueError as error:
            raise ModelError(f"{role}.chat_template {error}") from None
    if tokenizer.chat_template is None:
        raise ModelError(
            f"the tokenizer in {model} has no chat template, as those of base models: take an instruct model, or set "
            f"{role}.chat_template to a Jinja template or a file with one"
        )
    return tokenizer
