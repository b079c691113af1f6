"""A row becomes a trajectory of a run, or everything that is wrong with it is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mtopd.data import route
from mtopd.trajectories.row_checks import KnownTeacher, Problems, RowChecks, SampleIds
from mtopd.trajectories.rows import Row
from mtopd.types import MtopdError, Prompt, Trajectory
from tests.trajectories.row_files import row

TEACHERS = [
    KnownTeacher("t0", {"domain": "a"}, vocab_size=20),
    KnownTeacher("t1", {"domain": "b"}, vocab_size=30),
]
ASKED = Prompt("words/1", {"domain": "b", "level": "3"}, (5, 6), 1)
CHECKS = RowChecks(
    iteration=0,
    vocab_size=20,
    context_length=8,
    teachers=TEACHERS,
    teacher_of=lambda fields: route(fields, {teacher.name: teacher.route for teacher in TEACHERS}),
    prompt=lambda prompt_id: ASKED if prompt_id == ASKED.prompt_id else None,
    held_out=lambda prompt_id: prompt_id == "words-eval/1",
    is_over=lambda response_ids: response_ids[-1] == 1,
)


def checked(**changes) -> Trajectory | list[tuple[str, str]]:
    return CHECKS.trajectory(Row(**row(7, **changes)))


def test_a_sound_row_is_a_trajectory() -> None:
    assert checked(reward=0.5, teacher_prompt_ids=[19, 2]) == Trajectory(
        sample_id=7,
        prompt_id="theirs/7",
        route={"domain": "a"},
        teacher_index=0,
        prompt_ids=(5, 6, 8),
        response_ids=(8, 9, 1),
        loss_mask=(1, 0, 1),
        rollout_log_probs=(-0.5, -1.25, 0.0),
        student_version=0,
        finish_reason="stop",
        reward=0.5,
        teacher_prompt_ids=(19, 2),
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teacher": "t1"}, (1, {"domain": "b"})),
        ({"teacher": None, "route": {"domain": "a", "x": "y"}}, (0, {"domain": "a", "x": "y"})),
        ({"teacher": "t1", "route": {"domain": "b"}}, (1, {"domain": "b"})),
        ({"teacher": None, "prompt_id": "words/1", "prompt_ids": [5, 6]}, (1, ASKED.route)),
    ],
)
def test_a_row_says_whose_it_is(changes, expected) -> None:
    found = checked(**changes)
    assert isinstance(found, Trajectory), found
    assert (found.teacher_index, found.route) == expected


@pytest.mark.parametrize(
    ("changes", "column", "text"),
    [
        ({"prompt_ids": []}, "prompt_ids", "is empty"),
        ({"prompt_ids": [5, -1]}, "prompt_ids", "holds -1 at [1]; the student has the ids 0..19"),
        ({"response_ids": [8, 20, 1]}, "response_ids", "holds 20 at [1]"),
        ({"loss_mask": [1, 1]}, "loss_mask", "has 2 entries for 3 response_ids"),
        ({"loss_mask": [1, 2, 0]}, "loss_mask", "holds 2; only 0 and 1"),
        ({"loss_mask": [0, 0, 0]}, "loss_mask", "has no 1"),
        ({"rollout_log_probs": [-1.0] * 4}, "rollout_log_probs", "has 4 entries for 3"),
        ({"rollout_log_probs": [-1, 0.01, 0]}, "rollout_log_probs", "holds 0.01 at [1]"),
        ({"rollout_log_probs": [float("nan"), 0, 0]}, "rollout_log_probs", "holds nan at [0]"),
        ({"rollout_log_probs": [0, float("-inf"), 0]}, "rollout_log_probs", "holds -inf at [1]"),
        ({"prompt_ids": [5] * 6}, "response_ids", "makes 9 tokens with prompt_ids"),
        ({"sample_id": -1}, "sample_id", "is -1"),
        ({"sample_id": 1 << 63}, "sample_id", "of 63 bits"),
        ({"student_version": 1}, "student_version", "is 1; iteration 0 trains on"),
        ({"finish_reason": "eos"}, "finish_reason", "is 'eos'; needed is one of 'stop', 'length'"),
        ({"response_ids": [8, 1, 9]}, "finish_reason", "the last of response_ids, 9, ends no"),
        ({"reward": float("inf")}, "reward", "is inf"),
        ({"teacher_prompt_ids": []}, "teacher_prompt_ids", "is empty"),
        ({"teacher_prompt_ids": [20]}, "teacher_prompt_ids", "teacher 't0' has the ids 0..19"),
        ({"teacher": "t2"}, "teacher", "is 't2'; the run has 't0', 't1'"),
        ({"teacher": None}, "teacher", "no training prompt 'theirs/7'"),
        ({"route": {"domain": "b"}}, "teacher", "is 't0', but {'domain': 'b'} is 't1''s route"),
        ({"teacher": None, "route": {"domain": "c"}}, "route", "no teacher's route matches"),
        ({"prompt_id": "words/1", "teacher": "t1"}, "prompt_ids", "are not the 2 tokens"),
        ({"prompt_id": "words-eval/1"}, "prompt_id", "is held out"),
    ],
)
def test_what_is_wrong_is_named(changes, column: str, text: str) -> None:
    found = checked(**changes)
    assert isinstance(found, list), "it was taken"
    assert [name for name, _ in found] == [column], found
    assert text in found[0][1], found


def test_a_response_without_tokens_is_named_once() -> None:
    found = checked(response_ids=[], loss_mask=[], rollout_log_probs=[])
    assert found == [("response_ids", "is empty; at least one token is needed")]


def test_a_longer_teacher_vocabulary_is_the_teachers() -> None:
    assert isinstance(checked(teacher="t1", teacher_prompt_ids=[29]), Trajectory)
    assert isinstance(replace(CHECKS, vocab_size=30).trajectory(Row(**row(7))), Trajectory)


def test_problems_are_counted_and_the_first_of_each_column_named() -> None:
    problems = Problems()
    problems.check(5)
    for k in range(5):
        problems.add(
            f"r.jsonl, line {k}", [("loss_mask", "is odd"), ("route", "is odder")][: 1 + k % 2]
        )
    with pytest.raises(MtopdError) as caught:
        problems.check(9)
    text = str(caught.value)
    assert text.startswith(
        "5 of 9 rows cannot be imported, nothing was: [loss_mask] r.jsonl, line 0"
    )
    assert text.count("line") == 3 + 2 and "and 2 rows more [route] r.jsonl, line 1" in text


def test_ids_that_stand_twice_are_found_by_their_places() -> None:
    ids = SampleIds()
    for file in ((5, 3, 9), (3, 7, 5), (5,)):
        ids.begin_file()
        for line, sample_id in enumerate(file, start=1):
            ids.add(sample_id, line)
    assert [*ids.twice()] == [(3, (1, 1), (0, 2)), (5, (1, 3), (0, 1)), (5, (2, 1), (0, 1))]
