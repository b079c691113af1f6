"""Another harness's trajectories through the command line: the same teacher pass and train step as of a
rollout, and a teacher that reads a prompt of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
import zarr
from transformers import AutoModelForCausalLM

from mtopd.convert.teacher import add_teacher
from mtopd.hidden_cache import HiddenCacheReader
from mtopd.run_dir import RunDir
from tests.integration.test_kill_and_resume import save_ending_model
from tests.integration.test_phases_alone import SECONDS, checkpoint_tensors, mtopd, train_steps
from tests.small_models import write_prompts

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    # A checkpoint is read by one process.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, two teachers, and a run whose first iteration rolled out, passed and trained."""
    root = tmp_path_factory.mktemp("import")
    save_ending_model(root / "student", seed=1)
    for i in range(2):
        save_ending_model(root / f"m{i}", seed=2 + i)
        add_teacher(f"t{i}", root / f"m{i}", root / "stores" / f"t{i}", slices=2)
    write_prompts(root / "prompts.jsonl", count=40)
    config = {
        "run_dir": str(root / "rolled_out"),
        "student": {"model": str(root / "student"), "parallel": {"tp": 2}},
        "teachers": [
            {"name": f"t{i}", "store": str(root / "stores" / f"t{i}"), "route": {"domain": "ab"[i]}}
            for i in range(2)
        ],
        "data": {
            "sources": [{"name": "words", "path": str(root / "prompts.jsonl")}],
            "context_length": 64,
            "max_response": 12,
        },
        # One shard, as an import writes of so few: a pass reads its batches within quarters of shards.
        "rollout": {"prompts_per_iteration": 24, "batch_size": 24},
        "train": {
            "num_iterations": 1,
            "train_steps_per_iteration": 2,
            "micro_batch_size": 8,
            "optimizer": {"lr": 1e-3},
        },
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    lines = train_steps(mtopd("consolidate", str(root / "config.yaml"), "--log-json"))
    (root / "steps.json").write_text(json.dumps(lines))
    return root


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """A rollout's samples as another harness has them: read without mtopd."""
    rows = []
    for path in sorted(folder.glob("*.meta.parquet")):
        metadata = pq.read_table(path).to_pylist()
        with pa.memory_map(str(path).replace("meta.parquet", "tokens.arrow")) as source:
            tokens = pa.ipc.open_file(source).read_all().to_pylist()
        for known, sample in zip(metadata, tokens, strict=True):
            names = ("prompt_ids", "response_ids", "loss_mask", "rollout_log_probs")
            rows.append(
                {
                    "format": "mtopd-trajectory-1",
                    **{name: sample[name] for name in names},
                    **{n: known[n] for n in ("sample_id", "prompt_id", "finish_reason")},
                    "student_version": 0,
                }
            )
    return rows


def imported(
    root: Path, name: str, rows: list[dict[str, Any]], *overrides: str
) -> tuple[RunDir, str]:
    """A new run that has trained on nothing but these rows; what `mtopd train` printed."""
    run = RunDir(root / name)
    config = str(root / "config.yaml")
    mtopd("consolidate", config, f"run_dir={run.path}", *overrides, "--check")
    (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mtopd("trajectories", "import", str(run.path), str(root / f"{name}.jsonl"))
    mtopd("teacher-pass", str(run.path), "--iteration", "0")
    return run, mtopd("train", str(run.path), "--iteration", "0", "--log-json")


def check_mismatch(lines: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """The embedded engine sampled with the first step's weights; the second step's are others."""
    at_rollout, later = lines
    assert at_rollout["log_prob_difference_p99"] < 1e-5 < later["log_prob_difference_p99"] / 10
    assert abs(at_rollout["log_prob_difference"]) < 1e-5
    assert 1 <= at_rollout["token_mult_prob_error"] < 1 + 1e-5
    # A neighbour's log-prob would have been seen.
    shifts = np.concatenate([np.diff(row["rollout_log_probs"]) for row in rows])
    assert np.median(abs(shifts)) > 1e-2


def test_imported_samples_train_as_the_rollout_that_made_them(root: Path) -> None:
    first = RunDir(root / "rolled_out")
    rows = rows_of(first.trajectories(0))
    assert len(rows) == 24 and {row["finish_reason"] for row in rows} == {"stop", "length"}
    rows.reverse()  # another order of the file changes nothing
    run, output = imported(root, "imported", rows)
    mtopd("trajectories", "verify", str(run.path))
    expected, found = json.loads((root / "steps.json").read_text()), train_steps(output)
    for line in (*expected, *found):
        for name in SECONDS:
            del line[name]
    assert found == expected and len(found) == 2, "loss and gradient norm of both steps"
    check_mismatch(found, rows)
    before, after = checkpoint_tensors(first, 1), checkpoint_tensors(run, 1)
    assert before.keys() == after.keys()
    moments = [name for name in before if "exp_avg" in name]
    assert moments and all(before[name].abs().max() > 0 for name in moments)
    for name, tensor in before.items():  # the moments are what the gradients were
        assert torch.equal(after[name], tensor), name


def test_a_sample_that_the_engine_told_otherwise_is_left_out(root: Path) -> None:
    """By the trainer at tp 1, pp 2; the rollout's log-probs are those of tp 2's weights."""
    rows = rows_of(RunDir(root / "rolled_out").trajectories(0))
    wrong = rows[5]
    wrong["rollout_log_probs"] = [value - 1 for value in wrong["rollout_log_probs"]]
    layout = ("student.parallel.tp=1", "student.parallel.pp=2")
    settings = ("train.sequence_filter=2", "train.train_steps_per_iteration=1")
    run, output = imported(root, "filtered", rows, *layout, *settings)
    (line,) = train_steps(output)
    lines = [json.loads(text) for text in run.metrics.read_text().splitlines()]
    (found,) = [values for values in lines if values["kind"] == "sequence_filter"]
    num_tokens = [sum(row["loss_mask"]) for row in rows]
    assert (found["samples"], found["samples_filtered"]) == (24, 1)
    assert found["tokens_filtered"] == num_tokens[5]
    assert line["log_prob_difference_p99"] < 1e-5, "of what is trained"
    assert line["tokens"] == sum(num_tokens) - num_tokens[5]
    kls = line["reverse_kl_by_teacher"].values()
    assert line["loss"] == pytest.approx(0.5 * sum(kls), rel=1e-6), "N counts what is trained"


def test_a_teacher_reads_its_own_prompt(root: Path) -> None:
    """States and divergence against transformers in float64, on teacher_prompt_ids and the response."""
    rows = rows_of(RunDir(root / "rolled_out").trajectories(0))
    for k, row in enumerate(rows):
        row["teacher"] = f"t{k % 2}"
        row["prompt_id"] = f"theirs/{k}"
        row["loss_mask"][0] = k % 2 if len(row["loss_mask"]) > 1 else 1
        if k % 3:
            row["teacher_prompt_ids"] = [*row["prompt_ids"][: k % 5], *range(4, 8 + k)]
    run, output = imported(root, "contexts", rows, "train.train_steps_per_iteration=1")
    models = {
        name: AutoModelForCausalLM.from_pretrained(root / folder, dtype=torch.float64)
        for name, folder in (("student", "student"), ("t0", "m0"), ("t1", "m1"))
    }
    states = cached_states(run)
    kls: dict[str, list[float]] = {"t0": [], "t1": []}
    for row in rows:
        context = row.get("teacher_prompt_ids", row["prompt_ids"])
        hidden_TD, teacher_TV = forward(models[row["teacher"]], context, row)
        difference = torch.from_numpy(states[row["sample_id"]]) - hidden_TD
        assert difference.norm() / hidden_TD.norm() < 1e-5, row["sample_id"]
        if context is not row["prompt_ids"]:  # it is not what the student's prompt gives
            other_TD, _ = forward(models[row["teacher"]], row["prompt_ids"], row)
            assert (hidden_TD - other_TD).norm() / hidden_TD.norm() > 1e-2
        _, student_TV = forward(models["student"], row["prompt_ids"], row)
        kls[row["teacher"]] += (student_TV.exp() * (student_TV - teacher_TV)).sum(-1).tolist()
    (line,) = train_steps(output)
    expected = {name: pytest.approx(np.mean(values), rel=1e-5) for name, values in kls.items()}
    assert line["reverse_kl_by_teacher"] == expected


def forward(
    model: Any, prompt_ids: list[int], row: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states [T, D] and log-probs [T, V] that predict the row's trained tokens."""
    ids = torch.tensor([[*prompt_ids, *row["response_ids"]]])
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    places = len(prompt_ids) - 1 + np.flatnonzero(row["loss_mask"])
    return out.hidden_states[-1][0, places], out.logits[0, places].log_softmax(-1)


def cached_states(run: RunDir) -> dict[int, np.ndarray]:
    """All cached rows by sample id, as float64."""
    segments = {
        p.parent.name: zarr.open(p.parent, mode="r")
        for p in run.hidden_cache(0).glob("t/*/seg/*/zarr.json")
    }
    with HiddenCacheReader(run.hidden_cache(0)) as reader:
        entries = reader.entries()
    return {
        e.row_key.sample_id: np.asarray(
            segments[e.sample.segment][e.sample.row : e.sample.row + e.n_tokens], np.float64
        )
        for e in entries
    }
