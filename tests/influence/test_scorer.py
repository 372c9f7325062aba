"""A scorer on rows of text: its settings, its recheck, and what it refuses."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from montessori_ray.config import Score
from montessori_ray.errors import DataError, ModelError
from montessori_ray.influence import local_student, reference
from montessori_ray.influence.estimators import Exact, Measured, NotRestoredError
from montessori_ray.influence.scorer import Scorer
from montessori_ray.influence.zero_state import leaves_room
from montessori_ray.preferences import build_pairs
from montessori_ray.stages.score import summarise
from tests.tiny import TEMPLATE, rows

pytestmark = pytest.mark.usefixtures("alone")
REFERENCE, EXAMPLES = rows(12, 10_000), rows(6, 0)


@pytest.fixture
def scorer(tiny: Path) -> Callable[..., Scorer]:
    def make(student: Path = tiny, chat_template: str | None = None, **settings: Any) -> Scorer:
        given = Score(reference_tokens=64, **settings)
        return Scorer(student, REFERENCE, given, chat_template=chat_template, max_length=64, worker="me")

    return make


def influences(made: Scorer) -> list[float]:
    scores = [made.score(example).influence for example in EXAMPLES]
    assert None not in scores
    return scores  # type: ignore[return-value]


def test_an_exact_float32_score_is_its_own_recheck(scorer: Callable[..., Scorer]) -> None:
    score = scorer().score({**EXAMPLES[0], "recheck": True})
    assert (score.recheck_influence, score.recheck_influence_se) == (score.influence, score.influence_se)
    assert scorer().score(EXAMPLES[0]).recheck_influence is None


@pytest.mark.parametrize("backend", ["local", "zero"])
@pytest.mark.parametrize("settings", [{"precision": "bfloat16"}, {"estimator": "first_order"}])
def test_a_recheck_is_exact_in_float32(scorer: Callable[..., Scorer], backend: str, settings: dict[str, Any]) -> None:
    made, exact = scorer(backend=backend, **settings), influences(scorer(backend=backend))
    for example, expected in zip(EXAMPLES, exact, strict=True):
        score = made.score({**example, "recheck": True})
        assert score.recheck_influence == pytest.approx(expected, abs=1e-9)
        assert score.influence not in (None, score.recheck_influence)
        assert score.influence == pytest.approx(expected, abs=0.2)


def test_every_reference_row_is_checked_not_only_those_that_are_drawn(tiny: Path) -> None:
    for bad in (0, 5, 11):
        reference: list[dict[str, Any]] = [*rows(12, 10_000)]
        reference[bad]["instruction"] = " ".join(["w7"] * 100)
        with pytest.raises(DataError, match=f"^row e{bad:03d} \\('w7 w7"):
            Scorer(tiny, reference, Score(reference_rows=2), chat_template=None, max_length=64, worker="me")


def test_fewer_reference_rows_are_the_same_ones_every_time(scorer: Callable[..., Scorer]) -> None:
    few = influences(scorer(reference_rows=4))
    assert few == influences(scorer(reference_rows=4))
    assert few != influences(scorer())
    assert influences(scorer(reference_rows=99)) == influences(scorer())


def test_corrected_comes_nearer_to_exact_than_its_rows_alone(scorer: Callable[..., Scorer]) -> None:
    exact = influences(scorer(learning_rate=1e-5))
    corrected = influences(scorer(learning_rate=1e-5, estimator="corrected", correction_rows=4))
    rows_alone = influences(scorer(learning_rate=1e-5, reference_rows=4))
    assert math.dist(corrected, exact) < 0.1 * math.dist(rows_alone, exact)


def test_poison_is_quarantined_with_its_reason_and_leaves_no_trace(scorer: Callable[..., Scorer]) -> None:
    made = scorer(verify_every=1)
    good = made.score(EXAMPLES[0]).influence
    long = " ".join(["w7"] * 100)  # max_length is 64
    for change, reason in (
        ({"response": " \n"}, "empty response"),
        ({"instruction": long}, "no response token within student.max_length"),
    ):
        poisoned = made.score({**EXAMPLES[1], **change})
        assert (poisoned.quarantine, poisoned.influence) == (reason, None)
        assert made.score(EXAMPLES[0]).influence == good


def test_a_group_that_ends_between_two_checks_is_checked_as_well(scorer: Callable[..., Scorer]) -> None:
    made = scorer()
    made.score(EXAMPLES[0])
    made.verify()
    made._student.restore = lambda: None  # type: ignore[method-assign]
    made.score(EXAMPLES[0])
    with pytest.raises(NotRestoredError, match=r"not restored exactly: .* after 2 points"):
        made.verify()


def test_rows_tokenized_ahead_are_scored_as_one_at_a_time(scorer: Callable[..., Scorer]) -> None:
    made = scorer()
    given = [EXAMPLES[0], {**EXAMPLES[1], "response": " "}, {**EXAMPLES[2], "recheck": True}, EXAMPLES[3]]
    scores = list(made.score_each(given))
    assert [score.example_id for score in scores] == [example["example_id"] for example in given]
    assert [score.influence for score in scores] == [made.score(example).influence for example in given]
    assert scores[1].quarantine == "empty response"
    assert list(made.score_each([])) == []
    next(made.score_each(given))  # a caller may leave off
    assert made.score(EXAMPLES[3]).influence == scores[3].influence


def test_white_space_is_taken_off_and_what_the_template_cannot_render_is_quarantined(
    scorer: Callable[..., Scorer],
) -> None:
    made = scorer(chat_template=TEMPLATE.replace("<{{", "{{ '<end>' if m.content[0] == ' ' or m.content == 'w9' }}<{{"))
    good = made.score(EXAMPLES[0])
    padded = {"instruction": f"  {EXAMPLES[0]['instruction']}\n", "response": f"  {EXAMPLES[0]['response']}\n"}
    assert made.score({**EXAMPLES[0], **padded}).influence == good.influence is not None
    bad = made.score({**EXAMPLES[0], "response": "w9"})
    assert bad.quarantine is not None
    assert bad.quarantine.startswith("the chat template renders a conversation that does not begin with the same")
    assert made.score(EXAMPLES[0]).influence == good.influence


def test_a_response_too_long_is_scored_as_far_as_it_fits(scorer: Callable[..., Scorer]) -> None:
    made = scorer()
    start = {
        "example_id": "long",
        "instruction": "w1 w2",
        "response": " ".join(f"w{index % 60}" for index in range(80)),
    }
    longer = {**start, "response": start["response"] + " w5 w6"}
    assert made.score(start).quarantine is None
    assert made.score(start).influence == made.score(longer).influence


def test_bfloat16_noise_is_measured_and_makes_no_pair(scorer: Callable[..., Scorer]) -> None:
    examples, rate = rows(24, 0), 3e-4  # steps so small that rounding is not much smaller
    made = scorer(precision="bfloat16", learning_rate=rate)
    exact = scorer(learning_rate=rate)
    scored: list[dict[str, Any]] = [
        {**made.score({**example, "recheck": True}).row(), "prompt_id": example["prompt_id"]} for example in examples
    ]
    differences = [
        row["influence"] - exact.score(example).influence for row, example in zip(scored, examples, strict=True)
    ]  # type: ignore[operator]
    noise = summarise(scored)["recheck"]["noise"]
    assert noise == pytest.approx(math.sqrt(sum(d * d for d in differences) / len(differences)), rel=1e-4)
    texts = [{**row, "prompt": "", "raw_output": row["example_id"]} for row in scored]

    def pairs(noise: float) -> set[tuple[float, float]]:
        found = build_pairs(texts, rule="all", margin_se=0, max_pairs=None, noise=noise).pairs
        return {(pair["chosen_influence"], pair["rejected_influence"]) for pair in found}

    loud = {pair for pair in pairs(0.0) if min(map(abs, pair)) > noise}
    assert pairs(noise) == loud
    assert 0 < len(loud) < len(pairs(0.0))


def test_first_order_passes_over_the_reference_set_once(scorer: Callable[..., Scorer]) -> None:
    made = scorer(estimator="first_order", verify_every=1)
    passes = []
    student: Any = made._student
    for module in student._masters.modules.values():
        module.model.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    for example in EXAMPLES:
        made.score(example)
    assert len(passes) == len(EXAMPLES)  # the example's own; none over the reference set, whose gradient is kept


def test_where_the_snapshot_lies_is_told(scorer: Callable[..., Scorer]) -> None:
    assert scorer().baselines["snapshot"] == "not needed"
    assert scorer(backend="zero").baselines["snapshot"] == "cpu"
    assert leaves_room(40, 80)
    assert not leaves_room(41, 80)


class Replayed:
    """Stands for `Graphs` where there is no GPU: work is done as it was when its key was new."""

    def __init__(self) -> None:
        self.works: dict[Any, Callable[[], torch.Tensor]] = {}

    def run(self, key: Any, work: Callable[[], torch.Tensor], undo: Callable[[], object]) -> torch.Tensor:
        if key not in self.works:
            self.works[key] = work
            work()
            undo()
        return self.works[key]()


@pytest.mark.parametrize("settings", [{}, {"precision": "bfloat16"}, {"estimator": "corrected", "correction_rows": 3}])
def test_recorded_passes_serve_all_examples_of_a_length(
    scorer: Callable[..., Scorer], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = influences(scorer(**settings))
    monkeypatch.setattr(local_student, "can_record", lambda device: True)
    monkeypatch.setattr(local_student, "Graphs", Replayed)
    monkeypatch.setattr(local_student, "BUCKET", 4)
    made = scorer(**settings, verify_every=1)
    assert influences(made) == pytest.approx(expected, abs=1e-2 if "precision" in settings else 1e-6)
    assert influences(made) == influences(made)
    (graphs,) = made._student._graphs.values()  # type: ignore[attr-defined]
    lengths = {key for key in graphs.works if isinstance(key, int)}
    assert 1 < len(lengths) < len(EXAMPLES)
    rechecked = made.score({**EXAMPLES[0], "recheck": True})
    assert (graphs,) == tuple(made._student._graphs.values())  # type: ignore[attr-defined]
    assert rechecked.recheck_influence == pytest.approx(influences(scorer())[0], abs=1e-6)


def test_recorded_passes_are_no_longer_than_a_model_has_positions(
    scorer: Callable[..., Scorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_student, "can_record", lambda device: True)
    monkeypatch.setattr(local_student, "Graphs", Replayed)
    made = scorer()
    made._student._longest = 45  # type: ignore[attr-defined]
    made.score(EXAMPLES[0])
    assert list(made._student._fixed_inputs) == [45]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_compiled_student_gives_the_same_scores(
    scorer: Callable[..., Scorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "CHUNK_LOGITS", 600)  # several chunks a batch
    assert influences(scorer(compile=True)) == pytest.approx(influences(scorer()), abs=1e-6)


def test_moments_may_lie_elsewhere_or_be_fresh(scorer: Callable[..., Scorer], tiny: Path, tmp_path: Path) -> None:
    bare, state = tmp_path / "bare", tmp_path / "state"
    for folder in (bare, state):
        folder.mkdir()
    for file in tiny.iterdir():
        (state if file.name.startswith("optimizer") else bare).joinpath(file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=r"bare has no optimizer\.json.*data\.warm_up.*score\.optimizer_state=DIR"):
        scorer(bare)
    assert influences(scorer(bare, optimizer_state=str(state))) == influences(scorer())
    fresh = influences(scorer(bare, learning_rate=1e-3))
    assert fresh == influences(scorer(optimizer_state="none", learning_rate=1e-3))
    assert fresh != influences(scorer(learning_rate=1e-3))


@pytest.mark.parametrize("lost", ["optimizer.json", "optimizer.safetensors"])
def test_half_an_optimizer_state_or_none_where_one_is_named_is_refused(
    scorer: Callable[..., Scorer], tiny: Path, tmp_path: Path, lost: str
) -> None:
    """Else a mistyped folder scores with fresh moments, and nothing says so."""
    with pytest.raises(ModelError, match=r"nowhere has no optimizer\.json and no optimizer\.safetensors, so it is no"):
        scorer(optimizer_state=str(tmp_path / "nowhere"), learning_rate=1e-3)
    half = tmp_path / "half"
    shutil.copytree(tiny, half)
    (half / lost).unlink()
    with pytest.raises(ModelError, match=rf"half has no {lost}, so it is no optimizer state"):
        scorer(half, learning_rate=1e-3)


@pytest.mark.parametrize("backend", ["local", "zero"])
@pytest.mark.parametrize("change", ["longer", "turned", "one", "others"])
def test_moments_of_another_model_are_refused(
    scorer: Callable[..., Scorer], tiny: Path, tmp_path: Path, backend: str, change: str
) -> None:
    state = tmp_path / "state"
    shutil.copytree(tiny, state)
    moments = load_file(tiny / "optimizer.safetensors")
    key = "exp_avg.model.layers.0.mlp.up_proj.weight"
    changed = {
        "longer": {key: torch.cat([moments[key]] * 2)}, "turned": {key: moments[key].T.contiguous()},
        "one": {key: moments[key][:1, :1]}, "others": {key.replace("layers.0", "layers.2"): moments[key].clone()},
    }[change]  # fmt: skip
    save_file(moments | changed, state / "optimizer.safetensors")
    with pytest.raises(ModelError, match="it belongs to another model"):
        scorer(backend=backend, optimizer_state=str(state))


@pytest.mark.parametrize("name", ["optimizer.json", "optimizer.safetensors"])
def test_a_damaged_optimizer_state_is_said(
    scorer: Callable[..., Scorer], tiny: Path, tmp_path: Path, name: str
) -> None:
    state = tmp_path / "state"
    shutil.copytree(tiny, state)
    content = (state / name).read_bytes()
    for damaged in (content[: len(content) // 2], b"{}"):
        (state / name).write_bytes(damaged)
        with pytest.raises(ModelError, match=rf"{name} is damaged"):
            scorer(optimizer_state=str(state))


def test_a_text_that_is_no_unicode_is_quarantined(scorer: Callable[..., Scorer]) -> None:
    first, second = scorer().score_each([{**EXAMPLES[0], "response": "w2 \ud800"}, EXAMPLES[1]])
    assert str(first.quarantine).startswith("the text is no valid Unicode (surrogates not allowed at character ")
    assert second.quarantine is None


@pytest.mark.parametrize("backend", ["local", "zero"])
def test_scoring_leaves_the_process_its_random_numbers_and_its_precision(
    scorer: Callable[..., Scorer], backend: str
) -> None:
    torch.manual_seed(5)
    undisturbed = torch.rand(3).tolist()
    torch.manual_seed(5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        made = scorer(backend=backend, verify_every=1)
        drawn = []
        for example in EXAMPLES[:3]:
            drawn.append(torch.rand(1).item())
            assert made.score({**example, "recheck": True}).quarantine is None
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert drawn == undisturbed


def test_a_recheck_that_fails_leaves_the_precision_as_it_was(
    scorer: Callable[..., Scorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scorer(precision="bfloat16")
    expected = made.score({**EXAMPLES[0], "recheck": True})
    with monkeypatch.context() as patch:
        patch.setattr(Exact, "_measure", Mock(side_effect=[Measured(0.0, 0.0), KeyboardInterrupt]))
        with pytest.raises(KeyboardInterrupt):
            made.score({**EXAMPLES[1], "recheck": True})
    assert made.score(EXAMPLES[0]).influence == expected.influence
