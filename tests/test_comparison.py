"""The plan of a comparison: what arms share, what they do not, and what no arm may change."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from montessori_ray.comparison import all_stages, cells_of, run_comparison, stages_of_comparison
from montessori_ray.config import Config, load_config
from montessori_ray.errors import ConfigError
from montessori_ray.loop import run_loop, stages_of
from montessori_ray.session import Session
from montessori_ray.stages.base import Stage

QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"
ARMS: dict[str, Any] = {
    "self_instruct": {"tune_teacher.tunes": "nothing"},
    "montessori": {},
    "shuffled": {"pair.signal": "shuffled_labels"},
}


def comparison(arms: dict[str, Any] | None = None, **settings: Any) -> Config:
    section = {"against": "self_instruct", "arms": ARMS if arms is None else arms} | settings
    return Config.model_validate(load_config(QUICKSTART).model_dump() | {"compare": section})


def kinds(stages: list[Stage]) -> Counter[str]:
    return Counter(stage.kind for stage in stages)


def test_inputs_are_made_before_and_nothing_is_made_twice() -> None:
    stages = stages_of_comparison(comparison(tuning_seeds=(0, 1), student_seeds=(0, 1, 2)))
    made: set[str] = set()
    for stage in stages:
        assert set(stage.inputs) <= made, stage.name
        assert stage.teacher is None or stage.teacher in stage.inputs
        made.add(stage.output)
    assert len(made) == len(stages) == len({stage.name for stage in stages})
    read = {name for stage in stages for name in stage.inputs}
    assert made - read == {"compare/result"}


def test_arms_share_everything_but_their_choice() -> None:
    stages = kinds(stages_of_comparison(comparison(tuning_seeds=(0, 1), student_seeds=(0, 1, 2))))
    assert stages["warm_up"] == stages["score"] == 1
    assert stages["pair"] == 1 + 2, "labels are shuffled anew for every tuning seed"
    assert stages["tune_teacher"] == 2 * 2
    assert stages["train_student"] == 3 + 2 * 2 * 3
    assert stages["fresh_instructions"] == 1 + 2 * 2


def test_every_cell_has_the_stages_of_its_own_loop() -> None:
    config = comparison(tuning_seeds=(3,), student_seeds=(5,))
    assert [(cell.arm, cell.config.tune_teacher.seed, cell.config.train_student.seed) for cell in cells_of(config)] == [
        ("self_instruct", 3, 5), ("montessori", 3, 5), ("shuffled", 3, 5),
    ]  # fmt: skip
    by_output = {stage.output: stage for stage in stages_of_comparison(config)}
    student = by_output["arms/shuffled/tuning_3/student_5/final/student"]
    assert student.config == cells_of(config)[2].config
    pairs = by_output[by_output["arms/shuffled/tuning_3/iteration_00/teacher"].inputs[1]]
    assert pairs.config is not None
    assert (pairs.config.pair.signal, pairs.config.pair.seed) == ("shuffled_labels", 3)
    assert pairs.output == "arms/shuffled/tuning_3/iteration_00/pairs"
    helpful = by_output[by_output["arms/montessori/tuning_3/iteration_00/teacher"].inputs[1]]
    assert (helpful.output, helpful.config and helpful.config.pair.seed) == ("iteration_00/pairs", None)


def test_another_reference_policy_is_other_work_from_the_second_iteration_on() -> None:
    twice = {"iterations": 2}
    arms = ARMS | {"twice": twice, "anchored": twice | {"tune_teacher.reference": "original"}}
    del arms["shuffled"]
    stages = stages_of_comparison(comparison(arms))
    assert kinds(stages)["warm_up"] == kinds(stages)["score"] == 2
    tuned = [stage.name for stage in stages if stage.kind == "tune_teacher"]
    assert sorted(tuned) == [
        "arms/anchored/tuning_0/iteration_01/tune_teacher",
        "arms/montessori/tuning_0/iteration_00/tune_teacher",
        "arms/twice/tuning_0/iteration_01/tune_teacher",
    ]


def test_another_seed_changes_no_name() -> None:
    before = {stage.output for stage in stages_of_comparison(comparison(student_seeds=(0,)))}
    after = {stage.output for stage in stages_of_comparison(comparison(student_seeds=(0, 1)))}
    assert before < after
    assert kinds(stages_of_comparison(comparison(student_seeds=(0, 1))))["tune_teacher"] == 2


def test_paired_seeds_train_one_student_a_teacher_and_compare_student_with_student() -> None:
    config = comparison(tuning_seeds=(0, 1, 2), student_seeds=(5, 6, 7), seeds="paired")
    seeds = [(cell.tuning_seed, cell.student_seed) for cell in cells_of(config) if cell.arm == "montessori"]
    assert seeds == [(0, 5), (1, 6), (2, 7)]
    stages = kinds(stages_of_comparison(config))
    assert (stages["tune_teacher"], stages["train_student"]) == (2 * 3, 3 + 2 * 3)


def test_independent_seeds_repeat_the_loop_with_everything_drawn_anew_but_the_user_s_input() -> None:
    config = comparison(tuning_seeds=(3, 5), student_seeds=(0, 1), seeds="independent")
    seeds = [(cell.config.seed, cell.config.train_student.seed) for cell in cells_of(config) if cell.arm == "shuffled"]
    assert seeds == [(3, 0), (5, 1)]
    stages = stages_of_comparison(config)
    by_output = {stage.output: stage for stage in stages}
    assert {kind for kind, count in kinds(stages).items() if count == 1} == {
        "seeds", "reference", "held_out", "teacher", "student", "measure_students", "result",
    }  # fmt: skip
    assert kinds(stages)["score"] == kinds(stages)["warm_up"] == 2, "arms of a loop share them"
    student = by_output["loop_5/arms/montessori/tuning_5/student_1/final/student"]
    for stage in _made_for(student, by_output):
        assert stage.name.startswith("inputs/") or stage.name.startswith("loop_5/")
        assert stage.config is not None
        assert stage.config.seed == 5 or "seed" not in stage.settings
    first = by_output["iteration_00/influence"].config
    assert first is not None
    assert first.seed == 3, "the first loop lies where a single one does"
    scored = by_output["loop_5/compare/fresh_influence"].inputs
    assert scored == ("loop_5/iteration_00/warmed_student", "inputs/reference", "loop_5/compare/fresh_set")
    fresh_sets = by_output["loop_5/compare/fresh_set"].inputs
    assert len(fresh_sets) == 3
    assert all(name.startswith("loop_5/") for name in fresh_sets)
    told = stages[-1].body.keywords
    assert [found.influence for found in told["probed"]] == ["iteration_00/influence", "loop_5/iteration_00/influence"]
    assert told["independent"]


def _made_for(stage: Stage, by_output: dict[str, Stage]) -> list[Stage]:
    """A stage and all that it is made from."""
    return [stage, *(earlier for name in stage.inputs for earlier in _made_for(by_output[name], by_output))]


def test_another_independent_loop_changes_no_name() -> None:
    two, three = (
        {
            stage.output
            for stage in stages_of_comparison(comparison(tuning_seeds=s, student_seeds=s, seeds="independent"))
        }
        for s in ((0, 1), (0, 1, 2))
    )
    assert two < three


def test_one_loop_is_no_comparison_of_independent_ones() -> None:
    with pytest.raises(ValueError, match="one loop says nothing of another one: give two seeds or more"):
        comparison(seeds="independent")


def test_paired_seeds_are_as_many_of_both_kinds() -> None:
    with pytest.raises(ValueError, match="seeds are paired, but there are 2 tuning_seeds and 1 student_seeds: give as"):
        comparison(tuning_seeds=(0, 1), seeds="paired")


def test_probing_examples_count_as_fresh_only_where_they_are_scored_alike() -> None:
    def probed(arms: dict[str, Any]) -> Any:
        result = stages_of_comparison(comparison(arms))[-1]
        found = result.body.keywords["probed"]
        assert [one.influence for one in found] == [name for name in result.inputs if name == "iteration_00/influence"]
        return found[0] if found else None

    assert probed(ARMS).fresh_set == "iteration_00/fresh_set"
    original = {"self_instruct": ARMS["self_instruct"]}
    assert probed(original) is None, "nothing is scored but what is written afresh"
    assert probed(original | {"approximate": {"score.estimator": "first_order"}}) is None
    assert probed(original | {"responses": {"tune_teacher.tunes": "response"}}) is None, "several answers to each"
    assert probed({"self_instruct": {}}) is None, "no teacher but tuned ones is measured"
    for other in ({"warm_up.epochs": 2}, {"synthesize.instructions.temperature": 0.5}, {"synthesize.shots": 5}):
        arms = {"self_instruct": {**ARMS["self_instruct"], **other}, "montessori": {}}
        assert probed(arms) is None, f"another student, or other prompts: {other}"


def test_what_is_compared_with_what_and_arms_added_at_the_end_move_nothing() -> None:
    arms = ARMS | {"answers": {"responses_by": "original"}}
    before = {stage.output: stage for stage in stages_of_comparison(comparison(arms))}
    for more in ({"against": "answers"}, {"arms": arms | {"soft": {"tune_teacher.beta": 0.5}}}):
        settings = {"arms": arms, "against": "self_instruct"} | more
        after = {stage.output: stage for stage in stages_of_comparison(comparison(**settings))}
        assert before.keys() <= after.keys()
        for output, stage in before.items():
            if not output.startswith("compare/"):
                assert (after[output].inputs, after[output].config) == (stage.inputs, stage.config)
    assert after["compare/result"].body.keywords["cells"][0].arm == "self_instruct"


def test_an_iteration_more_begins_with_the_teacher_of_the_one_before() -> None:
    arms = {**ARMS, "second": {"iterations": 2}}
    by_output = {stage.output: stage for stage in stages_of_comparison(comparison(arms))}
    assert by_output["arms/second/tuning_0/iteration_01/instructions"].teacher == (
        "arms/montessori/tuning_0/iteration_00/teacher"
    )


def test_original_answers_are_given_by_the_original_teacher_after_one_change_of_teacher() -> None:
    arms = {"self_instruct": ARMS["self_instruct"], "instructions": {"responses_by": "original"}, "both": {}}
    stages = stages_of_comparison(comparison(arms, tuning_seeds=(0, 1, 2)))
    by_output = {stage.output: stage for stage in stages}
    assert by_output["arms/instructions/tuning_0/final/responses"].teacher == "inputs/teacher"
    assert (
        by_output["arms/both/tuning_0/final/responses"].inputs[0]
        == (by_output["arms/instructions/tuning_0/final/responses"].inputs[0])
    ), "both answer the same instructions"
    hosted = [stage.teacher for stage in stages if stage.teacher]
    changes = sum(one != other for one, other in pairwise(hosted))
    assert changes == 3 + 1


def test_responses_are_tuned_on_several_answers_to_one_instruction_of_the_original_teacher() -> None:
    arms = {"self_instruct": ARMS["self_instruct"], "response": {"tune_teacher.tunes": "response"}}
    by_output = {stage.output: stage for stage in stages_of_comparison(comparison(arms))}
    pairs = by_output["iteration_00/pairs"]
    assert pairs.inputs == ("iteration_00/influence", "iteration_00/candidates")
    assert by_output["iteration_00/influence"].inputs[2] == "iteration_00/candidates"
    assert by_output["arms/response/tuning_0/final/responses"].inputs[0] == "final/instructions"


def test_best_of_n_scores_what_the_original_teacher_wrote() -> None:
    arms = {
        "self_instruct": ARMS["self_instruct"],
        "best": {"tune_teacher.tunes": "nothing", "training_select": "most_helpful"},
    }
    config = comparison(arms)
    by_output = {stage.output: stage for stage in stages_of_comparison(config)}
    chosen = by_output["arms/best/final/training_set"]
    assert chosen.inputs == ("arms/best/final/responses", "inputs/reference", "inputs/held_out", "final/influence")
    assert by_output["arms/best/final/instructions"].rows == config.training_set * config.synthesize.n
    assert by_output["arms/best/final/instructions"].teacher == "inputs/teacher"


def test_a_judge_grades_what_is_scored() -> None:
    judged = {"pair.signal": "llm_judge", "pair.judge": {"model": "pool"}}
    by_output = {stage.output: stage for stage in stages_of_comparison(comparison({**ARMS, "judged": judged}))}
    grades = by_output["iteration_00/grades"]
    assert grades.inputs == ("iteration_00/probing_set", "inputs/teacher")
    assert grades.teacher == "inputs/teacher"
    pairs = by_output[by_output["arms/judged/tuning_0/iteration_00/teacher"].inputs[1]]
    assert pairs.inputs == ("iteration_00/influence", "iteration_00/instructions", "iteration_00/grades")


def test_a_judge_without_its_key_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "connect", lambda _: pytest.fail("a cluster was started"))
    judge = {"model": "m", "base_url": "http://127.0.0.1:8000/v1", "api_key_env": "NO_SUCH_KEY"}
    judged = {"pair.signal": "llm_judge", "pair.judge": judge}
    config = comparison({**ARMS, "judged": judged}).model_copy(update={"run": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match="the environment variable NO_SUCH_KEY, named by api_key_env, is not set"):
        run_comparison(config)
    assert not (tmp_path / "run/inputs").exists()


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"montessori": {}}, "against is 'self_instruct', expected one of the arms: montessori"),
        ({"self_instruct": {"student.max_length": 3}}, "arm self_instruct changes student.max_length, which all arms"),
        ({"self_instruct": {}, "A b": {}}, "arm 'A b': a name is made of"),
    ],
)
def test_what_is_no_arm_is_refused(arms: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        comparison(arms)


def test_repeated_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"seeds \[1, 1\] are not all different"):
        comparison(tuning_seeds=(1, 1))


@pytest.mark.parametrize("fresh", [0, 4])
def test_a_comparison_needs_fresh_instructions_of_two_prompts(fresh: int) -> None:
    tree = comparison().model_dump()
    config = Config.model_validate(tree | {"evaluate": tree["evaluate"] | {"fresh": fresh}})
    with pytest.raises(ConfigError, match=rf"evaluate.fresh is {fresh}, .* set it above synthesize.n = 4"):
        stages_of_comparison(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pair.signl": "random"}, "compare.arms.x: unknown key pair.signl"),
        ({"pair.signal": "llm_judge"}, "signal is llm_judge and judge is not set"),
        (
            {"tune_teacher.tunes": "nothing", "iterations": 2},
            "compare.arms.x: tune_teacher.tunes is nothing, so 2 iterations",
        ),
        ({"tune_teacher.tunes": "response", "responses_by": "original"}, "responses_by=original would never ask"),
        ({"synthesize.n": 20}, "compare.arms.x: evaluate.fresh is 16, .* set it above synthesize.n = 20"),
    ],
)
def test_an_arm_whose_settings_do_not_fit_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stages_of_comparison(comparison({**ARMS, "x": settings}))


def test_an_arm_may_give_a_section_as_a_whole() -> None:
    arms = {**ARMS, "best": {"pair": {"rule": "best_worst", "signal": "random"}}}
    (cell,) = (cell for cell in cells_of(comparison(arms, tuning_seeds=(7,))) if cell.arm == "best")
    assert (cell.config.pair.rule, cell.config.pair.seed) == ("best_worst", 7)
    shared = load_config(QUICKSTART).pair.max_pairs
    assert cell.config.pair.max_pairs == shared is not None, "what the arm does not say is as in the others"
    with pytest.raises(ConfigError, match=r"compare\.arms\.best: pair "):
        cells_of(comparison({**ARMS, "best": {"pair": 3}}))


def test_a_comparison_is_not_run_as_one_loop_nor_a_loop_compared() -> None:
    with pytest.raises(ConfigError, match="run it with `montessori compare`"):
        run_loop(comparison())
    with pytest.raises(ConfigError, match="no `compare` section"):
        stages_of_comparison(load_config(QUICKSTART))
    assert [stage.name for stage in all_stages(load_config(QUICKSTART))] == [
        stage.name for stage in stages_of(load_config(QUICKSTART))
    ]
