"""Log-probs of given tokens, read off the logits that a divergence has in memory.

Legend: T tokens, v valid vocabulary columns of this rank, A tokens with a weight, C tokens of a
logit chunk.

A token's logit stands on one tp rank, while the maximum and the sum of exponentials of its row are
merged over all of them: that rank knows the log-prob, and the others add zeros to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtopd.kernels.chunks import Call, Chunk
from mtopd.kernels.rows import Row


class Labels:
    """One token for each row of a call."""

    def __init__(self, call: Call, label_T: Tensor) -> None:
        self._problem = call.problem
        column_A = label_T[call.rows_A] - call.tp.rank * call.shard_rows
        self._column_A = column_A.clamp(0, max(call.num_columns - 1, 0))
        self._is_elsewhere_A = self._column_A != column_A
        self._log_prob_A = torch.zeros_like(column_A, dtype=call.dtype)

    def take(self, chunk: Chunk) -> None:
        """Of a chunk whose statistics are merged and whose logits are still there."""
        if chunk.student_Cv.shape[1] == 0:
            return
        problem, tokens = self._problem, chunk.tokens
        logit_C = chunk.student_Cv.gather(1, self._column_A[tokens, None])[:, 0]
        if problem.student.scale != 1:
            logit_C = logit_C * problem.student.scale
        if problem.student.softcap is not None:
            logit_C = (logit_C / problem.student.softcap).tanh() * problem.student.softcap
        exponent_C = (logit_C - chunk.rows_9C[Row.STUDENT_MAX]) / problem.temperature
        torch.add(
            exponent_C,
            chunk.rows_9C[Row.STUDENT_INVERSE_SUM].log(),
            out=self._log_prob_A[tokens],
        )

    def shard_log_probs(self) -> Tensor:
        """This rank's part [A] of the log-probs in nats; the sum over ranks is the whole."""
        return self._log_prob_A.masked_fill_(self._is_elsewhere_A, 0)
