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

MAX_RETRIES = 12
"""Times a request is sent again, a busy or broken server given 0.5 to 8 s in between (the client's own rule): 70 s in
all, since many servers count requests by the minute."""

TIMEOUT_S, CONNECT_S = 300.0, 10.0
"""Seconds one answer may take, and a connection."""

REFUSALS = (400, 413, 422)
"""Status codes of a conversation the server does not take."""

PROBE: Conversation = [{"role": "user", "content": "Say yes."}]
"""What every server takes that takes anything: some say 400 to an empty account, or to a key they do not know."""

THOUGHT = 16
"""Tokens that a model which reasons may write for one of `max_tokens`: its limit holds for its hidden thoughts too."""


class Reply(NamedTuple):
    """An answer, or why there is none."""

    text: str
    """What the model said; the server's words where it refused the conversation (too long for its context, say)."""
    refused: bool = False
    cut: bool = False
    """Whether it ended at the limit of tokens; what a model thinks on the way to a verdict is none."""

    @property
    def whole(self) -> bool:
        """Whether the model has said all it wanted to."""
        return not (self.refused or self.cut)


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
            ConfigError: the endpoint has no such model, does not accept the key, or refuses every question.
            ResourceError: it cannot be reached, or answers with errors only.
        """
        settings = self._settings
        client = openai.AsyncOpenAI(
            base_url=settings.base_url, api_key=self._key, max_retries=MAX_RETRIES,
            timeout=openai.Timeout(TIMEOUT_S, connect=CONNECT_S),
        )  # fmt: skip

        async def answer(conversation: Conversation) -> Reply:
            return await self._answer(client, conversation)

        return in_order(answer, conversations, concurrency=settings.concurrency)

    async def _answer(self, client: openai.AsyncOpenAI, conversation: Conversation) -> Reply:
        """One reply, or an error of the project's own."""
        where = f"{self._settings.base_url} (model {self._settings.model})"
        later = "what was answered before is kept, give the same command again later"
        try:
            return await self._reply(client, conversation)
        except openai.NotFoundError as error:
            raise ConfigError(
                f"{where}: no such model or address ({error.message}); check model and base_url"
            ) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            key = self._settings.api_key_env
            raise ConfigError(f"{where} does not accept the key in {key}: {error.message}") from None
        except openai.APIStatusError as error:
            if error.status_code not in REFUSALS:
                raise ResourceError(f"{where} gave no answer ({error.message}): {later}") from None
            raise ConfigError(
                f"{where} refuses every question, even {PROBE[0]['content']!r} ({error.message}): look after the "
                f"account, the key and the model; {later}"
            ) from None
        except openai.APIError as error:
            raise ResourceError(f"{where} gave no answer ({type(error).__name__}: {error.message}): {later}") from None
        except _NoReplyError as error:
            raise ResourceError(f"{where} answered without a reply ({error}): {later}") from None

    async def _reply(self, client: openai.AsyncOpenAI, conversation: Conversation) -> Reply:
        """The model's reply, or the server's words if it refuses this conversation, but not every one."""
        try:
            completion = await self._complete(client, conversation)
        except openai.APIStatusError as error:
            if error.status_code not in REFUSALS:
                raise
            await self._complete(client, PROBE)
            return Reply(error.message, refused=True)
        if not getattr(completion, "choices", None):  # some proxies say of an error that all is well
            raise _NoReplyError(getattr(completion, "error", None) or str(completion)[:200])
        choice = completion.choices[0]
        return Reply(choice.message.content or "", cut=choice.finish_reason == "length")

    async def _complete(self, client: openai.AsyncOpenAI, conversation: Conversation) -> Any:
        """Ask with the options every server knows, or where they are refused as models that reason want them."""
        limit, messages = self._settings.max_tokens, _typed(conversation)
        plain: dict[str, Any] = {"temperature": 0, "max_tokens": limit}
        while True:
            options = {"max_completion_tokens": THOUGHT * limit} if self._reasons else plain
            try:
                return await client.chat.completions.create(model=self._settings.model, messages=messages, **options)
            except openai.BadRequestError as error:
                unsupported = "unsupported" in error.message.lower()  # not: too many tokens for the context
                if options is not plain or not unsupported or not any(name in error.message for name in plain):
                    raise
                self._reasons = True


class _NoReplyError(Exception):
    """A completion without choices."""


def _typed(conversation: Conversation) -> Any:
    """The client types messages by role, one class each; a plain mapping is what it sends."""
    return conversation
