"""Log-probs of given tokens: read off the logits that a divergence has in memory, or alone.

Legend: T tokens, D hidden size, v valid vocabulary columns of this rank, A tokens with a weight, C
tokens of a logit chunk, R tensor-parallel ranks.

A token's logit stands on one tp rank, while the maximum and the sum of exponentials of its row are
merged over all of them: that rank knows the log-prob, and the others add zeros to it.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from mtopd.kernels.checks import check_labels, check_numbers
from mtopd.kernels.chunks import CHUNK_ROWS, Call, Chunk, TensorParallel
from mtopd.kernels.rows import Row
from mtopd.kernels.statistics import output_logits


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


@torch.no_grad()
def label_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """[T] in nats: log-probs of ``labels`` [T] in int64, of hidden states [T, D] and this rank's
    rows [v, D] of the output layer; no gradient.

    The logits of a few tokens exist at a time.  Columns >= vocab_size (global) take no part.  One
    all-gather.  Raises ValueError, alike on every tp rank, for inputs that do not fit together.
    """
    tp, shard_rows = TensorParallel.of(tp_group), len(weight)
    check_numbers(
        positive={},
        finite={},
        vocab_size=vocab_size,
        num_columns=tp.size * shard_rows,
        workspace_bytes=None,
    )
    vocab_size = vocab_size or tp.size * shard_rows
    check_labels(labels, hidden, vocab_size)
    first = tp.rank * shard_rows
    weight_vD = weight[: max(vocab_size - first, 0)]
    column_T = labels - first
    is_here_T = (column_T >= 0) & (column_T < len(weight_vD))
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    # Of each token its logit, where it is here, and the logarithm of this rank's sum of exponentials.
    parts_2T = torch.zeros(2, len(hidden), dtype=dtype, device=hidden.device)
    parts_2T[1] = -math.inf
    step = CHUNK_ROWS.get(hidden.device.type, CHUNK_ROWS["cpu"])
    for start in range(0, len(hidden), step) if len(weight_vD) else ():
        tokens = slice(start, start + step)
        logits_Cv = output_logits(hidden[tokens], weight_vD)
        column_C = column_T[tokens].clamp(0, len(weight_vD) - 1)
        parts_2T[0, tokens] = logits_Cv.gather(1, column_C[:, None])[:, 0]
        parts_2T[1, tokens] = logits_Cv.logsumexp(1)
    parts_2T[0].masked_fill_(~is_here_T, 0)
    parts_R2T = tp.all_gather(parts_2T).wait()
    return parts_R2T[:, 0].sum(0) - parts_R2T[:, 1].logsumexp(0)
