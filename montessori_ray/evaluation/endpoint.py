"""Any OpenAI-compatible endpoint: many conversations in, their answers in order, and plain words when it fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import openai

from montessori_ray.config import Judge
from montessori_ray.errors import ConfigError, ResourceError
from montessori_ray.in_order import in_order

Conversation = list[dict[str, str]]
"""Messages with `role` and `content`, the last one a user's."""

MAX_RETRIES = 5
"""Times a request is sent again, a busy or broken server given 0.5 to 8 s in between (the client's own rule)."""

TIMEOUT_S = 300.0
"""Seconds one answer may take."""


class Reply(NamedTuple):
    """An answer, or why there is none."""

    text: str
    """What the model said; the server's words where it refused the conversation (too long for its context, say)."""
    refused: bool = False


Ask = Callable[[Iterable[Conversation]], Iterator[Reply]]
"""Conversations in, their replies in the same order. A `ChatEndpoint`, or the teacher pool (`stages.judging`)."""


class ChatEndpoint:
    """A model behind an OpenAI-compatible endpoint, asked greedily.

    Raises ConfigError when the model is the pool of a run, which is behind none, or when the environment variable that
    should hold the key does not exist.
    """

    def __init__(self, settings: Judge) -> None:
        if settings.base_url is None:
            raise ConfigError(
                f"model {settings.model} is in a run's teacher pool: outside of a run give a model's name and the "
                "base_url of its OpenAI-compatible endpoint (`vllm serve` is one)"
            )
        self._settings = settings
        key = settings.api_key_env
        if key is not None and not os.environ.get(key):
            raise ConfigError(f"the environment variable {key}, named by api_key_env, is not set: put the key in it")
        self._key = os.environ[key] if key else "none"  # the client insists on one
        self._reasons = False
        """Whether the model has refused a temperature, or a limit of tokens in its old name."""

    def __call__(self, conversations: Iterable[Conversation]) -> Iterator[Reply]:
        """Yield the replies in order, `concurrency` requests under way at once.

        Raises:
            ConfigError: the endpoint has no such model, or does not accept the key.
            ResourceError: it cannot be reached, or answers with errors only.
        """
        settings = self._settings
        client = openai.AsyncOpenAI(
            base_url=settings.base_url, api_key=self._key, max_retries=MAX_RETRIES, timeout=TIMEOUT_S
        )

        async def answer(conversation: Conversation) -> Reply:
            return await self._answer(client, conversation)

        return in_order(answer, conversations, concurrency=settings.concurrency)

    async def _answer(self, client: openai.AsyncOpenAI, conversation: Conversation) -> Reply:
        settings, messages = self._settings, _typed(conversation)
        where = f"{settings.base_url} (model {settings.model})"
        try:
            completion = await self._complete(client, messages)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return Reply(error.message, refused=True)
        except openai.NotFoundError as error:
            raise ConfigError(
                f"{where}: no such model or address ({error.message}); check model and base_url"
            ) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ConfigError(f"{where} does not accept the key in {settings.api_key_env}: {error.message}") from None
        except openai.APIError as error:
            raise ResourceError(
                f"{where} gave no answer in {MAX_RETRIES + 1} attempts ({type(error).__name__}: {error.message}): what "
                "was answered before is kept, give the same command again when it is back"
            ) from None
        if not getattr(completion, "choices", None):  # some proxies say of an error that all is well
            said = getattr(completion, "error", None) or str(completion)[:200]
            raise ResourceError(
                f"{where} answered without a reply ({said}): what was answered before is kept, give the same command "
                "again when it is back"
            )
        return Reply(completion.choices[0].message.content or "")

    async def _complete(self, client: openai.AsyncOpenAI, messages: Any) -> Any:
        """Ask with the options every server knows, or where they are refused as models that reason want them."""
        limit = self._settings.max_tokens
        plain: dict[str, Any] = {"temperature": 0, "max_tokens": limit}
        while True:
            options = {"max_completion_tokens": limit} if self._reasons else plain
            try:
                return await client.chat.completions.create(model=self._settings.model, messages=messages, **options)
            except openai.BadRequestError as error:
                unsupported = "unsupported" in error.message.lower()  # not: too many tokens for the context
                if options is not plain or not unsupported or not any(name in error.message for name in plain):
                    raise
                self._reasons = True


def _typed(conversation: Conversation) -> Any:
    """The client types messages by role, one class each; a plain mapping is what it sends."""
    return conversation
