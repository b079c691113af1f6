"""Logits of a few tokens at a time, their rows' statistics, and what the tp ranks exchange about
them.

Legend: T tokens, D student hidden size, E teacher hidden size (X: either), v valid vocabulary
columns of this rank, A tokens with a weight, C tokens of a logit chunk, G tokens of a gradient
chunk, R tensor-parallel ranks.

A chunk goes through its methods in the order in which they stand; between `exchange_statistics` and
`find_centre`, and between that and `gradient`, a collective is under way, so a second chunk's
products belong there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from mtopd.kernels.checks import (
    check_labels,
    check_matmul_precision,
    check_numbers,
    check_tensors,
)
from mtopd.kernels.products import has_wide_product, hidden_times_weight_
from mtopd.kernels.rows import (
    Kind,
    LogitTransform,
    Mixture,
    Row,
    RowKernels,
    RowProblem,
    no_columns,
    select_row_kernels,
)

_WORKSPACE_BYTES = {"cpu": 192 << 20, "cuda": 1792 << 20}
# Rows of a logit chunk, if the workspace holds them: enough for the products to run at full speed,
# more where there are so few columns that a chunk would not be worth its overhead.
CHUNK_ROWS = {"cpu": 128, "cuda": 1024}
_SMALL_CHUNK_ELEMENTS, _SMALL_CHUNK_ROWS = 1 << 17, 1024
# Logit chunks of a gradient chunk, where derivatives are kept apart from logits.
_GRADIENT_CHUNKS = 8


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share the vocabulary."""

    group: dist.ProcessGroup | None
    size: int
    rank: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> TensorParallel:
        return (
            cls(None, 1, 0)
            if group is None
            else cls(group, dist.get_world_size(group), dist.get_rank(group))
        )

    def all_gather(self, local: Tensor) -> Gathered:
        """Start to stack the ranks' tensors, in rank order, on a new first dimension."""
        if self.group is None or local.numel() == 0:  # without tokens on one rank, none has any
            return Gathered(local, local.expand(self.size, *local.shape), None)
        gathered = local.new_empty(self.size * local.numel())
        work = dist.all_gather_single(gathered, local.reshape(-1), group=self.group, async_op=True)
        return Gathered(local, gathered.view(self.size, *local.shape), work)


@dataclass
class Gathered:
    """An all-gather under way; holds what it sends."""

    local: Tensor
    _result: Tensor
    _work: dist.Work | None

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self._result


@dataclass(frozen=True)
class Head:
    """A model's hidden states and this rank's valid rows of its output layer."""

    hidden_TX: Tensor
    weight_vX: Tensor


@dataclass(frozen=True)
class Call:
    """One checked call, and the sizes that follow from it: alike on every tp rank, except
    num_columns.
    """

    student: Head
    teacher: Head
    problem: RowProblem
    kernels: RowKernels
    token_weight_T: Tensor
    label_T: Tensor | None
    tp: TensorParallel
    dtype: torch.dtype
    shard_rows: int  # v with padding
    workspace_bytes: int

    @classmethod
    def of(
        cls,
        student_hidden_TD: Tensor,
        student_weight_vD: Tensor,
        teacher_hidden_TE: Tensor,
        teacher_weight_vE: Tensor,
        *,
        token_weight: Tensor,
        labels: Tensor | None,
        temperature: float,
        vocab_size: int | None,
        tp_group: dist.ProcessGroup | None,
        student_logit_scale: float,
        student_softcap: float | None,
        teacher_logit_scale: float,
        teacher_softcap: float | None,
        teacher_bias: Tensor | None,
        backend: str,
        workspace_bytes: int | None,
        kind: Kind,
        mixture: Mixture,
    ) -> Call:
        """The arguments of the public function, checked (ValueError) and cut to this rank's valid
        columns.
        """
        tensors = (student_hidden_TD, student_weight_vD, teacher_hidden_TE, teacher_weight_vE)
        check_tensors(*tensors, token_weight, teacher_bias)
        tp, shard_rows = TensorParallel.of(tp_group), student_weight_vD.shape[0]
        check_numbers(
            positive={
                "temperature": temperature,
                "student_softcap": student_softcap,
                "teacher_softcap": teacher_softcap,
            },
            finite={
                "student_logit_scale": student_logit_scale,
                "teacher_logit_scale": teacher_logit_scale,
            },
            vocab_size=vocab_size,
            num_columns=tp.size * shard_rows,
            workspace_bytes=workspace_bytes,
        )
        if labels is not None:
            check_labels(labels, student_hidden_TD, vocab_size or tp.size * shard_rows)
        device = student_hidden_TD.device
        if workspace_bytes is None:
            workspace_bytes = _WORKSPACE_BYTES.get(device.type, _WORKSPACE_BYTES["cuda"])
        has_float64 = any(
            t is not None and t.dtype == torch.float64 for t in (*tensors, teacher_bias)
        )
        dtype = torch.float64 if has_float64 else torch.float32
        kernels = select_row_kernels(backend, device.type, dtype)
        check_matmul_precision(*tensors)
        num_columns = shard_rows
        if vocab_size is not None:
            num_columns = min(max(vocab_size - tp.rank * shard_rows, 0), shard_rows)
        bias_v = (
            None
            if teacher_bias is None
            else teacher_bias.detach()[:num_columns].to(dtype).contiguous()
        )
        student = LogitTransform(student_logit_scale, student_softcap, None)
        teacher = LogitTransform(teacher_logit_scale, teacher_softcap, bias_v)
        return cls(
            student=Head(student_hidden_TD.detach(), student_weight_vD.detach()[:num_columns]),
            teacher=Head(teacher_hidden_TE.detach(), teacher_weight_vE.detach()[:num_columns]),
            problem=RowProblem(
                kind=kind,
                mixture=mixture,
                temperature=temperature,
                student=student,
                teacher=teacher,
                scratch_bytes=workspace_bytes // 4 if kernels.NAME == "torch" else 0,
            ),
            kernels=kernels,
            token_weight_T=token_weight.detach(),
            label_T=labels,
            tp=tp,
            dtype=dtype,
            shard_rows=shard_rows,
            workspace_bytes=workspace_bytes,
        )

    @property
    def num_columns(self) -> int:
        """This rank's columns below vocab_size: a prefix of its rows, possibly empty."""
        return self.student.weight_vX.shape[0]

    @cached_property
    def rows_A(self) -> Tensor:
        return self.token_weight_T.nonzero().squeeze(1)

    def take(self, hidden_TX: Tensor, tokens: slice) -> Tensor:
        """Hidden states of some of the tokens with a weight; no copy where every token has one."""
        if len(self.rows_A) == len(hidden_TX):
            return hidden_TX[tokens]
        return hidden_TX.index_select(0, self.rows_A[tokens])

    @cached_property
    def num_buffers(self) -> int:
        """Pairs of logit buffers: a second chunk is multiplied while the first one's collective
        travels.
        """
        return 1 if self.tp.size == 1 else 2

    @cached_property
    def gradient_dtype(self) -> torch.dtype:
        """Derivatives of logits replace the logits, unless the products take narrower operands."""
        weight_vD = self.student.weight_vX
        is_narrow = has_wide_product(self.student.hidden_TX, weight_vD, self.dtype)
        # Not float16, where 1/N times a small p underflows.
        return torch.bfloat16 if is_narrow and weight_vD.dtype == torch.bfloat16 else self.dtype

    @cached_property
    def chunk_rows(self) -> int:
        """C: from the workspace and the shard's size with padding, never from the number of tokens."""
        device = self.token_weight_T.device.type
        row_elements = 2 * self.num_buffers * self.shard_rows
        row_elements += 2 * (self.student.hidden_TX.shape[1] + self.teacher.hidden_TX.shape[1])
        row_bytes = row_elements * self.dtype.itemsize
        if self.gradient_dtype != self.dtype:
            row_bytes += _GRADIENT_CHUNKS * self.shard_rows * self.gradient_dtype.itemsize
        reserved = self.upcast_bytes + self.problem.scratch_bytes
        affordable = max(1, (self.workspace_bytes - reserved) // row_bytes)
        full_speed_rows = max(
            CHUNK_ROWS.get(device, 128),
            min(_SMALL_CHUNK_ELEMENTS // self.shard_rows, _SMALL_CHUNK_ROWS),
        )
        rows = min(affordable, full_speed_rows)
        return rows - rows % 64 if rows > 64 else rows  # whole tiles of the products

    @property
    def gradient_rows(self) -> int:
        """G."""
        return self.chunk_rows * (_GRADIENT_CHUNKS if self.gradient_dtype != self.dtype else 1)

    @property
    def upcast_bytes(self) -> int:
        """Workspace kept for upcast weights: of either model for its logits, of the student for its
        derivatives.
        """
        heads = (self.student, self.teacher)
        upcasts_logits = any(
            head.weight_vX.dtype != self.dtype
            and not has_wide_product(head.hidden_TX, head.weight_vX, self.dtype)
            for head in heads
        )
        upcasts_derivatives = self.student.weight_vX.dtype not in (self.dtype, self.gradient_dtype)
        return self.workspace_bytes // 4 if upcasts_logits or upcasts_derivatives else 0

    @property
    def tile_rows(self) -> int:
        """Vocabulary rows that are upcast at once."""
        hidden_size = max(self.student.hidden_TX.shape[1], self.teacher.hidden_TX.shape[1])
        return max(1, self.upcast_bytes // (hidden_size * self.dtype.itemsize))

    def row_statistics(self, student_Cv: Tensor, teacher_Cv: Tensor) -> Tensor:
        """`RowKernels.statistics`, [9, C], on a rank without columns too."""
        if self.num_columns == 0:
            return no_columns(len(student_Cv), student_Cv)
        return self.kernels.statistics(self.problem, student_Cv, teacher_Cv)

    def row_gradient(
        self, student_Cv: Tensor, teacher_Cv: Tensor, rows_9C: Tensor, out_Cv: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`RowKernels.gradient`, on a rank without columns too."""
        if self.num_columns == 0:
            value_C, mean_C = rows_9C.new_zeros(2, len(student_Cv))
            return value_C, mean_C
        return self.kernels.gradient(self.problem, student_Cv, teacher_Cv, rows_9C, out_Cv)

    @contextmanager
    def chunks(self) -> Iterator[Iterator[Chunk]]:
        """The chunks of the tokens with a weight, in order, on alternating buffers of the
        workspace.
        """
        shape = (self.num_buffers, 2, self.chunk_rows, self.num_columns)
        with _borrowed(math.prod(shape), self.dtype, self.token_weight_T.device) as flat:
            yield self._chunks(flat.view(shape))

    def _chunks(self, logits: Tensor) -> Iterator[Chunk]:
        rows_A = self.rows_A
        padded_rows_A = torch.cat([rows_A, rows_A[:1].expand(-len(rows_A) % self.chunk_rows)])
        for number, start in enumerate(range(0, len(rows_A), self.chunk_rows)):
            chunk = slice(start, min(start + self.chunk_rows, len(rows_A)))
            padded_rows_C = padded_rows_A[start : start + self.chunk_rows]
            yield Chunk(
                self, chunk, rows_A[chunk], padded_rows_C, *logits[number % self.num_buffers]
            )


class Chunk:
    """Some tokens on their way from hidden states to the derivatives of their logits."""

    def __init__(
        self,
        call: Call,
        tokens: slice,
        rows_C: Tensor,
        padded_rows_C: Tensor,
        student_Cv: Tensor,
        teacher_Cv: Tensor,
    ) -> None:
        self.tokens = tokens
        self.rows_C = rows_C
        self._call = call
        self._padded_rows_C = padded_rows_C
        self._whole_student_Cv = student_Cv
        self._whole_teacher_Cv = teacher_Cv
        # Raw products of the real tokens, without those that fill the chunk up.
        self.student_Cv = student_Cv[: len(rows_C)]
        self.teacher_Cv = teacher_Cv[: len(rows_C)]
        self._statistics: Gathered | None = None
        self._centre: Gathered | None = None

    def multiply_teacher(self) -> None:
        self._multiply(self._call.teacher, self._whole_teacher_Cv)

    def multiply_student(self) -> None:
        self._multiply(self._call.student, self._whole_student_Cv)

    def exchange_statistics(self) -> None:
        call = self._call
        self._statistics = call.tp.all_gather(call.row_statistics(self.student_Cv, self.teacher_Cv))

    def find_centre(self, needs_gradient: bool) -> None:
        """Merge the statistics into `rows_9C`; start a second exchange for the divergences that
        need one.
        """
        assert self._statistics is not None
        call = self._call
        statistics_R9C = self._statistics.wait()
        self.rows_9C = call.kernels.merge(
            call.problem, statistics_R9C, call.token_weight_T[self.rows_C]
        )
        if needs_gradient and call.problem.needs_centre:
            _, mean_C = self._run(None)
            self._centre = call.tp.all_gather(mean_C)

    def gradient(self, out_Cv: Tensor | None) -> Tensor:
        """This shard's part of the divergence [C]; dL / d(h @ W.T) goes to `out_Cv` if given."""
        if self._centre is not None:
            self.rows_9C[Row.CENTRE] = self._centre.wait().sum(0)
        return self._run(out_Cv)[0]

    def _run(self, out_Cv: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._call.row_gradient(self.student_Cv, self.teacher_Cv, self.rows_9C, out_Cv)

    def _multiply(self, head: Head, out_Cv: Tensor) -> None:
        is_full = len(self.rows_C) == len(self._padded_rows_C)
        hidden_CX = (
            self._call.take(head.hidden_TX, self.tokens)
            if is_full
            else head.hidden_TX.index_select(0, self._padded_rows_C)
        )
        hidden_times_weight_(out_Cv, hidden_CX, head.weight_vX, self._call.tile_rows)


_kept: dict[torch.dtype, Tensor] = {}


@contextmanager
def _borrowed(num_elements: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Uninitialised memory, [num_elements].

    On CPU it is kept for the next call: fresh pages from the system cost a tenth of the time of the
    products.  CUDA's allocator keeps memory by itself.
    """
    kept = _kept.pop(dtype, None) if device.type == "cpu" else None
    if kept is None or kept.numel() < num_elements:
        kept = torch.empty(num_elements, dtype=dtype, device=device)
    yield kept[:num_elements]
    if device.type == "cpu":
        _kept[dtype] = kept


def has_neginf(bias_v: Tensor | None, tp: TensorParallel) -> bool:
    """Whether any rank's part of a bias excludes a token."""
    if bias_v is None:
        return False
    excludes = (bias_v == -math.inf).any().float().reshape(1)
    return bool(tp.all_gather(excludes).wait().any())
