"""Full-vocabulary reverse KL to each token's own teacher: DeepSeek-V4 report (arXiv:2606.19348),
eq. (29).

Differs from the textbook in: gradients are sums, 1/N and the teacher's weight stand in the token
weights; a micro-batch is cut into runs of one teacher, and the divergence is called once per run
with the one head that is resident; the gradient of the output layer is added to its ``main_grad``
in forward, in float32.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mtopd.kernels import fused_linear_divergence, output_logits
from mtopd.metrics_lines import DivergenceMetrics, HeadMetrics, TeacherShare, TeacherStatistics
from mtopd.objectives.inputs import Heads, HiddenStates, TeacherFacts, TeacherRows
from mtopd.objectives.mismatch import Mismatch
from mtopd.objectives.statistics import STATISTICS, TokenStatistics
from mtopd.step_sums import LocalSums, NonFiniteGradients, StepSums
from mtopd.types import TeacherRun, TrainStepPlan

_LOSS_ROWS = ("loss", "kl_sum", "tokens", "non_finite", "measured", *STATISTICS)  # of a teacher
_HEADS = ("head_loads", "head_bytes", "needed")  # of a teacher


class TeacherKL:
    """The objective sum over rows of token_weight x KL(student || teacher).

    One object for one train step.  ``runs``: those of this rank's micro-batches, in order, none off
    the last stage; a micro-batch's ``payload`` is its `TeacherRows`.  ``hidden_states(run)``
    fetches [T, E]; its ``stall_s`` counts the seconds that this waited.  ``heads`` is None off the
    last stage.
    """

    def __init__(
        self,
        *,
        teachers: Sequence[TeacherFacts],
        heads: Heads | None,
        hidden_states: HiddenStates | None,
        vocab_size: int,
        tp_group: dist.ProcessGroup | None,
        device: torch.device,
        runs: Sequence[TeacherRun],
        seed: int,
    ) -> None:
        self._teachers = teachers
        self._heads = heads
        self._hidden_states = hidden_states
        self._stalled_before = hidden_states.stall_s if hidden_states else 0.0
        self._vocab_size = vocab_size
        self._tp_group = tp_group
        self._runs = runs
        self._statistics = TokenStatistics(
            runs, seed=seed, vocab_size=vocab_size, tp_group=tp_group
        )
        self._mismatch = Mismatch(device)
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self._sums = dict.fromkeys([*self._names(_LOSS_ROWS), "entropy"], zero)
        self._per_token: list[tuple[TeacherRun, torch.Tensor]] = []

    def _names(self, names: Sequence[str]) -> list[str]:
        return [f"{name}/{i}" for i in range(len(self._teachers)) for name in names]

    # -- the loss of a micro-batch -----------------------------------------------------------------
    def __call__(
        self, student_hidden_TD: torch.Tensor, output_weight_vD: Any, micro_batch: Any
    ) -> torch.Tensor:
        assert self._heads is not None and self._hidden_states is not None, "off the last stage"
        # A micro-batch without rows must still reach backward on every stage.
        loss = student_hidden_TD[:0].sum().float()
        teacher_rows: TeacherRows = micro_batch.payload
        for run in teacher_rows.runs:
            with self._heads.lease(run.teacher_index) as head:
                rows = slice(run.start, run.stop)
                student_hidden_RD = student_hidden_TD[rows]
                teacher_hidden_RE = self._hidden_states(run)
                token_weight_R = micro_batch.token_weight_T[rows]
                out = fused_linear_divergence(
                    student_hidden_RD,
                    output_weight_vD,
                    teacher_hidden_RE,
                    head.weight_vE,
                    token_weight=token_weight_R,
                    labels=teacher_rows.sampled.id_T[rows],
                    vocab_size=self._vocab_size,
                    tp_group=self._tp_group,
                    teacher_logit_scale=head.transform.scale,
                    teacher_softcap=head.transform.softcap,
                    weight_grad_accumulator=output_weight_vD.main_grad,
                )
                loss = loss + out.loss
                self._add(run, out.per_token, out.entropy, token_weight_R)
                assert out.label_log_prob is not None
                self._mismatch.add(
                    out.label_log_prob,
                    teacher_rows.sampled.rollout_log_prob_T[rows],
                    token_weight_R != 0,
                )
                if measured := self._statistics.rows(run):
                    rows_N = torch.tensor(measured, device=teacher_hidden_RE.device)
                    with torch.no_grad():
                        student_Nv = output_logits(student_hidden_RD[rows_N], output_weight_vD)
                        teacher_Nv = output_logits(
                            teacher_hidden_RE[rows_N],
                            head.weight_vE,
                            logit_scale=head.transform.scale,
                            softcap=head.transform.softcap,
                        )
                    self._statistics.keep(run, student_Nv, teacher_Nv)
            del head  # the slot alone may hold it when the next teacher's is asked for
        return loss

    def _add(
        self,
        run: TeacherRun,
        kl_R: torch.Tensor,
        entropy_R: torch.Tensor,
        token_weight_R: torch.Tensor,
    ) -> None:
        self._per_token.append((run, kl_R))
        added = {
            "loss": (kl_R.double() * token_weight_R.double()).sum(),
            "kl_sum": kl_R.double().sum(),
            "tokens": torch.full_like(self._sums["entropy"], run.stop - run.start),
            "non_finite": (~kl_R.isfinite()).sum().double(),
        }
        for name, value in added.items():
            key = f"{name}/{run.teacher_index}"
            self._sums[key] = self._sums[key] + value
        self._sums["entropy"] = self._sums["entropy"] + entropy_R.double().sum()

    # -- the numbers of the step -------------------------------------------------------------------
    def finish(self) -> LocalSums:
        added = dict.fromkeys(self._names(_HEADS), 0.0)
        stall_s, peak_resident, peak_bytes = 0.0, 0, 0
        if self._heads is not None and self._hidden_states is not None:
            self._heads.drop()
            self._sums |= self._statistics.sums()
            counters = self._heads.take_counters()
            assert all(n == 1 for n in counters.loads.values()), (
                f"a head was loaded twice in one train step: {counters.loads}"
            )
            stall_s = self._hidden_states.stall_s - self._stalled_before + counters.stall_s
            peak_resident, peak_bytes = counters.peak_resident, counters.peak_device_bytes
            # A head that a tp group loads counts once; dp and cp ranks add.
            counts = int(self._tp_group is None or dist.get_rank(self._tp_group) == 0)
            for i, count in counters.loads.items():
                added[f"head_loads/{i}"] = counts * count
            for i, num_bytes in counters.bytes_read.items():
                added[f"head_bytes/{i}"] = num_bytes
            for i in {run.teacher_index for run in self._runs}:
                added[f"needed/{i}"] = counts
        largest = {
            "peak_resident_heads": peak_resident,
            "peak_head_bytes": peak_bytes,
            "stall_s": stall_s,
            "statistics_s": self._statistics.seconds,
        }
        vectors = {"abs_difference": self._mismatch.histogram()}
        return LocalSums(self._sums | self._mismatch.sums(), vectors, added, largest)

    def refuse_non_finite(self, sums: StepSums) -> None:
        loss = self._total(sums, "loss")
        if not math.isfinite(loss) or self._total(sums, "non_finite"):
            raise NonFiniteGradients(f"the loss is {loss}")

    def explain_non_finite(self) -> str:
        found: list[tuple[int, str]] = []
        for run, kl_R in self._per_token:
            bad_rows = (~kl_R.isfinite()).nonzero()[:, 0].tolist()
            if not bad_rows:
                continue
            assert self._hidden_states is not None
            is_finite_T = torch.isfinite(self._hidden_states(run)).all(-1)
            bounds = np.cumsum([0, *(rows.stop - rows.first for rows in run.samples)])
            for row in bad_rows:
                sample = run.samples[int(np.searchsorted(bounds, row, "right")) - 1]
                side = "the student's hidden states"
                if not is_finite_T[row]:
                    name = self._teachers[run.teacher_index].name
                    side = f"the cached hidden states of teacher {name!r}"
                found.append((sample.sample_id, side))
        gathered: list[list[tuple[int, str]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, sorted(set(found)))
        by_side: dict[str, list[int]] = {}
        for sample_id, side in sorted({culprit for part in gathered for culprit in part}):
            by_side.setdefault(side, []).append(sample_id)
        if not by_side:
            return "no sample's loss is NaN or inf: the gradients overflowed"
        return "; ".join(
            f"{side} in sample{'s' if len(ids) > 1 else ''} "
            f"{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}"
            for side, ids in by_side.items()
        )

    def metrics(self, sums: StepSums, plan: TrainStepPlan) -> DivergenceMetrics:
        loss, kl_sum = self._total(sums, "loss"), self._total(sums, "kl_sum")
        num_tokens = max(sum(plan.num_tokens.values()), 1)
        samples = [s for part in plan.micro_batches for batch in part for s in batch.samples]
        num_samples = Counter(sample.teacher_index for sample in samples)
        reverse_kl: dict[str, float] = {}
        shares: dict[str, TeacherShare] = {}
        floors: dict[str, float] = {}
        statistics: dict[str, TeacherStatistics] = {}
        for i, teacher in enumerate(self._teachers):
            found = {name: sums.values[f"{name}/{i}"] for name in _LOSS_ROWS}
            if found["tokens"]:
                reverse_kl[teacher.name] = found["kl_sum"] / found["tokens"]
            if teacher.noise_floor is not None:
                floors[teacher.name] = teacher.noise_floor
            if found["measured"]:
                statistics[teacher.name] = _statistics(found)
            shares[teacher.name] = TeacherShare(
                tokens=plan.num_tokens.get(i, 0) / num_tokens,
                samples=num_samples[i] / len(samples),
                loss=found["loss"] / loss if loss else 0.0,
            )
        return DivergenceMetrics(
            loss=loss,
            reverse_kl=kl_sum / num_tokens,
            reverse_kl_by_teacher=reverse_kl,
            share_by_teacher=shares,
            kl_noise_floor=floors,
            below_10x_noise_floor=[
                name
                for name, floor in floors.items()
                if reverse_kl.get(name, math.inf) < 10 * floor
            ],
            entropy=sums.values["entropy"] / num_tokens,
            statistics=statistics,
            mismatch=self._mismatch.metrics(sums),
        )

    def head_metrics(self, sums: StepSums) -> HeadMetrics:
        def by_teacher(name: str) -> dict[str, int]:
            return {t.name: int(sums.values[f"{name}/{i}"]) for i, t in enumerate(self._teachers)}

        return HeadMetrics(
            head_loads=by_teacher("head_loads"),
            head_bytes_read=by_teacher("head_bytes"),
            teachers_in_step=int(self._total(sums, "needed")),
            peak_resident_heads=int(sums.values["peak_resident_heads"]),
            peak_head_bytes=int(sums.values["peak_head_bytes"]),
            stall_s=sums.values["stall_s"],
            statistics_s=sums.values["statistics_s"],
        )

    def _total(self, sums: StepSums, name: str) -> float:
        return sum(sums.values[f"{name}/{i}"] for i in range(len(self._teachers)))


def _statistics(found: Mapping[str, float]) -> TeacherStatistics:
    """Means over a teacher's tokens, estimated on those measured."""
    means = {name: found[name] / found["tokens"] for name in STATISTICS}
    gap = abs(means["teacher_entropy"] - means["student_entropy"])
    return TeacherStatistics(tokens=found["measured"], entropy_gap=gap, **means)
