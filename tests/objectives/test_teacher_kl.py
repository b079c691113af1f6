"""The metrics of both distributions: which tokens they are measured on, and the sums made of them."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtopd.objectives import SampledTokens, TeacherFacts, TeacherKL, TeacherRows, statistics
from mtopd.objectives.mismatch import Mismatch
from mtopd.objectives.statistics import STATISTICS, STATISTICS_TOKENS, draw
from mtopd.step_sums import LocalSums, StepSums
from mtopd.teacher_offload.head_slot import HeadCounters
from mtopd.types import HeadTransform, TeacherRun


def test_a_run_of_each_teacher_is_drawn_by_its_rows() -> None:
    runs = [
        TeacherRun(0, 0, 10, []),
        TeacherRun(2, 10, 40, []),
        TeacherRun(0, 0, 30, []),
        TeacherRun(2, 30, 40, []),
    ]
    times: Counter[TeacherRun] = Counter()
    for seed in range(4000):
        drawn = draw(runs, seed)
        assert sorted((run.teacher_index, of.num_rows) for run, of in drawn.items()) == [
            (0, 40),
            (2, 40),
        ]
        assert all(of.rows == list(range(run.stop - run.start)) for run, of in drawn.items())
        times.update(drawn.keys())
    assert [times[run] / 4000 for run in runs] == pytest.approx([0.25, 0.75, 0.75, 0.25], abs=0.03)
    assert draw(runs, 7) == draw(runs, 7) and draw([], 0) == {}


def test_tokens_of_a_long_run_are_drawn_by_the_seed_alike() -> None:
    run = TeacherRun(0, 0, 100, [])
    times: Counter[int] = Counter()
    for seed in range(2000):
        rows = draw([run], seed)[run].rows
        assert rows == sorted(set(rows)) and len(rows) == STATISTICS_TOKENS
        times.update(rows)
    assert all(abs(times[row] / 2000 - 0.64) < 0.06 for row in range(100))
    assert draw([run], 1) == draw([run], 1) != draw([run], 2)


def off_stage(num_teachers: int) -> LocalSums:
    """The numbers of a rank that has no loss rows."""
    return TeacherKL(
        teachers=[TeacherFacts(f"t{index}", None) for index in range(num_teachers)],
        heads=None,
        hidden_states=None,
        vocab_size=37,
        tp_group=None,
        device=torch.device("cpu"),
        runs=(),
        seed=0,
    ).finish()


class Step:
    """A train step without a model: two micro-batches, teachers 0 and 2 of different hidden sizes."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(5)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.weight_VD = torch.nn.Parameter(randn(40, 8))
        self.weight_VD.main_grad = torch.zeros(40, 8)  # type: ignore[attr-defined]
        self.heads = {
            0: SimpleNamespace(weight_vE=randn(40, 8), transform=HeadTransform()),
            2: SimpleNamespace(weight_vE=randn(40, 6), transform=HeadTransform(0.5, 3.0)),
        }
        self.runs = [
            [TeacherRun(0, 0, rows, []), TeacherRun(2, rows, 2 * rows, [])] for _ in range(2)
        ]
        self.student_TD = [randn(2 * rows, 8) for _ in range(2)]
        # The last row of a micro-batch has no weight.
        self.weight_T = torch.ones(2 * rows)
        self.weight_T[-1] = 0
        self.sampled = [
            SampledTokens(
                torch.randint(37, (2 * rows,), generator=generator),
                -5 * torch.rand(2 * rows, generator=generator),
            )
            for _ in range(2)
        ]
        self.teacher_TE = {
            run: randn(rows, 8 if run.teacher_index == 0 else 6) for of in self.runs for run in of
        }

    stall_s = 0.0  # of the hidden states, which are at hand

    def __call__(self, run: TeacherRun) -> torch.Tensor:
        return self.teacher_TE[run]

    def lease(self, index: int) -> AbstractContextManager[Any]:
        return nullcontext(self.heads[index])

    def drop(self) -> None:
        self.dropped = True

    def take_counters(self) -> HeadCounters:
        return HeadCounters(loads={0: 1, 2: 1}, bytes_read={0: 5}, stall_s=0.5, peak_resident=1)

    def finish(self, seed: int = 0) -> LocalSums:
        runs = [run for of_batch in self.runs for run in of_batch]
        objective = TeacherKL(
            teachers=[TeacherFacts(f"t{index}", None) for index in range(3)],
            heads=self,
            hidden_states=self,
            vocab_size=37,
            tp_group=None,
            device=torch.device("cpu"),
            runs=runs,
            seed=seed,
        )
        for student_TD, runs, sampled in zip(self.student_TD, self.runs, self.sampled, strict=True):
            batch = SimpleNamespace(
                payload=TeacherRows(runs, sampled), token_weight_T=self.weight_T
            )
            objective(student_TD.requires_grad_(), self.weight_VD, batch)
        found = objective.finish()
        assert self.dropped and found.largest["stall_s"] == 0.5
        assert found.added["head_loads/2"] == found.added["needed/0"] == 1
        assert found.added["head_bytes/0"] == 5 and not found.added["head_loads/1"]
        assert found.largest["statistics_s"] > 0
        off = off_stage(3)
        assert off.loss_rows.keys() == found.loss_rows.keys(), "alike on every rank"
        assert [*map(len, off.vectors.values())] == [*map(len, found.vectors.values())]
        return found

    def statistics(self, seed: int = 0) -> dict[str, float]:
        return {name: float(value) for name, value in self.finish(seed).loss_rows.items()}

    def differences(self) -> torch.Tensor:
        """Log-probs of the sampled tokens that have a weight, from dense logits, minus the
        rollout's.
        """
        differences = []
        for student_TD, sampled in zip(self.student_TD, self.sampled, strict=True):
            logits_TV = student_TD.double() @ self.weight_VD.double().T
            log_p_TV = logits_TV[:, :37].log_softmax(1)
            log_p_T = log_p_TV.gather(1, sampled.id_T[:, None])[:, 0].detach()
            differences.append((log_p_T - sampled.rollout_log_prob_T)[self.weight_T != 0])
        return torch.cat(differences)

    def means(self, batch: int, index: int) -> list[torch.Tensor]:
        """Entropies and forward KL of all tokens of a run, from dense logits."""
        (run,) = (run for run in self.runs[batch] if run.teacher_index == index)
        head = self.heads[index]
        student = self.student_TD[batch][run.start : run.stop].double() @ self.weight_VD.double().T
        scale, softcap = (1.0, None) if index == 0 else (0.5, 3.0)
        teacher = scale * (self.teacher_TE[run].double() @ head.weight_vE.double().T)
        teacher = teacher if softcap is None else softcap * (teacher / softcap).tanh()
        log_p, log_q = (logits[:, :37].log_softmax(1) for logits in (student, teacher))
        per_token = [-log_p.exp() * log_p, -log_q.exp() * log_q, log_q.exp() * (log_q - log_p)]
        return [value.sum(1).mean().detach() for value in per_token]


@pytest.mark.parametrize("batch_tokens", [64, 256])  # every run is compared by itself; all together
def test_sums_are_those_of_the_drawn_runs(
    batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_STATISTICS_BATCH", batch_tokens)
    step = Step(rows=30)
    found = step.statistics()
    drawn = draw([run for of_batch in step.runs for run in of_batch], seed=0)
    for run, of_run in drawn.items():
        (batch,) = (number for number, of_batch in enumerate(step.runs) if run in of_batch)
        wanted = [float(mean) * of_run.num_rows for mean in step.means(batch, run.teacher_index)]
        assert of_run.num_rows == 60
        assert [found[f"{name}/{run.teacher_index}"] for name in STATISTICS[:3]] == pytest.approx(
            wanted, rel=1e-5
        )
        assert found[f"measured/{run.teacher_index}"] == 30
    assert len(drawn) == 2 and not any(found[f"{name}/1"] for name in ("measured", *STATISTICS))


def test_at_most_the_tokens_allowed_are_measured() -> None:
    found = Step(rows=100).statistics()
    assert [found[f"measured/{index}"] for index in range(3)] == [
        STATISTICS_TOKENS,
        0,
        STATISTICS_TOKENS,
    ]


def test_log_probs_of_the_sampled_tokens_are_compared_with_the_rollouts() -> None:
    step = Step(rows=30)
    found = step.finish()
    values = {name: float(value) for name, value in found.loss_rows.items()}
    vectors = {name: counts.tolist() for name, counts in found.vectors.items()}
    metrics = Mismatch.metrics(StepSums(values, 0, 0, vectors))
    differences = step.differences()
    assert metrics.log_prob_difference == pytest.approx(float(differences.mean()), rel=1e-5)
    assert metrics.token_mult_prob_error == pytest.approx(
        float(differences.abs().mean().exp()), rel=1e-5
    )
    wanted = float(differences.abs().quantile(0.99, interpolation="higher"))
    assert metrics.log_prob_difference_p99 == pytest.approx(wanted, rel=0.046)
