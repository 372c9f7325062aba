"""The client of a judge's endpoint, on a real HTTP server whose answers are scripted."""

from __future__ import annotations

import time

import pytest

from montessori_ray.config import Judge
from montessori_ray.errors import ConfigError, ResourceError
from montessori_ray.evaluation import endpoint
from montessori_ray.evaluation.endpoint import ChatEndpoint, Conversation, Reply
from tests.evaluation.serving import serving


def settings(base_url: str, **others: object) -> Judge:
    return Judge.model_validate({"model": "judge", "base_url": base_url, "concurrency": 4, **others})


def conversation(text: str) -> Conversation:
    return [{"role": "user", "content": text}]


def test_replies_come_in_order_whatever_the_server_takes() -> None:
    def slow(messages: list[dict[str, str]]) -> str:
        time.sleep(0.05 if int(messages[0]["content"]) % 3 == 0 else 0)
        return "said " + messages[0]["content"]

    with serving(slow) as (url, requests):
        replies = list(ChatEndpoint(settings(url))(conversation(str(i)) for i in range(20)))
    assert replies == [Reply(f"said {i}") for i in range(20)]
    assert {(body["temperature"], body["max_tokens"]) for body in requests} == {(0, 512)}


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with serving(lambda messages: "yes") as (url, requests):
        assert list(ChatEndpoint(settings(url, api_key_env="JUDGE_KEY"))([conversation("?")])) == [Reply("yes")]
    assert requests[0]["authorization"] == "Bearer secret"
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="JUDGE_KEY, named by api_key_env, is not set"):
        ChatEndpoint(settings(url, api_key_env="JUDGE_KEY"))


def test_the_pool_is_no_endpoint() -> None:
    with pytest.raises(ConfigError, match="model pool is in a run's teacher pool: outside of a run give"):
        ChatEndpoint(Judge(model="pool"))


def test_a_refused_conversation_is_a_reply_and_the_others_go_on() -> None:
    def refuse_long(messages: list[dict[str, str]]) -> str | tuple[int, str]:
        return (400, "longer than the context") if len(messages[0]["content"]) > 10 else "fine"

    with serving(refuse_long) as (url, _):
        replies = list(ChatEndpoint(settings(url))(map(conversation, ["short", "x" * 20, "short"])))
    assert replies[0] == replies[2] == Reply("fine")
    assert replies[1].refused
    assert "longer than the context" in replies[1].text


@pytest.mark.parametrize("status", [400, 422, 413])
def test_an_endpoint_that_refuses_whatever_it_is_asked_has_not_refused_the_conversation(status: int) -> None:
    """Some say 400 to an empty account, others to a key they do not know; that must not be kept as a reply."""
    broke = iter([False] * 3 + [True] * 9)
    with serving(lambda messages: (status, "your credit is too low") if next(broke) else "fine") as (url, _):
        replies = ChatEndpoint(settings(url, concurrency=1))(conversation(str(i)) for i in range(9))
        assert [next(replies) for _ in range(3)] == [Reply("fine")] * 3
        with pytest.raises(ConfigError, match=r"refuses every question, even 'Say yes\.'.*your credit is too low"):
            next(replies)


def test_a_reply_that_is_cut_off_is_not_whole() -> None:
    with serving(lambda messages: messages[0]["content"], cut_at=5) as (url, _):
        replies = list(ChatEndpoint(settings(url))(map(conversation, ["Fine", "I think of Verdict: A, but"])))
    assert [(reply.text, reply.cut, reply.whole) for reply in replies] == [
        ("Fine", False, True),
        ("I thi", True, False),
    ]


def test_models_that_reason_are_asked_in_their_words() -> None:
    """They take no temperature, call the limit otherwise, and need one for their hidden thoughts as well."""
    answers = iter([(400, "Unsupported parameter: 'max_tokens' is not supported with this model"), "a", "b"])
    with serving(lambda messages: next(answers)) as (url, requests):
        replies = list(ChatEndpoint(settings(url, concurrency=1))(map(conversation, ["first", "second"])))
    assert replies == [Reply("a"), Reply("b")]
    assert [body.get("max_completion_tokens") for body in requests] == [None, 16 * 512, 16 * 512]
    assert ["temperature" in body for body in requests] == [True, False, False]


def test_a_conversation_without_room_for_max_tokens_changes_nothing_for_the_others() -> None:
    """As vLLM says it. Without a temperature of 0 the others would be judged by luck."""
    answers = iter([(400, "'max_tokens' or 'max_completion_tokens' is too large: 512"), "yes", "b"])
    with serving(lambda messages: next(answers)) as (url, requests):
        replies = list(ChatEndpoint(settings(url, concurrency=1))(map(conversation, ["first", "second"])))
    assert [reply.refused for reply in replies] == [True, False]
    assert [(body["temperature"], body["max_tokens"]) for body in requests] == [(0, 512)] * 3


def test_a_reply_without_choices_is_an_error() -> None:
    with (
        serving(lambda messages: (200, "rate limited")) as (url, _),
        pytest.raises(ResourceError, match=r"answered without a reply .*rate limited.*give the same command again"),
    ):
        list(ChatEndpoint(settings(url))([conversation("?")]))


def test_a_busy_server_is_asked_again() -> None:
    answers = iter([(429, "busy"), (503, "starting"), "there"])
    with serving(lambda messages: next(answers)) as (url, requests):
        assert list(ChatEndpoint(settings(url))([conversation("?")])) == [Reply("there")]
    assert len(requests) == 3


def test_what_cannot_work_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_RETRIES", 1)
    with serving(lambda messages: (401, "who are you?")) as (url, _):
        with pytest.raises(ConfigError, match=r"model gpt.*no such model or address"):
            list(ChatEndpoint(settings(url, model="gpt"))([conversation("?")]))
        with pytest.raises(ConfigError, match="does not accept the key in None"):
            list(ChatEndpoint(settings(url))([conversation("?")]))
    with pytest.raises(ResourceError, match=r"gave no answer \(APIConnectionError.*give the same command again"):
        list(ChatEndpoint(settings(url))([conversation("?")]))  # the server is gone


def test_replies_before_the_end_of_an_endpoint_are_yielded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_RETRIES", 0)
    with serving(lambda messages: (500, "dead") if messages[0]["content"] == "2" else "ok") as (url, _):
        replies = ChatEndpoint(settings(url))(conversation(str(i)) for i in range(5))
        assert [next(replies).text, next(replies).text] == ["ok", "ok"]
        with pytest.raises(ResourceError, match="dead"):
            next(replies)
