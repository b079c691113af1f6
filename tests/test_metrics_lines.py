"""The lines of metrics.jsonl: the keys that readers of old and new runs rely on, and the way back."""

from dataclasses import replace

import pytest

from mtopd.metrics_lines import (
    BadStepLine,
    BaselineLine,
    EvaluationLine,
    HeadMetrics,
    Line,
    MemoryLine,
    MismatchMetrics,
    PassMetrics,
    PhaseLine,
    RolloutLine,
    SequenceFilterLine,
    StalenessLine,
    SupervisedStepLine,
    TeacherPassLine,
    TeacherShare,
    TeacherStatistics,
    TrainStepLine,
    WeightUpdateLine,
    line_of,
)

HEADS = HeadMetrics(
    head_loads={"rot": 1},
    head_bytes_read={"rot": 64},
    teachers_in_step=1,
    peak_resident_heads=1,
    peak_head_bytes=64,
    stall_s=0.25,
    statistics_s=0.5,
)
HEAD_KEYS = {
    *("head_loads", "head_bytes_read", "teachers_in_step", "peak_resident_heads"),
    *("peak_head_bytes", "stall_s", "statistics_s"),
}
SUPERVISED = {
    **{"loss": 1.5, "grad_norm": 0.5, "lr": 1e-3, "wall_s": 2.0},
    **{"tokens": 7, "tokens_per_s": 3.5, "positions": 19, "positions_per_s": 9.5},
}
STATISTICS = TeacherStatistics(
    tokens=7.0,
    student_entropy=1.0,
    teacher_entropy=2.0,
    forward_kl=0.5,
    overlap_ratio=0.75,
    student_overlap_mass=0.5,
    teacher_overlap_mass=0.25,
    entropy_gap=1.0,
)
MISMATCH = MismatchMetrics(
    log_prob_difference=-1e-7, log_prob_difference_p99=1e-6, token_mult_prob_error=1.0
)
TRAIN_STEP = TrainStepLine(
    **SUPERVISED,
    reverse_kl=0.1,
    reverse_kl_by_teacher={"rot": 0.1},
    share_by_teacher={"rot": TeacherShare(tokens=1.0, samples=1.0, loss=1.0)},
    kl_noise_floor={"rot": 0.0},
    below_10x_noise_floor=["rot"],
    entropy=3.0,
    micro_batches=2,
    waste=0.25,
    statistics={"rot": STATISTICS},
    mismatch=MISMATCH,
    heads=HEADS,
)
PASS = PassMetrics(
    bytes_read=10,
    bytes_kept=0,
    stored_bytes=10,
    tokens=7,
    samples=2,
    waves=1,
    stall_s=0.5,
    peak_device_bytes=5,
    peak_host_bytes=4,
    relayouts=0,
)
PASS_KEYS = {
    *("bytes_read", "bytes_kept", "stored_bytes", "tokens", "samples", "waves", "stall_s"),
    *("peak_device_bytes", "peak_host_bytes", "relayouts"),
}
PROBED = replace(PASS, probe="transformers", probe_difference=1e-6, kl_noise_floor=0.0)
LINES = [
    (PhaseLine("train", 4.0), "phase/train", {"wall_s"}),
    (
        RolloutLine(tokens=5, samples=2, stopped=1, continued_tokens=3, log_bytes=99),
        "rollout",
        {"tokens", "samples", "stopped", "continued_tokens", "log_bytes"},
    ),
    (
        RolloutLine(
            tokens=5,
            samples=2,
            stopped=1,
            environment_tokens=7,
            environment_errors=0,
            environment_calls=3,
            environment_s=0.5,
        ),
        "rollout",
        {
            *("tokens", "samples", "stopped", "continued_tokens", "log_bytes"),
            *("environment_tokens", "environment_errors", "environment_calls", "environment_s"),
        },
    ),
    (
        RolloutLine(
            tokens=5,
            samples=2,
            stopped=1,
            carried_samples=0,
            carried_tokens=0,
            open_samples=1,
            open_tokens=4,
        ),
        "rollout",
        {
            *("tokens", "samples", "stopped", "continued_tokens", "log_bytes"),
            *("carried_samples", "carried_tokens", "open_samples", "open_tokens"),
        },
    ),
    (
        StalenessLine(tokens={"0": 5, "2": 3}, mean=0.75, oldest=2, tokens_masked=3),
        "staleness",
        {"tokens", "mean", "oldest", "tokens_masked"},
    ),
    (
        WeightUpdateLine(
            seconds={"begin": 0.1, "probe": 0.2},
            bytes_sent=1000,
            servers=2,
            servers_out=1,
            probe_difference=1e-6,
        ),
        "weight_update",
        {"seconds", "bytes_sent", "servers", "servers_out", "probe_difference"},
    ),
    (
        SequenceFilterLine(samples=9, samples_filtered=2, tokens_filtered=7, wall_s=0.5),
        "sequence_filter",
        {"samples", "samples_filtered", "tokens_filtered", "wall_s"},
    ),
    (TeacherPassLine({"rot": PASS, "rev": PROBED}), "teacher_pass", {"teachers"}),
    (
        TRAIN_STEP,
        "train_step",
        {
            *SUPERVISED,
            *("reverse_kl", "reverse_kl_by_teacher", "share_by_teacher", "kl_noise_floor"),
            *("below_10x_noise_floor", "entropy", "micro_batches", "waste"),
            *("log_prob_difference", "log_prob_difference_p99", "token_mult_prob_error"),
            *("statistics", *HEAD_KEYS),
        },
    ),
    (
        BadStepLine(refused="the loss is nan", bad_steps=1, heads=HEADS),
        "bad_step",
        {"refused", "bad_steps", *HEAD_KEYS},
    ),
    (EvaluationLine({"rot": 0.5}), "evaluation", {"accuracy"}),
    (EvaluationLine({"rot": 0.5}, {"rot": 1.0}), "evaluation", {"accuracy", "shares"}),
    (
        EvaluationLine({"rot": 0.5}, stopped={"rot": 1.0}),
        "evaluation",
        {"accuracy", "stopped"},
    ),
    (
        BaselineLine(accuracy={"rot": 0.5}, stopped={"rot": 1.0}, kept=True),
        "baseline",
        {"accuracy", "stopped", "kept"},
    ),
    (MemoryLine(5000), "memory", {"peak_host_bytes"}),
]


@pytest.mark.parametrize(("line", "kind", "keys"), LINES, ids=[kind for _, kind, _ in LINES])
def test_a_line_has_its_keys_and_is_read_back(line: Line, kind: str, keys: set[str]) -> None:
    assert line.kind == kind and line.values().keys() == keys
    assert line_of(kind, line.values()) == line


def test_groups_stand_among_the_fields_and_tables_hold_plain_values() -> None:
    values = TRAIN_STEP.values()
    assert values["head_loads"] == {"rot": 1} and values["stall_s"] == 0.25
    assert values["share_by_teacher"] == {"rot": {"tokens": 1.0, "samples": 1.0, "loss": 1.0}}
    assert values["statistics"]["rot"].keys() == {
        *("tokens", "student_entropy", "teacher_entropy", "forward_kl", "overlap_ratio"),
        *("student_overlap_mass", "teacher_overlap_mass", "entropy_gap"),
    }


def test_what_only_a_first_pass_measures_is_no_key_of_the_others() -> None:
    teachers = TeacherPassLine({"rot": PASS, "rev": PROBED}).values()["teachers"]
    assert teachers["rot"].keys() == PASS_KEYS
    assert teachers["rev"].keys() == PASS_KEYS | {"probe", "probe_difference", "kl_noise_floor"}


def test_a_supervised_step_is_read_as_a_train_step() -> None:
    line = SupervisedStepLine(**SUPERVISED)
    assert (line.kind, line.values()) == ("train_step", SUPERVISED)
    read = line_of(line.kind, line.values())
    assert isinstance(read, TrainStepLine) and read.loss == 1.5
    assert read.reverse_kl is read.heads.stall_s is None and read.heads.head_loads == {}


def test_an_older_line_lacks_keys_and_a_newer_one_has_more() -> None:
    line = line_of("teacher_pass", {"teachers": {"rot": {"waves": 1, "new": 2}}, "new": 3})
    assert isinstance(line, TeacherPassLine)
    assert line.teachers["rot"].waves == 1 and line.teachers["rot"].bytes_kept is None
    assert line_of("memory", {}) == MemoryLine(None)
    step = line_of("train_step", {"loss": 1.0, "tokens": 7, "wall_s": 2.0})
    assert isinstance(step, TrainStepLine) and step.tokens == 7 and step.positions is None
    assert line_of("a newer kind", {"tokens": 1}) is None
