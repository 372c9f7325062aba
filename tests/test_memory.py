"""What a worker's copy of a model takes at least, and that a run which cannot have that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from montessori_ray.cluster import Memory, memory_of
from montessori_ray.config import Config, load_config
from montessori_ray.errors import ResourceError
from montessori_ray.loop import stages_of
from montessori_ray.memory import copy_of, require_memory
from montessori_ray.models import num_weights
from tests.tiny import write_student

CONFIGS = Path(__file__).parents[1] / "configs"
H100 = [Memory(host=2000.0, gpu=80.0)]
LLAMA = {"teacher": 8_030_000_000, "student": 8_030_000_000}
TINY = LLAMA | {"student": 1_100_000_000}


def refused(config: Config, weights: dict[Any, int | None], nodes: list[Memory]) -> dict[str, str]:
    """Stage -> why it is refused."""
    said = {}
    for stage in stages_of(config):
        try:
            require_memory(stage, config, weights, nodes)
        except ResourceError as error:
            said[stage.name] = str(error)
    return said


@pytest.mark.parametrize(("name", "weights"), [("paper_tinyllama", TINY), ("paper_llama3_8b", LLAMA)])
def test_the_papers_settings_fit_eight_gpus_of_80_gb(name: str, weights: dict[Any, int | None]) -> None:
    assert refused(load_config(CONFIGS / f"{name}.yaml"), weights, H100) == {}


def test_a_larger_student_than_the_settings_are_for_is_refused_stage_by_stage() -> None:
    said = refused(load_config(CONFIGS / "paper_tinyllama.yaml"), LLAMA, H100)
    assert {name.split("/")[-1] for name in said} == {"warm_up", "score", "train_student", "score_fresh"}
    assert said["iteration_00/warm_up"] == (
        "iteration_00/warm_up: each of its 8 workers needs 128 GB at least for a student of 8 billion weights (16 "
        "bytes each), and gets 80 GB of GPU memory: set warm_up.zero_stage=3, which divides it among warm_up.workers, "
        "and raise these"
    )
    assert "needs 161 GB at least for a student" in said["iteration_00/score"]


def test_a_teacher_needs_the_gpus_that_it_is_divided_over() -> None:
    large = {"teacher": 70_000_000_000, "student": 135_000_000}
    said = refused(load_config(CONFIGS / "paper_tinyllama.yaml"), large, H100)
    assert "raise pool.worker.gpus" in said["iteration_00/instructions"]
    divided = load_config(CONFIGS / "paper_tinyllama.yaml", ["pool.worker.gpus=2", "tune_teacher.workers=4"])
    assert not {name for name in refused(divided, large, H100) if name.endswith(("instructions", "responses"))}
    assert "350 GB at least for a teacher" in refused(divided, large, H100)["iteration_00/tune_teacher"]


def test_on_cpus_workers_share_what_the_nodes_have() -> None:
    quickstart = load_config(CONFIGS / "quickstart.yaml")
    weights: dict[Any, int | None] = {"teacher": 135_000_000, "student": 100_000_000}
    assert refused(quickstart, weights, [Memory(host=12.0, gpu=None)]) == {}
    said = refused(quickstart, weights, [Memory(host=3.0, gpu=None)])
    assert set(said) == {"iteration_00/score", "final/score_fresh"}, "two groups of 2 GB"
    assert "and the nodes have 3 GB of memory" in said["iteration_00/score"]


def test_what_is_not_known_is_not_refused() -> None:
    config = load_config(CONFIGS / "paper_tinyllama.yaml")
    assert refused(config, {"teacher": None, "student": None}, H100) == {}
    assert refused(config, LLAMA, [Memory(host=1.0, gpu=None)]) == {}, "GPUs that are not NVIDIA's"
    assert refused(config, LLAMA, []) == {}, "no node has answered"
    adapter = load_config(CONFIGS / "paper_llama3_8b.yaml", ["student.lora={rank: 8}", "score.group_size=1"])
    assert refused(adapter, LLAMA, H100) == {}
    small = refused(adapter, LLAMA, [Memory(host=2000.0, gpu=24.0)])
    assert "needs 32 GB at least for a student" in small["iteration_00/score"], "of its frozen weights alone"


def test_what_is_measured_last_is_measured_whole() -> None:
    """A student that is trained and scored in parts must fit one device in the end, or the run is lost there."""
    large = LLAMA | {"student": 32_000_000_000}
    divided = [f"{name}.zero_stage=3" for name in ("warm_up", "train_student", "score")]
    config = load_config(CONFIGS / "paper_llama3_8b.yaml", [*divided, "score.group_size=8"])
    said = refused(config, large, H100)
    assert [name for name in said if name.startswith("final/")] == ["final/evaluate"]
    assert "needs 128 GB at least for a student of 32 billion weights (4 bytes each)" in said["final/evaluate"]


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (["score.estimator=exact"], 20),
        (["score.estimator=first_order"], 24),
        (["score.estimator=corrected", "score.precision=bfloat16"], 28 + 6),
        (["score.group_size=4", "score.zero_stage=1"], 8 + 12 / 4),
        (["score.group_size=4", "score.zero_stage=3"], 20 / 4),
        (["score.group_size=4", "score.zero_stage=3", "score.offload=true", "score.worker.gpus=1"], 8 / 4),
    ],
)
def test_bytes_a_weight_of_a_scoring_group(settings: list[str], size: float) -> None:
    config = load_config(CONFIGS / "quickstart.yaml", settings)
    (stage,) = (stage for stage in stages_of(config) if stage.name == "iteration_00/score")
    held = copy_of(stage, config)
    assert held is not None
    assert held.bytes_a_weight == size


def test_weights_are_counted_in_the_headers_of_files(tmp_path: Path) -> None:
    write_student(tmp_path)
    save_file({"exp_avg.x": torch.zeros(1000)}, tmp_path / "optimizer.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert num_weights(tmp_path) == sum(parameter.numel() for parameter in model.parameters())
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bin")
    assert num_weights(tmp_path) is None


def test_memory_of_this_machine() -> None:
    (memory,) = memory_of([{"CPU": 2.0, "GPU": 0.0}])
    assert 1 < memory.host < 100_000
    assert memory.gpu is None or memory.gpu > 1
