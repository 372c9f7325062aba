"""Columns of the datasets of a run."""

import pyarrow as pa

INPUT_ROWS = pa.schema(
    [
        ("example_id", pa.string()),
        ("instruction", pa.string()),
        ("response", pa.string()),
        ("category", pa.string()),
    ]
)

INSTRUCTIONS = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("raw_output", pa.string()),
        ("instruction", pa.string()),
        ("teacher_digest", pa.string()),
        ("status", pa.string()),  # "kept", or the reason it was rejected
        ("round", pa.int32()),
    ]
)
"""Every sample is a row, rejected ones too: what the filters did stays visible, and resuming needs it."""

RESPONSES = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt_id", pa.string()),
        ("instruction", pa.string()),
        ("response", pa.string()),
        ("finish_reason", pa.string()),  # "stop", or "length" for a truncated one
        ("num_tokens", pa.int32()),
        ("teacher_digest", pa.string()),
    ]
)

EXAMPLES = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt_id", pa.string()),
        ("instruction", pa.string()),
        ("response", pa.string()),
    ]
)

CANDIDATES = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt_id", pa.string()),  # the probed example whose instruction is answered
        ("prompt", pa.string()),
        ("raw_output", pa.string()),
        ("instruction", pa.string()),
        ("response", pa.string()),
    ]
)
"""Several responses to one instruction: siblings as instructions of one few-shot prompt are."""

INFLUENCE = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt_id", pa.string()),
        ("loss_before", pa.float64()),
        ("loss_after", pa.float64()),
        ("influence", pa.float64()),
        ("influence_se", pa.float64()),
        ("estimator", pa.string()),
        ("example_loss", pa.float64()),  # of the warmed student on the example itself
        ("step_seconds", pa.float64()),
        ("restore_seconds", pa.float64()),
        ("evaluate_seconds", pa.float64()),
        ("worker", pa.string()),
        ("recheck_influence", pa.float64()),  # exact in float32, where score.recheck picked the example
        ("recheck_influence_se", pa.float64()),
        ("quarantine", pa.string()),  # why the example has no influence, else null
    ]
)

GRADES = pa.schema(
    [
        ("example_id", pa.string()),
        ("grade", pa.float64()),  # 1 to 10, null where the judge gave none
        ("reply", pa.string()),
    ]
)

PAIRS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("chosen_id", pa.string()),
        ("rejected_id", pa.string()),
        ("chosen_influence", pa.float64()),
        ("rejected_influence", pa.float64()),
    ]
)

ANSWERS = pa.schema(
    [
        ("example_id", pa.string()),
        ("instruction", pa.string()),
        ("response", pa.string()),
        ("finish_reason", pa.string()),
        ("num_tokens", pa.int32()),
    ]
)
"""What a student answers to held-out instructions."""

VERDICTS = pa.schema(
    [
        ("example_id", pa.string()),
        ("shown_first", pa.string()),  # candidate or baseline
        ("verdict", pa.string()),  # candidate, baseline, tie; unparsed or refused where the judge gave none
        ("reply", pa.string()),
    ]
)

LOSSES = pa.schema(
    [
        ("student", pa.string()),  # original, warmed (of an iteration), trained
        ("set", pa.string()),  # reference or held_out
        ("example_id", pa.string()),
        ("category", pa.string()),
        ("loss", pa.float64()),
    ]
)

COMPARISON = pa.schema(
    [
        ("arm", pa.string()),
        ("measure", pa.string()),  # held_out_loss, reference_loss, fresh_influence, fresh_influence_alone
        ("category", pa.string()),  # of the held-out rows it is about; null: all of them
        ("models", pa.int32()),  # students, or teachers, that were measured
        ("value", pa.float64()),
        ("value_by_model", pa.list_(pa.float64())),  # of each of them: how far seeds lie apart
        ("value_se", pa.float64()),  # over rows or examples
        ("count", pa.int32()),  # of these: rows of a loss, examples of all teachers of the arm
        ("difference", pa.float64()),  # from the arm that all are compared with; null in its own rows
        ("low", pa.float64()),  # 95 % interval of the difference
        ("high", pa.float64()),
        ("difference_se", pa.float64()),
        ("share_helpful", pa.float64()),  # of fresh examples
        ("sentence", pa.string()),
    ]
)
