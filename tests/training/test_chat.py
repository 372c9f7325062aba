from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from montessori_ray.errors import ModelError
from montessori_ray.training.chat import ChatFormat, Encoded, collate, load_tokenizer

CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }} {{ m['content'] }} <|end|> next {% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
BOS = (
    "<s> {% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} <|end|>{% endif %}{% endfor %}"
)
SPECIAL = ["<pad>", "<s>", "<|start|>", "<|end|>", "[INST]", "[/INST]"]
WORDS = [*SPECIAL, "user", "assistant", "next", "what", "is", "two", "four", "it", "ok"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<pad>", additional_special_tokens=SPECIAL
    )


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


@pytest.mark.parametrize(
    ("template", "prompt", "response"),
    [
        # Written out by hand; the text a template puts behind the end of the turn is not part of the example.
        (CHATML, "<|start|> user what is two <|end|> next <|start|> assistant", "it is four <|end|>"),
        (BOS, "<s> [INST] what is two [/INST]", "it is four <|end|>"),
    ],
)
def test_only_the_response_and_its_end_are_learned(tokenizer, template, prompt, response):
    tokenizer.chat_template = template
    encoded = ChatFormat(tokenizer, 100).encode("what is two", "it is four")
    assert encoded.input_ids == ids(prompt) + ids(response)
    assert encoded.labels == [-100] * len(ids(prompt)) + ids(response)
    assert encoded.response_tokens == len(ids(response))


def test_long_examples_lose_their_end(tokenizer):
    tokenizer.chat_template = BOS
    whole = ChatFormat(tokenizer, 100).encode("what is two", "it is four")
    cut = ChatFormat(tokenizer, 8).encode("what is two", "it is four")
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:8], whole.labels[:8])
    assert cut.response_tokens == 2
    assert ChatFormat(tokenizer, 6).encode("what is two", "it is four").response_tokens == 0


def test_an_end_token_inside_the_response_does_not_end_it(tokenizer):
    tokenizer.chat_template = CHATML
    encoded = ChatFormat(tokenizer, 100).encode("what is two", "it <|end|> four")
    assert encoded.input_ids[-4:] == ids("it <|end|> four <|end|>")


def test_what_ends_a_turn_is_the_templates_not_the_tokenizers_eos(tokenizer):
    """As Gemma's, Phi's and Qwen's base models have it: what follows is never generated, so it is not learned."""
    tokenizer.chat_template, tokenizer.eos_token = CHATML, "<s>"
    encoded = ChatFormat(tokenizer, 100).encode("what is two", "it is four")
    assert encoded.input_ids[-4:] == ids("it is four <|end|>")


def test_a_mention_of_eos_ends_no_response_where_the_template_writes_none(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} next {% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant {% endif %}"
    encoded = ChatFormat(tokenizer, 100).encode("what is two", "it <|end|> four")
    assert encoded.input_ids[-4:] == ids("it <|end|> four next")


def test_a_text_that_no_tokenizer_takes_is_said(tokenizer):
    tokenizer.chat_template = CHATML
    with pytest.raises(ModelError, match="the text is no valid Unicode"):
        ChatFormat(tokenizer, 100).encode("what is \ud800", "it")


def test_plain_words_at_the_end_of_a_turn_are_learned_whole(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m['role'] }} {{ m['content'] }}{% if m['role'] == 'assistant' %} ok next"
        "{% endif %} {% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    encoded = ChatFormat(tokenizer, 100).encode("what is two", "it is four")
    assert encoded.input_ids[-5:] == ids("it is four ok next")


def test_of_mistrals_folders_transformers_own_tokenizer_is_taken(tokenizer, tmp_path: Path):
    tokenizer.chat_template = BOS
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    assert ChatFormat.load(tmp_path, None, 100).encode("what is two", "it is four").input_ids[-1] == ids("<|end|>")[0]


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer):
    tokenizer.chat_template = "{% if add_generation_prompt %}ok {% endif %}" + BOS
    with pytest.raises(ModelError, match="does not begin with the same conversation"):
        ChatFormat(tokenizer, 100).encode("what is two", "it is four")


def test_a_template_that_fails_is_named(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ModelError, match="roles must alternate"):
        ChatFormat(tokenizer, 100).encode("what", "two")


def test_load_takes_the_own_template_a_text_or_a_file(tokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="no chat template"):
        ChatFormat.load(tmp_path / "base", None, 100)
    with pytest.raises(ModelError, match=r"neither a Jinja template nor a readable file"):
        ChatFormat.load(tmp_path / "base", "missing.jinja", 100)
    with pytest.raises(ModelError, match="no tokenizer"):
        ChatFormat.load(tmp_path, BOS, 100)
    (tmp_path / "chat.jinja").write_text(BOS)
    tokenizer.chat_template = BOS
    tokenizer.save_pretrained(tmp_path / "instruct")
    given = [
        ChatFormat.load(tmp_path / "base", BOS, 100),
        ChatFormat.load(tmp_path / "base", str(tmp_path / "chat.jinja"), 100),
        ChatFormat.load(tmp_path / "instruct", None, 100),
    ]
    encoded = [chat.encode("what is two", "four") for chat in given]
    assert encoded[0] == encoded[1] == encoded[2]


def test_a_folder_that_is_not_there_is_no_name_of_the_hub(tmp_path: Path):
    with pytest.raises(ModelError, match=rf"there is no folder {tmp_path}/gone on .*: models must lie where all nodes"):
        load_tokenizer(tmp_path / "gone", None)


def test_collate_pads_on_the_right():
    batch = collate([Encoded([5, 6, 7], [-100, 6, 7]), Encoded([8], [8])])
    assert torch.equal(batch["input_ids"], torch.tensor([[5, 6, 7], [8, 0, 0]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert torch.equal(batch["labels"], torch.tensor([[-100, 6, 7], [8, -100, -100]]))
