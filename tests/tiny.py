"""A tiny student with a tokenizer, moments of its own, and shapes that no shard count divides; and rows for it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<user>", "<assistant>", "<end>", *(f"w{index}" for index in range(60))]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def text(seed: int, length: int) -> str:
    words = torch.randint(4, len(WORDS), (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[word] for word in words)


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    return [
        {
            "example_id": f"e{index:03d}",
            "prompt_id": f"p{index // 4}",
            "instruction": text(seed + index, 3 + index % 7),
            "response": text(seed + 500 + index, 4 + index % 5),
        }
        for index in range(count)
    ]


def write_student(directory: Path) -> None:
    """Save the warmed student."""
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 30, "intermediate_size": 45, "num_hidden_layers": 2, "num_attention_heads": 5}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=5, tie_word_embeddings=True, **sizes)  # type: ignore[arg-type]
    )
    model.save_pretrained(directory)
    moments = {f"exp_avg.{name}": 1e-2 * torch.randn_like(value) for name, value in model.named_parameters()}
    moments |= {f"exp_avg_sq.{name}": 1e-4 * torch.rand_like(value) for name, value in model.named_parameters()}
    save_file({name: moment.detach() for name, moment in moments.items()}, directory / "optimizer.safetensors")
    rule = {"step": 5, "learning_rate": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}
    (directory / "optimizer.json").write_text(json.dumps({**rule, "max_grad_norm": 0.7}))
