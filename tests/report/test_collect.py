"""What a report says of a run, against sums of its own over the same rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from montessori_ray.comparison import stages_of_comparison
from montessori_ray.config import Config, load_config
from montessori_ray.loop import stages_of
from montessori_ray.report import results, scores
from montessori_ray.report.collect import Report, collect
from montessori_ray.report.costs import OUTSIDE, REMOVED, WORK
from montessori_ray.report.source import Source, arm_of, place
from montessori_ray.telemetry.events import EventLog
from tests.report.synthetic import QUICKSTART, RunWriter, comparison_writer, loop_writer, scores_writer


def report_of(writer: RunWriter, until: str | None = None) -> Report:
    writer.write(until)
    return report_of_written(writer)


def report_of_written(writer: RunWriter) -> Report:
    return collect(Source(writer.run, writer.config, tuple(writer.stages)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunWriter, Report]:
    writer = loop_writer(tmp_path_factory.mktemp("finished"))
    return writer, report_of(writer)


def test_means_and_intervals_are_students() -> None:
    values = np.random.default_rng(3).normal(1, 2, 12)
    found = results.mean_of(values.tolist())
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_a_mean_of_one_value_settles_nothing() -> None:
    found = results.mean_of([3.0])
    assert (found.mean, found.low, found.high, found.count) == (3, 3, 3, 1)
    assert np.isnan(found.se)
    assert not found.settled


def test_changes_of_losses_are_paired_by_row(finished: tuple[RunWriter, Report]) -> None:
    writer, report = finished
    rows = list(writer.run.artifact("final/evaluation").rows())
    for entry in report.losses:
        loss = {
            row["example_id"]: row["loss"] for row in rows if (row["student"], row["set"]) == (entry.student, entry.set)
        }
        before = {
            row["example_id"]: row["loss"] for row in rows if (row["student"], row["set"]) == ("original", entry.set)
        }
        assert entry.loss.mean == pytest.approx(np.mean(list(loss.values())))
        if entry.student == "original":
            assert entry.change is None
            continue
        assert entry.change is not None
        test = stats.ttest_rel([loss[id] for id in loss], [before[id] for id in loss])
        low, high = test.confidence_interval(0.95)
        assert (entry.change.low, entry.change.high) == pytest.approx((low, high))
    assert {(entry.student, entry.set) for entry in report.losses} == {
        (student, name) for student in ("original", "warmed", "trained") for name in ("reference", "held_out")
    }


def test_categories_are_those_of_the_held_out_rows(finished: tuple[RunWriter, Report]) -> None:
    writer, report = finished
    rows = [row for row in writer.run.artifact("final/evaluation").rows() if row["set"] == "held_out"]
    assert {entry.category for entry in report.categories} == {row["category"] for row in rows}
    whole = next(entry for entry in report.losses if (entry.student, entry.set) == ("trained", "held_out"))
    assert whole.change is not None
    weights = [entry.change.count for entry in report.categories]
    assert np.average([entry.change.mean for entry in report.categories], weights=weights) == pytest.approx(
        whole.change.mean
    )


def test_fresh_influence_is_told_apart_by_teacher(finished: tuple[RunWriter, Report]) -> None:
    writer, report = finished
    rows = list(writer.run.artifact("final/fresh_influence").rows())
    for entry, teacher in zip(report.fresh, ("iteration_00", "iteration_01", "final"), strict=True):
        values = [
            row["influence"] for row in rows if row["example_id"].startswith(teacher) and row["influence"] is not None
        ]
        assert entry.influence.mean == pytest.approx(np.mean(values))
        assert entry.values == pytest.approx(sorted(values))
        assert entry.share_helpful == np.mean(np.array(values) < 0)
    assert [entry.teacher for entry in report.fresh] == ["original", "tuned 1x", "tuned 2x"]


@pytest.mark.parametrize(
    ("tuned_helps", "said"), [(2.0, "helps more"), (-2.0, "helps less"), (0.0, "no difference beyond noise")]
)
def test_the_result_in_a_sentence(tmp_path: Path, tuned_helps: float, said: str) -> None:
    first, second = report_of(loop_writer(tmp_path, tuned_helps=tuned_helps)).sentences
    assert first.headline.startswith("The student's held-out loss fell by ")
    assert "paired over 24 held-out rows" in first.detail
    assert said in second.headline


def test_histograms_count_every_score(finished: tuple[RunWriter, Report]) -> None:
    writer, report = finished
    for entry in report.influences:
        stage = next(stage for stage in writer.stages if stage.name == entry.name)
        values = [row["influence"] for row in writer.run.artifact(stage.output).rows() if row["influence"] is not None]
        assert sum(entry.counts) == len(values) == entry.mean.count
        below = sum(count for end, count in zip(entry.edges[1:], entry.counts, strict=True) if end <= 1e-12)
        assert below == sum(value < 0 for value in values)
        assert entry.quarantined == {"empty response": 1}
        assert entry.noise == pytest.approx(1e-4, rel=0.5)
        assert len(entry.rechecked) == entry.recheck["points"]  # type: ignore[index]


@pytest.mark.parametrize("seed", range(5))
def test_bins_agree_with_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(rng.normal(), 1, 300) * 10.0 ** rng.integers(-6, 3)
    edges, counts = scores.histogram(values.tolist())
    assert 8 <= len(counts) <= 45
    inner = np.histogram(values, edges)[0]
    assert counts[1:-1] == inner[1:-1].tolist()
    assert sum(counts) == 300
    assert min(abs(edge) for edge in edges) < 1e-9 * abs(edges[0]) or edges[0] > 0 or edges[-1] < 0


def test_few_far_scores_do_not_press_the_others_into_one_bin() -> None:
    values = [*np.random.default_rng(0).normal(size=1000).tolist(), 1e6]
    edges, counts = scores.histogram(values)
    assert edges[-1] < 10
    assert sum(counts) == 1001
    assert max(counts) < 300


@pytest.mark.parametrize("values", [[0.0], [1e-3], [-2.0, -2.0, -2.0], [0.0, 0.0, 1.0]])
def test_bins_of_values_without_spread(values: list[float]) -> None:
    edges, counts = scores.histogram(values)
    assert sum(counts) == len(values)
    assert len(edges) == len(counts) + 1
    assert edges == sorted(set(edges))


def test_pairs_and_examples(finished: tuple[RunWriter, Report]) -> None:
    writer, report = finished
    for number, entry in enumerate(report.examples):
        rows = {row["example_id"]: row for row in writer.run.artifact(f"iteration_{number:02d}/influence").rows()}
        texts = {row["example_id"]: row for row in writer.run.artifact(f"iteration_{number:02d}/probing_set").rows()}
        ordered = sorted(
            (row for row in rows.values() if row["influence"] is not None), key=lambda row: row["influence"]
        )
        assert entry.helpful[0].example_id == ordered[0]["example_id"]
        assert entry.harmful[0].example_id == ordered[-1]["example_id"]
        assert entry.helpful[0].instruction == texts[ordered[0]["example_id"]]["instruction"]
        assert len(entry.helpful) + len(entry.harmful) == len(ordered)
        pairs = list(writer.run.artifact(f"iteration_{number:02d}/pairs").rows())
        widest = max(pairs, key=lambda pair: pair["rejected_influence"] - pair["chosen_influence"])
        assert entry.pairs[0].chosen == texts[widest["chosen_id"]]["instruction"]
        assert report.pairs[number].pairs == len(pairs)
    assert report.pairs[0].without == {"all_helpful": 2, "single_example": 1}


def test_curves_come_from_the_events(finished: tuple[RunWriter, Report]) -> None:
    _, report = finished
    assert [entry.name for entry in report.tunings] == ["iteration_00/tune_teacher", "iteration_01/tune_teacher"]
    for entry in report.tunings:
        assert entry.curves.keys() == {"loss", "reward_margin", "reward_accuracy"}
        assert entry.curves["loss"] == [(step, pytest.approx(0.69 - 0.01 * step)) for step in range(1, 9)]
    assert [entry.name for entry in report.trainings] == [
        "iteration_00/warm_up", "iteration_01/warm_up", "final/train_student",
    ]  # fmt: skip


def test_a_step_that_was_done_twice_counts_as_it_was_done_last(tmp_path: Path) -> None:
    writer = loop_writer(tmp_path, "iterations=1")
    writer.write("iteration_00/pair")
    events = EventLog(writer.run.storage)
    events.write(
        "metrics", stage="iteration_00/tune_teacher", points=[{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}]
    )
    events.write("metrics", stage="iteration_00/tune_teacher", points=[{"step": 2, "loss": 0.5}])
    (tuning,) = collect(Source(writer.run, writer.config, tuple(writer.stages))).tunings
    assert tuning.curves == {"loss": [(1.0, 0.7), (2.0, 0.5)]}, "a training that is not finished is shown too"


def test_a_batch_without_a_loss_is_no_point_of_a_curve(tmp_path: Path) -> None:
    """`sft_loop` reports NaN for a batch whose responses have no token."""
    writer = loop_writer(tmp_path, "iterations=1")
    writer.write("iteration_00/pair")
    losses = [float("nan"), 0.6, float("inf"), 0.5]
    points = [{"step": step, "loss": loss, "reward_margin": float("nan")} for step, loss in enumerate(losses, 1)]
    EventLog(writer.run.storage).write("metrics", stage="iteration_00/tune_teacher", points=points)
    (tuning,) = collect(Source(writer.run, writer.config, tuple(writer.stages))).tunings
    assert tuning.curves == {"loss": [(2.0, 0.6), (4.0, 0.5)], "reward_margin": []}


def test_filters(finished: tuple[RunWriter, Report]) -> None:
    _, report = finished
    assert len(report.syntheses) == 6
    for entry in report.syntheses:
        assert (entry.samples, entry.kept, entry.rejected) == (128, 96, {"duplicate": 16, "unparsed": 16})
        assert (entry.responses, entry.truncated, entry.tokens) == (96, 1, 1920)
        assert entry.fresh == ("fresh" in entry.name)


def test_time_and_cost(finished: tuple[RunWriter, Report]) -> None:
    writer, report = finished
    cost = report.cost
    manifests = {stage.name: writer.run.artifact(stage.output).require() for stage in writer.stages}
    assert cost.stage_seconds == pytest.approx(sum(manifest.seconds for manifest in manifests.values()))
    assert sum(seconds for work, seconds in cost.by_work.items() if work != OUTSIDE) == pytest.approx(
        cost.stage_seconds
    )
    # The quickstart gives a replica and trainings 2 CPUs, 2 scoring groups and the evaluation one each.
    cpus = {"score": 2, "score_fresh": 2, "warm_up": 2, "train_student": 2, "tune_teacher": 2, "evaluate": 1}
    cpus |= dict.fromkeys(("instructions", "responses", "fresh_instructions", "fresh_responses"), 2)
    expected = sum(manifests[stage.name].seconds * cpus.get(stage.kind, 0) for stage in writer.stages) / 3600
    assert cost.cpu_hours == pytest.approx(expected)
    assert cost.gpu_hours == 0
    assert cost.sessions == 1
    assert cost.peak_memory_gb == 4.0


def test_work_whose_output_was_removed_is_told_apart(tmp_path: Path) -> None:
    writer = loop_writer(tmp_path)
    before = report_of(writer)
    assert REMOVED not in before.cost.by_work
    EventLog(writer.run.storage).write("stage_finished", stage="iteration_00/score", rows=9, seconds=250.0, details={})
    assert report_of_written(writer).cost.by_work[REMOVED] == pytest.approx(250, abs=0.1)


def test_every_kind_of_stage_is_the_work_it_does() -> None:
    """A kind that is missing in `WORK` would count as work on data."""
    judge = {"model": "pool"}
    plain = load_config(QUICKSTART).model_dump()
    judged = plain | {"evaluate": {"fresh": 16, "judge": judge}}
    arms = {
        "self_instruct": {"tune_teacher.tunes": "nothing", "training_select": "most_helpful"},
        "montessori": {"pair.signal": "llm_judge", "pair.judge": judge},
        "responses": {"tune_teacher.tunes": "response"},
    }
    compared = Config.model_validate(plain | {"compare": {"arms": arms, "against": "self_instruct"}})
    kinds = {stage.kind for stage in [*stages_of(Config.model_validate(judged)), *stages_of_comparison(compared)]}
    assert kinds - WORK.keys() == {
        "seeds", "reference", "held_out", "teacher", "student", "warmup_set", "probing_set", "fresh_set", "pair",
        "training_set", "result",
    }  # fmt: skip
    assert WORK.keys() - kinds == set()
    assert {kind for kind, work in WORK.items() if "judg" in work} == {
        "grade", "answer_original", "answer_trained", "win_rate",
    }  # fmt: skip


def test_an_unfinished_run_is_reported_as_far_as_it_got(tmp_path: Path) -> None:
    report = report_of(loop_writer(tmp_path), "iteration_00/score")
    assert report.stages_todo[0] == "iteration_00/score"
    assert (report.sentences, report.losses, report.fresh, report.influences, report.pairs) == ([], [], [], [], [])
    assert report.trainings
    assert report.syntheses


def test_a_run_that_only_scores(tmp_path: Path) -> None:
    report = report_of(scores_writer(tmp_path))
    (sentence,) = report.sentences
    (entry,) = report.influences
    assert report.scores_files
    assert sentence.headline == f"{100 * entry.share_helpful:.0f} % of 59 examples help the student."
    assert report.examples[0].helpful
    assert report.what == ("60 examples for the student student: 59 scored, 1 without a score (empty response: 1).")


def test_an_empty_run(tmp_path: Path) -> None:
    report = report_of(loop_writer(tmp_path), "inputs/seeds")
    assert report.stages_done == 0
    assert report.cost.stages == []


@pytest.mark.parametrize(
    ("stage", "said", "arm"),
    [
        ("iteration_01/score", "iteration 1", None),
        ("final/training_set", "final", None),
        ("score", "", None),
        (
            "arms/shuffled_labels/tuning_1/iteration_00/tune_teacher",
            "shuffled labels, tuning 1, iteration 0",
            "shuffled labels",
        ),
        ("loop_1/iteration_00/score", "loop 1, iteration 0", None),
        ("loop_1/arms/montessori/tuning_1/final/responses", "loop 1, montessori, tuning 1, final", "montessori"),
    ],
)
def test_places(stage: str, said: str, arm: str | None) -> None:
    assert (place(stage), arm_of(stage)) == (said, arm)


def test_a_comparison_is_more_of_the_same(tmp_path: Path) -> None:
    writer = comparison_writer(tmp_path)
    report = report_of(writer, "compare/result")
    assert len(report.tunings) == 3 * 2
    assert {entry.place for entry in report.pairs} == {
        "iteration 0", "shuffled labels, tuning 0, iteration 0", "shuffled labels, tuning 1, iteration 0",
        "responses, iteration 0",
    }  # fmt: skip
    assert report.fresh == [], "arms are told of by the comparison, not as teachers tuned once, twice, ..."
    (answers,) = [entry for entry in report.examples if entry.place.startswith("responses")]
    assert answers.pairs[0].chosen != answers.pairs[0].rejected, "two answers to one instruction"
    assert answers.pairs[0].chosen.startswith("Answer ")
    seconds = [writer.run.artifact(stage.output).require().seconds for stage in writer.stages[:-1]]
    assert report.cost.stage_seconds == pytest.approx(sum(seconds))
