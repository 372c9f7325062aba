import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
    T5Config,
)

from montessori_ray.artifacts.manifest import Identity
from montessori_ray.artifacts.run import Run
from montessori_ray.config import Lora, load_config
from montessori_ray.errors import ModelError
from montessori_ray.models import (
    SMOLLM2,
    check_model,
    hub_name,
    join_adapter,
    model_digest,
    num_weights,
    prune_layers,
    resolve_model,
    with_template,
)
from montessori_ray.stages.inputs import require_whole
from montessori_ray.training.adapters import add_adapter

TEMPLATE = "{% for m in messages %}{{ m['content'] }} </s>{% endfor %}"
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL_BERT = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
PT = {"format": "pt"}
CONFIGS = [
    LlamaConfig(vocab_size=8, num_hidden_layers=5, max_position_embeddings=64, tie_word_embeddings=True, **SMALL),
    Qwen3Config(
        vocab_size=8, num_hidden_layers=5, max_position_embeddings=64, head_dim=8, sliding_window=4, **SMALL,
        use_sliding_window=True, max_window_layers=2,
    ),  # its layers differ in type
    GPT2Config(vocab_size=8, n_layer=5, n_embd=16, n_head=2, n_positions=64),
]  # fmt: skip


def save_model(folder: Path, config=CONFIGS[0], template: str | None = TEMPLATE) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_pruned_model_computes_what_is_left(tmp_path, config):
    folder = save_model(tmp_path / "whole", config)
    prune_layers(folder, [1, 3], tmp_path / "pruned")

    # Independently: a layer is out if the residual stream passes by it.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stack = model.transformer.h if config.model_type == "gpt2" else model.model.layers
    for index in (1, 3):
        stack[index].forward = lambda hidden_states, *args, **kwargs: hidden_states
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    tokens = torch.tensor([[2, 3, 2, 2, 3, 1, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(pruned(tokens).logits, model(tokens, use_cache=False).logits)
    assert pruned.dtype == torch.float32
    assert pruned.config.num_hidden_layers == 3

    # The cache has one slot a layer, so generation needs the layers numbered anew.
    cached = pruned.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    plain = pruned.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, plain)
    assert AutoTokenizer.from_pretrained(tmp_path / "pruned").chat_template == TEMPLATE


def test_impossible_layers_are_refused(tmp_path):
    folder = save_model(tmp_path / "whole")
    with pytest.raises(ModelError, match=r"has layers 0 to 4; drop_layers names \[5, 9\]"):
        prune_layers(folder, [1, 5, 9], tmp_path / "pruned")
    with pytest.raises(ModelError, match="leave at least one"):
        prune_layers(folder, range(5), tmp_path / "pruned")


def test_a_good_model_passes(tmp_path):
    check_model(save_model(tmp_path), role="student", chat_template=None, context=64)


def test_what_is_missing_is_named(tmp_path):
    def check(folder: Path, context: int = 64, template: str | None = None) -> None:
        check_model(folder, role="student", chat_template=template, context=context)

    with pytest.raises(ModelError, match=r"no config\.json"):
        check(tmp_path)
    with pytest.raises(ModelError, match=r"context of 64 tokens, student\.max_length is 65"):
        check(save_model(tmp_path / "short"), context=65)
    base = save_model(tmp_path / "base", template=None)
    check(base, template=TEMPLATE)
    with pytest.raises(ModelError, match="no chat template"):
        check(base)
    no_tokenizer = save_model(tmp_path / "no_tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (no_tokenizer / name).unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        check(no_tokenizer)


def test_missing_and_damaged_weights_are_named(tmp_path):
    def check(folder: Path) -> None:
        check_model(folder, role="teacher", chat_template=None, context=64)

    folder = save_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        check(folder)
    weights.unlink()
    with pytest.raises(ModelError, match=r"teacher in .* has no weights"):
        check(folder)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors"):
        check(folder)


@pytest.mark.parametrize("template", [TEMPLATE, None])
@pytest.mark.parametrize("link", [True, False])
def test_a_model_with_another_template(tmp_path, template, link):
    """Its own one, where it has one, is taken no more; of base models there is none."""
    folder = save_model(tmp_path / "model", template=template)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "in the settings"}))
    (output := tmp_path / "other").mkdir()
    for _ in range(2):  # a session that was killed has left what the next one makes again
        with_template(folder, "{{ messages[0]['content'] }}!", output, link=link)
    chat = [{"role": "user", "content": "a"}]
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "a!"
    tokenizer.save_pretrained(tmp_path / "tuned")
    assert AutoTokenizer.from_pretrained(tmp_path / "tuned").apply_chat_template(chat, tokenize=False) == "a!"
    assert (output / "model.safetensors").is_symlink() == link
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(output).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_weights_under_other_names_are_not_made_up(tmp_path):
    folder = save_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file({f"module.{name}": value for name, value in weights.items()}, folder / "model.safetensors", PT)
    with pytest.raises(ModelError, match=r"no fitting weights for \d+ of its parameters \(lm_head\.weight, "):
        check_model(folder, role="student", chat_template=None, context=64)
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", PT)
    with pytest.raises(ModelError, match=r"for 1 of its parameters \(model\.norm\.weight\)"):
        check_model(folder, role="student", chat_template=None, context=64)


def test_an_adapter_that_transformers_does_not_load_whole_is_refused(tmp_path):
    """Magnitudes of DoRA: transformers 5.19 looks for them under another name and makes up new ones."""
    folder = save_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"no fitting weights for 5 of its parameters .*lora_magnitude_vector"):
        check_model(folder, role="student", chat_template=None, context=64)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            BertConfig(vocab_size=8, num_hidden_layers=1, max_position_embeddings=64, **SMALL_BERT),
            "see those after them",
        ),
        (LlamaConfig(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "is quantized"),
    ],
    ids=["encoder", "quantized"],
)
def test_models_that_cannot_be_trained_to_write_are_named(tmp_path, config, said):
    folder = save_model(tmp_path)
    config.save_pretrained(folder)
    with pytest.raises(ModelError, match=said):
        check_model(folder, role="student", chat_template=None, context=64)


def test_a_students_rows_stay_below_the_length_where_its_positions_change(tmp_path):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 32, "rope_theta": 1e4, **factors}
    folder = save_model(
        tmp_path, Phi3Config(vocab_size=8, num_hidden_layers=1, max_position_embeddings=64, pad_token_id=0,
                             original_max_position_embeddings=32, rope_parameters=rope, **SMALL))  # fmt: skip
    check_model(folder, role="student", chat_template=None, context=32)
    check_model(folder, role="teacher", chat_template=None, context=64)
    with pytest.raises(ModelError, match=r"more than 32 tokens \(LongRoPE\).*set student\.max_length=32"):
        check_model(folder, role="student", chat_template=None, context=33)


def test_weights_are_counted_once(tmp_path):
    folder = save_model(tmp_path)
    counted = num_weights(folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    (folder / "training_args.bin").write_bytes(b"settings")
    assert counted == num_weights(folder) == sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        check_model(folder, role="student", chat_template=None, context=64)


def test_digest_follows_content_not_cards(tmp_path):
    first, second = save_model(tmp_path / "first"), save_model(tmp_path / "second")
    (second / "README.md").write_text("about it")
    assert model_digest(first) == model_digest(second)
    (second / "config.json").write_text((second / "config.json").read_text() + "\n")
    assert model_digest(first) != model_digest(second)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()
    with pytest.raises(ModelError, match="no model directory at /no/such/model"):
        resolve_model("/no/such/model")
    with pytest.raises(ModelError, match="no embedded model is called"):
        resolve_model("embedded:gpt-9")
    (copied := tmp_path / "_ray_pkg_0a1b" / "models").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"models is a folder in the job's own copy .* give an absolute path"):
        resolve_model(str(copied))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="cannot be had from the Hugging Face Hub"):
        resolve_model("not a/valid name")


def test_what_lies_here_has_no_name_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "models" / "student").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert [hub_name(model) for model in (SMOLLM2, str(tmp_path), "models/student")] == [None] * 3
    assert hub_name("meta-llama/Meta-Llama-3-8B") == "meta-llama/Meta-Llama-3-8B"


@pytest.mark.slow
def test_embedded_model_is_unpacked_once_and_answers(tmp_path):
    folder = resolve_model("embedded:smollm2-135m-instruct", tmp_path)
    check_model(folder, role="teacher", chat_template=None, context=4096)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])

    changed = folder.stat().st_mtime_ns
    assert resolve_model("embedded:smollm2-135m-instruct", tmp_path) == folder
    assert folder.stat().st_mtime_ns == changed
    assert [entry.name for entry in tmp_path.iterdir()] == [folder.name]


def save_adapter(folder: Path, base: Path) -> Path:
    """An adapter's folder as PEFT users have it: no weights of its model, whose name is in its config."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    add_adapter(model, Lora(rank=2), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


def test_an_adapter_is_joined_with_its_model(tmp_path):
    base = save_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    join_adapter(adapter, tmp_path / "joined")
    check_model(tmp_path / "joined", role="student", chat_template=None, context=64)
    assert model_digest(tmp_path / "joined") != model_digest(base)
    tokens = torch.tensor([[2, 3, 2]])
    joined, apart, plain = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        for folder in (tmp_path / "joined", adapter, base)
    )
    assert torch.equal(joined, apart)
    assert not torch.allclose(joined, plain)


def test_an_adapter_cannot_be_judged_in_an_engine_that_knows_none(tmp_path):
    quickstart = Path(__file__).parents[1] / "configs/quickstart.yaml"
    joined = Run(str(tmp_path / "run")).artifact("inputs/student")
    joined.begin(Identity(stage="student", settings={}, inputs={}))
    with joined.model_writer() as folder:
        join_adapter(save_adapter(tmp_path / "adapter", save_model(tmp_path / "base")), folder)
    joined.commit(details={}, seconds=0.0)
    require_whole(load_config(quickstart), joined)
    with pytest.raises(ModelError, match=r"is an adapter, and evaluate\.judge has the student answer in vLLM"):
        require_whole(load_config(quickstart, ["evaluate.judge={model: pool}"]), joined)


def test_what_an_adapter_cannot_be_is_said(tmp_path):
    base = save_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    with pytest.raises(ModelError, match=r"the teacher in .* is an adapter: merge it"):
        check_model(adapter, role="teacher", chat_template=None, context=64)
    with pytest.raises(ModelError, match="is an adapter, layers are removed from whole models"):
        prune_layers(adapter, [0], tmp_path / "pruned")
    with pytest.raises(ModelError, match=r"student\.lora does not fit the student: .*nowhere"):
        add_adapter(AutoModelForCausalLM.from_pretrained(base), Lora(targets=("nowhere",)), seed=0)
    (base.parent / "gone").mkdir()
    base.rename(base.parent / "gone/base")
    with pytest.raises(ModelError, match="no model directory at"):
        join_adapter(adapter, tmp_path / "joined")


@pytest.mark.parametrize("config", [T5Config(vocab_size=8), BartConfig(vocab_size=8)])
def test_a_model_that_writes_no_text_is_refused(tmp_path, config):
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"the student in .* is a {config.model_type}, no causal language model"):
        check_model(tmp_path, role="student", chat_template=None, context=64)
