"""The settings: what loads, what is refused and in which words, what decides a result."""

from __future__ import annotations

import errno
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
import yaml
from pydantic import ValidationError

from montessori_ray import config as config_module
from montessori_ray.config import (
    Config,
    DataFile,
    Score,
    Section,
    Student,
    WorkerResources,
    content_settings,
    load_config,
    score_settings,
)
from montessori_ray.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
README = CONFIGS.parent / "README.md"
SHIPPED = sorted(set(CONFIGS.glob("*.yaml")) - set(CONFIGS.glob("benchmarks_*.yaml")))
MINIMAL: dict[str, Any] = {
    "run": "runs/test",
    "data": {"seeds": {"path": "seeds"}, "reference": {"path": "reference"}, "held_out": {"path": "held_out"}},
    "teacher": {"model": "a-teacher"},
    "student": {"model": "a-student"},
}


def write(folder: Path, tree: dict[str, Any], name: str = "config.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, MINIMAL)


# -- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path) -> None:
    config = load_config(path)
    # What a run writes into its directory is read back as the same settings.
    assert Config.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_the_quickstart_reads_the_shipped_data_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = load_config(CONFIGS / "quickstart.yaml").data
    for file, name in ((data.seeds, "seeds"), (data.reference, "reference"), (data.held_out, "held_out")):
        assert Path(file.path) == CONFIGS / "data" / f"{name}.jsonl"


@pytest.mark.parametrize("student", ["tinyllama", "llama3_8b"])
def test_paper_configs_hold_the_papers_settings(student: str) -> None:
    """The table "Settings" of the paper and of the authors' configuration files, by number."""
    config = load_config(CONFIGS / f"paper_{student}.yaml")
    synthesize, tuning = config.synthesize, config.tune_teacher
    assert (config.iterations, config.training_set) == (2, 10_000)
    assert (synthesize.shots, synthesize.generated_shots, synthesize.n, synthesize.prompt_style) == (8, 2, 4, "paper")
    for sampling, temperature in ((synthesize.instructions, 1.0), (synthesize.responses, 0.6)):
        assert sampling.temperature == temperature
        assert (sampling.top_p, sampling.presence_penalty, sampling.max_tokens) == (0.9, 1.0, 1024)
    assert (synthesize.min_characters, synthesize.max_characters, synthesize.duplicate_rouge_l) == (6, 400, 0.7)
    for training in (config.warm_up, config.train_student):
        assert (training.optimizer.learning_rate, training.optimizer.weight_decay) == (5e-6, 0.0)
        assert (training.epochs, training.batch_size) == (1, 32)
    assert (config.warm_up.warmup_ratio, config.warm_up.decay_ratio) == (1.0, 0.0)
    assert (config.train_student.warmup_ratio, config.train_student.decay_ratio) == (0.1, 0.4)
    assert (tuning.optimizer.learning_rate, tuning.beta, tuning.epochs) == (1e-6, 0.1, 1)
    assert (tuning.batch_size, tuning.workers) == (4, 4)  # theirs is 2: the configuration says why
    assert (tuning.warmup_ratio, tuning.decay_ratio, tuning.max_length) == (0.1, 0.4, 1024)
    assert (config.data.reference.rows, config.student.max_length) == (256, 1024)
    assert (config.score.estimator, config.pair.rule, config.pair.margin_se) == ("exact", "all", 0.0)
    assert config.teacher.model == "meta-llama/Meta-Llama-3-8B-Instruct"


def test_paper_configs_differ_in_the_student_alone() -> None:
    tiny, large = (load_config(CONFIGS / f"paper_{name}.yaml") for name in ("tinyllama", "llama3_8b"))
    assert (tiny.student.model, large.student.model) == ("TinyLlama/TinyLlama_v1.1", "meta-llama/Meta-Llama-3-8B")
    keys = tuple(key for key in Config.model_fields if key not in ("run", "student", "cluster"))
    before, after = content_settings(tiny, keys), content_settings(large, keys)
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= {f"{section}.{key}" for section in ("warm_up", "train_student") for key in SHARDING}


SHARDING = ("zero_stage", "gradient_checkpointing")
"""Settings that change how a training is computed, its result by rounding only."""


def test_paper_configs_fit_a_node_of_eight_gpus() -> None:
    for student in ("tinyllama", "llama3_8b"):
        config = load_config(CONFIGS / f"paper_{student}.yaml")
        score = config.score
        workers: list[tuple[WorkerResources, int]] = [
            (config.pool.worker, config.pool.replicas),
            (score.worker, score.groups * score.group_size),
            *((part.worker, part.workers) for part in (config.warm_up, config.tune_teacher, config.train_student)),
        ]
        assert all(worker.gpus * count <= 8 for worker, count in workers)


def test_seeds_and_held_out_rows_of_the_paper_configs_do_not_overlap() -> None:
    data = load_config(CONFIGS / "paper_tinyllama.yaml").data
    assert data.seeds.path == data.held_out.path
    assert data.seeds.rows is not None
    assert data.seeds.start + data.seeds.rows <= data.held_out.start


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("paper_tinyllama", "<s>### Instruction:\nHi?\n\n### Response:\nYes.</s>"),
        ("quickstart", "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"),
    ],
)
def test_shipped_chat_templates_render(config: str, expected: str) -> None:
    """The prompt is a prefix of the whole text, which the mask of the response needs."""
    source = load_config(CONFIGS / f"{config}.yaml").student.chat_template
    assert source is not None
    # As transformers compiles chat templates.
    template = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    chat = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    marks = {"bos_token": "<s>", "eos_token": "</s>"}
    whole = template.render(messages=chat, add_generation_prompt=False, **marks)
    prompt = template.render(messages=chat[:1], add_generation_prompt=True, **marks)
    assert whole == expected
    assert whole.startswith(prompt)
    assert whole[len(prompt) :].startswith("Yes.")


# -- extends and overrides ------------------------------------------------------------------------------------------


def test_extends_merges_sections_key_by_key(tmp_path: Path) -> None:
    base = MINIMAL | {"score": {"lease_size": 3, "groups": 2}, "student": {"model": "x", "drop_layers": [1, 2]}}
    write(tmp_path, base, "base.yaml")
    path = write(
        tmp_path, {"extends": "base.yaml", "score": {"groups": 5}, "student": {"drop_layers": [7]}, "iterations": 3}
    )
    config = load_config(path)
    assert (config.score.lease_size, config.score.groups) == (3, 5)
    assert (config.student.model, config.student.drop_layers) == ("x", (7,))
    assert config.iterations == 3


def test_an_arm_of_the_extended_file_may_be_left_out(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL | {"compare": {"against": "a", "arms": {"a": {}, "b": {"seed": 1}}}}, "base.yaml")
    extended = {"extends": "base.yaml", "compare": {"arms": {"b": None, "c": {"iterations": 2}}}}
    compare = load_config(write(tmp_path, extended)).compare
    assert compare is not None
    assert compare.arms == {"a": {}, "c": {"iterations": 2}}
    with pytest.raises(ConfigError, match="against is 'a', expected one of the arms: c"):
        load_config(write(tmp_path, extended | {"compare": {"arms": {"a": None, "b": None, "c": {}}}}))


def test_an_arm_keeps_its_other_settings_and_changes_no_other_of_a_section(tmp_path: Path) -> None:
    """Else a control whose number of pairs is changed would no longer be one."""
    arms = {"a": {}, "b": {"pair.signal": "shuffled_labels"}, "c": {"pair.judge": {"model": "pool"}}}
    path = write(tmp_path, MINIMAL | {"compare": {"against": "a", "arms": arms}}, "base.yaml")
    compare = load_config(path, ["compare.arms.b.pair.max_pairs=10", "compare.arms.b.pair.margin_se=1"]).compare
    assert compare is not None
    assert compare.arms == {
        "a": {},
        "b": {"pair.signal": "shuffled_labels", "pair.max_pairs": 10, "pair.margin_se": 1},
        "c": {"pair.judge.model": "pool"},
    }
    with pytest.raises(ConfigError, match=r"arm b sets pair\.seed"):
        load_config(path, ["compare.arms.b={pair: {seed: 7}}"])


def test_an_arm_of_the_extended_file_is_replaced_by_one_of_the_same_name(tmp_path: Path) -> None:
    arms = {"a": {"pair.signal": "random"}, "b": {"pair.signal": "random"}}
    write(tmp_path, MINIMAL | {"compare": {"against": "a", "arms": arms}}, "base.yaml")
    extended = {"extends": "base.yaml", "compare": {"arms": {"a": {}, "b": {"pair": {"max_pairs": 3}}}}}
    compare = load_config(write(tmp_path, extended)).compare
    assert compare is not None
    assert compare.arms == {"a": {}, "b": {"pair.max_pairs": 3}}


@pytest.mark.parametrize("by_override", [False, True])
def test_sections_are_merged_and_other_mappings_replaced(tmp_path: Path, *, by_override: bool) -> None:
    base = {"losses": {"sigmoid": 1, "sft": 0.2}, "optimizer": {"learning_rate": 1e-4}, "batch_size": 2}
    write(tmp_path, MINIMAL | {"tune_teacher": base}, "base.yaml")
    over = {"losses": {"ipo": 1}, "optimizer": {"weight_decay": 0.1}}
    words = [f"tune_teacher={json.dumps(over)}"] if by_override else []
    tree = {"extends": "base.yaml"} | ({} if by_override else {"tune_teacher": over})
    settings = load_config(write(tmp_path, tree), words).tune_teacher
    assert settings.losses == {"ipo": 1}
    assert (settings.optimizer.learning_rate, settings.optimizer.weight_decay) == (1e-4, 0.1)
    assert settings.batch_size == 2


def test_extends_over_two_levels_and_folders_resolves_data_beside_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far/seeds.jsonl").touch()
    (tmp_path / "held_out.jsonl").touch()
    far = MINIMAL["data"] | {"seeds": {"path": "seeds.jsonl"}}
    write(tmp_path, MINIMAL | {"data": far}, "far/base.yaml")
    write(tmp_path, {"extends": "far/base.yaml", "data": {"held_out": {"path": "held_out.jsonl"}}}, "middle.yaml")
    data = load_config(write(tmp_path, {"extends": "middle.yaml", "seed": 4})).data
    assert data.seeds.path == str((tmp_path / "far/seeds.jsonl").resolve())
    assert data.held_out.path == str((tmp_path / "held_out.jsonl").resolve())
    assert data.reference.path == "reference", "a name that is no file beside the config stays: it may be on the Hub"


def test_another_file_or_model_takes_nothing_over_from_the_first(tmp_path: Path) -> None:
    rows = {"path": "theirs", "input": "input", "start": 7, "rows": 9}
    base = MINIMAL | {
        "data": MINIMAL["data"] | {"seeds": rows, "held_out": rows},
        "student": {"model": "x", "drop_layers": [1], "chat_template": "{{ messages }}", "max_length": 64},
    }
    write(tmp_path, base, "base.yaml")
    mine = {"seeds": {"path": "mine"}, "held_out": {"path": "theirs", "rows": 3}}
    config = load_config(write(tmp_path, {"extends": "base.yaml", "data": mine, "student": {"model": "y"}}))
    assert config.data.seeds == DataFile(path="mine")
    assert config.data.held_out == DataFile(path="theirs", input="input", start=7, rows=3)
    assert config.student == Student(model="y")


def test_the_readmes_example_uses_its_own_rows_and_models_as_they_are(tmp_path: Path) -> None:
    (example,) = [part for part in README.read_text().split("```yaml\n")[1:] if part.startswith("extends")]
    tree = yaml.safe_load(example.split("```")[0])
    tree["extends"] = str(README.parent / tree["extends"])
    config = load_config(write(tmp_path, tree))
    for rows in (config.data.seeds, config.data.reference, config.data.held_out):
        assert (rows.input, rows.start, rows.rows, rows.category) == (None, 0, None, None)
    assert config.student == Student(model=tree["student"]["model"])
    assert config.split.warmup == 10_000, "the paper's settings otherwise"


def test_a_chat_template_is_kept_as_text_and_found_beside_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "{{ messages }}"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/chat.jinja").write_text(text, encoding="utf-8")
    config = load_config(write(tmp_path / "mine", MINIMAL | {"student": {"model": "x", "chat_template": "chat.jinja"}}))
    assert config.student.chat_template == text
    monkeypatch.chdir(tmp_path / "mine")
    override = ["student.chat_template=chat.jinja"]
    assert load_config(write(tmp_path, MINIMAL), override).student.chat_template == text
    with pytest.raises(ConfigError, match=r"chat_template: 'absent' is neither a Jinja template nor a readable"):
        load_config(write(tmp_path, MINIMAL), ["student.chat_template=absent"])


def test_gpu_configs_keep_nothing_of_the_quickstarts_cpu(tmp_path: Path) -> None:
    for name in ("quickstart_gpu", "evidence_gpu"):
        config = load_config(CONFIGS / f"{name}.yaml")
        assert config.pool.engine["enforce_eager"] is False, "or there is no CUDA graph"
        assert config.score.reference_tokens == Score().reference_tokens
        assert config.student.max_length >= 2 * config.synthesize.responses.max_tokens
        workers = (config.warm_up.worker, config.score.worker, config.tune_teacher.worker, config.train_student.worker)
        assert {worker.gpus for worker in (config.pool.worker, *workers)} == {1}


def test_extends_cycle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"extends": "b.yaml"}, "a.yaml")
    write(tmp_path, {"extends": "a.yaml"}, "b.yaml")
    with pytest.raises(ConfigError, match=r"a\.yaml extends itself: .*a\.yaml -> .*b\.yaml"):
        load_config(tmp_path / "a.yaml")


def test_extends_of_a_missing_file_names_that_file(tmp_path: Path) -> None:
    path = write(tmp_path, {"extends": "absent.yaml"})
    with pytest.raises(ConfigError, match=r"no config file at .*absent\.yaml"):
        load_config(path)


def test_overrides_are_dotted_and_typed_as_yaml(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            "score.baseline=warmed",
            "score.learning_rate=1e-4",
            "student.drop_layers=[3, 4]",
            "evaluate={fresh: 0}",
            "data.reference.rows=null",
            "pool.worker.gpus=0.5",
            "run=s3://bucket/a=b",
        ],
    )
    assert (config.score.baseline, config.score.learning_rate) == ("warmed", 1e-4)
    assert config.student.drop_layers == (3, 4)
    assert config.evaluate.fresh == 0
    assert config.data.reference.rows is None
    assert config.pool.worker.gpus == 0.5
    assert config.run == "s3://bucket/a=b"


def test_later_overrides_win_and_stand_above_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL | {"seed": 1})
    assert load_config(path, ["seed=2", "seed=3"]).seed == 3


# -- what is refused ------------------------------------------------------------------------------------------------


def test_missing_file_says_where_to_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file at .*absent\.yaml; configs/quickstart\.yaml"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"run: [unclosed", "cannot read .* as YAML"),
        (b"run: \xff\xfe", "cannot read .* as YAML"),
        (b"- a\n- list", "holds list, expected a mapping"),
        (b"", "holds NoneType, expected a mapping"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        load_config(path)


def test_data_that_may_not_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    exists, is_dir = Path.exists, Path.is_dir

    def refuse(real: Any) -> Any:
        def asked(place: Path, **options: Any) -> bool:
            if place.name == "rows.jsonl":
                raise PermissionError(errno.EACCES, "Permission denied", str(place))
            return bool(real(place, **options))

        return asked

    path = write(tmp_path, MINIMAL | {"data": MINIMAL["data"] | {"reference": {"path": "rows.jsonl"}}})
    config = load_config(path)
    message = r"rows\.jsonl cannot be read \(Permission denied\): let this user read it, or give another file"
    monkeypatch.setattr(Path, "is_dir", refuse(is_dir))
    with pytest.raises(ConfigError, match=message):
        content_settings(config, ("data.reference",))
    monkeypatch.setattr(Path, "exists", refuse(exists))
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("iteration=2", "unknown key iteration"),
        ("score.baselin=warmed", r"unknown key score\.baselin"),
        ("synthesize.instructions.topp=0.5", r"unknown key synthesize\.instructions\.topp"),
        ("data.validation.path=x", r"unknown key data\.validation"),
        ("iterations=many", "iterations is 'many': .*integer"),
        ("iterations=0", "iterations is 0: .*greater than or equal to 1"),
        ("score.baseline=median", "score.baseline is 'median': .*'null_step' or 'warmed'"),
        ("pool=3", "pool is 3"),
        ("pool.engine={dtype: float16}", r"pool\.engine: dtype is a setting of its own: set pool\.dtype instead"),
        ("synthesize.instructions.temperature=0", r"synthesize\.instructions\.temperature is 0: .*greater than 0"),
        ("score.optimizer_state=none", "score: optimizer_state none says nothing of the rate .* set learning_rate"),
        (
            "compare={against: a, arms: {a: {tune_teacher.seed: 3}}}",
            r"compare: arm a sets tune_teacher\.seed: seeds are compare\.tuning_seeds",
        ),
        ("pool.worker.gpus=-1", r"pool\.worker\.gpus is -1"),
        (
            "evaluate.judge={model: m, base_url: 'host:9/v1'}",
            r"evaluate\.judge: base_url is host:9/v1, expected an address such as http://",
        ),
        ("score.worker.cpus=0", r"score\.worker: a worker with neither CPUs nor GPUs has no place"),
        ("score={group_size: 2, worker: {gpus: 0.5}}", "score: group_size is 2, and worker.gpus 0.5: ranks that work"),
        ("warm_up={workers: 2, worker: {gpus: 0.5}}", "warm_up: workers is 2, and worker.gpus 0.5: ranks that work"),
        ("warm_up.optimizer.betas=[0.9, 1.0]", r"warm_up\.optimizer\.betas\.1 is 1\.0: .*less than 1"),
        ("cluster.object_store_memory=1", r"cluster\.object_store_memory is 1: .*greater than or equal to 78643200"),
        ("pool.worker.gpus=1.5", r"pool\.worker\.gpus: Ray gives a share of one GPU or whole GPUs"),
        ("synthesize.duplicate_rouge_l=1.5", r"synthesize\.duplicate_rouge_l is 1\.5"),
        ("student.drop_layers=[a]", r"student\.drop_layers\.0 is 'a'"),
        ("warm_up.optimizer.learning_rate=0", r"warm_up\.optimizer\.learning_rate is 0"),
        ("synthesize.n=1", r"synthesize\.n is 1: a pair needs two instructions .* set n >= 2"),
        ("synthesize.generated_shots=9", r"synthesize\.generated_shots is larger than synthesize\.shots"),
        ("synthesize.responses.max_tokens=4096", r"synthesize\.responses\.max_tokens leaves no room .* 4096"),
        ("pool.max_model_len=1024", r"synthesize\.instructions\.max_tokens leaves no room .* 1024"),
        ("score={groups: 3, max_groups: 2}", "score: max_groups 2 is below groups 3: raise it"),
        ("warm_up.micro_batch_size=5", "warm_up: batch_size 32 is not a multiple of micro_batch_size x workers = 5"),
        ("train_student.workers=3", "batch_size 32 is not a multiple of micro_batch_size x workers = 12"),
        ("tune_teacher.workers=2", "batch_size 2 is not a multiple of micro_batch_size x workers = 4"),
        ("train_student.decay_ratio=0.95", r"train_student: warmup_ratio \+ decay_ratio is above 1"),
        ("seed.part=1", "seed.part: seed is a value, not a section"),
        ("seed", "override 'seed' is not of the form section.key=value"),
        ("=3", "override '=3' is not of the form section.key=value"),
        ("seed=[1", r"override 'seed=\[1': the value is not YAML"),
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path: Path, override: str, said: str) -> None:
    path = write(tmp_path, MINIMAL | {"seed": 0})
    with pytest.raises(ConfigError, match=said):
        load_config(path, [override])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["tune_teacher.tunes=response", "synthesize.responses.temperature=0"],
            "the 4 candidates .* would be one",
        ),
        (
            ["evaluate.judge={model: pool}", "compare={against: a, arms: {a: {}}}"],
            r"evaluate\.judge is for one run's student: in a comparison no student answers",
        ),
        (["student.lora={}", "evaluate.judge={model: pool}"], r"is not given its adapter \(student\.lora\)"),
    ],
)
def test_sections_that_contradict_each_other_are_refused(minimal: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(minimal, overrides)


def test_message_begins_with_the_file_and_lists_every_finding(tmp_path: Path) -> None:
    path = write(tmp_path, {key: value for key, value in MINIMAL.items() if key != "teacher"} | {"sed": 1})
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["iterations=x"])
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    for finding in ("teacher is required", "unknown key sed", "iterations is 'x'"):
        assert finding in message


@pytest.mark.parametrize("tree", [{"extends": 3}, {"data": "a file"}, {"data": ["a", "b"]}, {"extends": ["a", "b"]}])
def test_sections_of_the_wrong_kind_are_refused(tmp_path: Path, tree: dict[str, Any]) -> None:
    path = write(tmp_path, MINIMAL | tree)
    with pytest.raises(ConfigError):
        load_config(path)


@pytest.mark.parametrize(
    "value",
    [".nan", ".inf"],
)
def test_numbers_that_are_none_are_refused(minimal: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"warm_up\.optimizer\.learning_rate"):
        load_config(minimal, [f"warm_up.optimizer.learning_rate={value}"])


def test_truth_values_are_not_numbers(minimal: Path) -> None:
    with pytest.raises(ConfigError, match="iterations"):
        load_config(minimal, ["iterations=true"])


def test_settings_cannot_be_changed_after_loading(minimal: Path) -> None:
    config = load_config(minimal)
    with pytest.raises(ValidationError):
        config.seed = 1  # type: ignore[misc]


# -- what decides a result ------------------------------------------------------------------------------------------


def sections(section: type[Section] = Section) -> Iterator[type[Section]]:
    for below in section.__subclasses__():
        yield below
        yield from sections(below)


ALL_SECTIONS = sorted(set(sections()), key=lambda section: section.__name__)


@pytest.mark.parametrize("section", ALL_SECTIONS, ids=lambda section: section.__name__)
def test_every_field_is_documented(section: type[Section]) -> None:
    assert section.__doc__
    for name, field in section.model_fields.items():
        is_section = inspect.isclass(field.annotation) and issubclass(field.annotation, Section)
        assert field.description or is_section, f"{section.__name__}.{name} has no docstring"


@pytest.mark.parametrize("section", ALL_SECTIONS, ids=lambda section: section.__name__)
def test_speed_only_names_fields_that_exist(section: type[Section]) -> None:
    assert section.speed_only <= section.model_fields.keys()


def test_all_sections_are_those_of_the_module() -> None:
    defined = {item for item in vars(config_module).values() if inspect.isclass(item) and issubclass(item, Section)}
    assert defined - {Section} == set(ALL_SECTIONS)


def test_content_settings_are_dotted_leaves_without_what_only_decides_speed(minimal: Path) -> None:
    config = load_config(minimal, ["student.drop_layers=[1]"])
    assert content_settings(config, ("score", "seed", "student.drop_layers", "pair")) == {
        "score.estimator": "exact",
        "score.baseline": "null_step",
        "score.learning_rate": None,
        "score.optimizer_state": None,
        "score.correction_rows": 16,
        "score.recheck": 16,
        "score.loss_mean": "example",
        "score.loss_batch": 8,
        "score.reference_rows": None,
        "score.precision": "float32",
        "seed": 0,
        "student.drop_layers": [1],
        "pair.signal": "influence",
        "pair.threshold": "baseline",
        "pair.rule": "all",
        "pair.margin_se": 0.0,
        "pair.max_pairs": None,
        "pair.below_noise": "drop",
        "pair.judge": None,
        "pair.seed": None,
    }


@pytest.mark.parametrize("order", [1, -1])
def test_another_model_or_file_takes_nothing_over_on_the_command_line_either(tmp_path: Path, order: int) -> None:
    base = {
        **MINIMAL,
        "student": {"model": "small", "drop_layers": [1], "max_length": 99},
        "data": {**MINIMAL["data"], "reference": {"path": "old.jsonl", "rows": 3, "category": "kind"}},
    }
    path = write(tmp_path, base)
    same = load_config(path, ["student.model=small", "student.max_length=77"])
    assert (same.student.drop_layers, same.student.max_length) == ((1,), 77)
    overrides = ["student.model=other", "student.drop_layers=[2]", "data.reference.path=new.jsonl"]
    other = load_config(path, overrides[::order])
    assert other.student == Student(model="other", drop_layers=(2,))
    assert other.data.reference == DataFile(path="new.jsonl")


def test_another_judge_is_asked_at_the_same_endpoint(tmp_path: Path) -> None:
    judge = {"model": "large", "base_url": "http://host/v1", "api_key_env": "KEY", "max_tokens": 900}
    path = write(tmp_path, {**MINIMAL, "evaluate": {"judge": judge}})
    found = load_config(path, ["evaluate.judge.model=small"]).evaluate.judge
    assert found is not None
    assert found.model_dump(include=set(judge)) == {**judge, "model": "small"}
    (tmp_path / "over.yaml").write_text(f"extends: {path.name}\nevaluate: {{judge: {{model: small}}}}\n")
    assert load_config(tmp_path / "over.yaml").evaluate.judge == found


def test_an_optimizer_state_stands_for_its_content(minimal: Path, tmp_path: Path) -> None:
    said = []
    for name, content in (("a", "1"), ("b", "2"), ("c/a", "1")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "optimizer.json").write_text(content)
        config = load_config(minimal, [f"score.optimizer_state={tmp_path / name}"])
        said.append(content_settings(config, ("score.optimizer_state",))["score.optimizer_state"])
    assert said[0].startswith("a (content ")
    assert said[0] == said[2] != said[1]
    (tmp_path / "c/a/optimizer.json").write_text("3")
    assert content_settings(config, ("score",))["score.optimizer_state"] != said[2]


def test_keys_of_scoring_are_the_score_sections_unless_they_name_another() -> None:
    tree = {
        "run": "scores",
        "data": {name: {"path": f"{name}.jsonl"} for name in ("examples", "reference", "warm_up")},
        "student": {"model": "s"},
    }
    settings = score_settings(tree, ["worker.gpus=1", "groups=2", "warm_up.worker.gpus=1", "student.max_length=64"])
    assert (settings.score.worker.gpus, settings.score.groups) == (1, 2)
    assert (settings.warm_up.worker.gpus, settings.student.max_length) == (1, 64)


def test_a_run_begun_on_cpus_is_not_continued_in_the_precision_of_gpus(minimal: Path) -> None:
    said = [
        content_settings(load_config(minimal, overrides), ("score",))["score.precision"]
        for overrides in ([], ["score.worker.gpus=1"], ["score.worker.gpus=1", "score.precision=float32"])
    ]
    assert said == ["float32", "tf32", "float32"]


def test_content_settings_go_down_into_sections(minimal: Path) -> None:
    settings = content_settings(load_config(minimal), ("tune_teacher", "synthesize"))
    assert settings["tune_teacher.optimizer.learning_rate"] == 1e-6
    assert settings["tune_teacher.optimizer.betas"] == [0.9, 0.999]
    assert settings["synthesize.responses.temperature"] == 0.6
    assert not {"synthesize.commit_prompts", "tune_teacher.checkpoint_steps"} & settings.keys()
    assert not any(key.startswith("tune_teacher.worker.") for key in settings)


@pytest.mark.parametrize(
    "override",
    ["score.groups=4", "score.worker.cpus=4", "score.reference_tokens=9", "synthesize.commit_prompts=1"],
)
def test_faster_or_elsewhere_is_the_same_work(minimal: Path, override: str) -> None:
    keys = ("score", "synthesize")
    assert content_settings(load_config(minimal), keys) == content_settings(load_config(minimal, [override]), keys)


def test_workers_ask_for_what_is_not_zero() -> None:
    assert WorkerResources(cpus=2, gpus=0).bundle == {"CPU": 2}
    assert WorkerResources(cpus=0, gpus=0.5).bundle == {"GPU": 0.5}
    assert [WorkerResources(cpus=cpus, gpus=1).threads for cpus in (0, 0.5, 1, 2.5, 8)] == [1, 1, 1, 2, 8]


def test_a_file_of_rows_stands_for_its_content(minimal: Path, tmp_path: Path) -> None:
    def settings(path: Path) -> dict[str, object]:
        return content_settings(load_config(minimal, [f"data.seeds.path={path}"]), ("data.seeds",))

    here, there = tmp_path / "a/seeds.jsonl", tmp_path / "b/seeds.jsonl"
    for path in (here, there):
        path.parent.mkdir()
        path.write_text('{"instruction": "Name a prime."}\n', encoding="utf-8")
    assert settings(here) == settings(there)
    assert settings(here.parent)["data.seeds.path"] != settings(here)["data.seeds.path"]
    there.write_text('{"instruction": "Name two primes."}\n', encoding="utf-8")
    assert settings(here) != settings(there)
    assert settings(Path("someone/dataset"))["data.seeds.path"] == "someone/dataset"
