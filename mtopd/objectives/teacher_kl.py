"""Full-vocabulary reverse KL to each token's own teacher: DeepSeek-V4 report (arXiv:2606.19348), eq. (29)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from mtopd.kernels import fused_linear_divergence


class Head(Protocol):
    """A teacher's output layer on this rank: the same vocabulary rows as the student's shard."""

    @property
    def weight_vE(self) -> torch.Tensor: ...
    @property
    def scale(self) -> float: ...
    @property
    def softcap(self) -> float | None: ...


@dataclass(frozen=True)
class TeacherRun:
    """Consecutive loss rows of a micro-batch that belong to one teacher.  ``entries``: their samples, in order."""

    teacher_index: int
    start: int
    stop: int
    entries: Sequence[Any]


class TeacherKL:
    """objective(student_hidden_TD, output_weight_vD, micro_batch): sum over rows of weight x KL(student || teacher).

    ``micro_batch.payload`` is a list of TeacherRun in teacher order; the divergence is called once per run, with the
    one resident head.  ``hidden_states(run)`` fetches [T, E] of a run.  Runs on last-stage ranks only.
    """

    def __init__(
        self,
        *,
        num_teachers: int,
        head: Callable[[int], Head],
        hidden_states: Callable[[TeacherRun], torch.Tensor],
        vocab_size: int,
        tp_group: dist.ProcessGroup | None,
    ) -> None:
        self._num_teachers, self._head, self._hidden_states = num_teachers, head, hidden_states
        self._vocab_size, self._tp_group = vocab_size, tp_group

    def __call__(
        self, student_hidden_TD: torch.Tensor, output_weight_vD: torch.Tensor, micro_batch: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        # A micro-batch without rows must still reach backward on every stage.
        loss = student_hidden_TD[:0].sum().float()
        kl_sum = torch.zeros(self._num_teachers, dtype=torch.float64, device=student_hidden_TD.device)
        tokens = torch.zeros_like(kl_sum)
        weighted = torch.zeros((), dtype=torch.float64, device=kl_sum.device)
        entropy = torch.zeros_like(weighted)
        for run in micro_batch.payload:
            head = self._head(run.teacher_index)
            rows = slice(run.start, run.stop)
            out = fused_linear_divergence(
                student_hidden_TD[rows],
                output_weight_vD,
                self._hidden_states(run),
                head.weight_vE,
                token_weight=micro_batch.token_weight_T[rows],
                vocab_size=self._vocab_size,
                tp_group=self._tp_group,
                teacher_logit_scale=head.scale,
                teacher_softcap=head.softcap,
            )
            del head  # the slot alone may hold it when the next teacher's is asked for
            loss = loss + out.loss
            kl_sum[run.teacher_index] += out.per_token.double().sum()
            tokens[run.teacher_index] += run.stop - run.start
            weighted += (out.per_token.double() * micro_batch.token_weight_T[rows].double()).sum()
            entropy += out.entropy.double().sum()
        metrics = {"loss": weighted, "entropy": entropy}
        for i in range(self._num_teachers):
            metrics[f"kl_sum/{i}"], metrics[f"tokens/{i}"] = kl_sum[i], tokens[i]
        return loss, metrics
