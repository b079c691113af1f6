"""Refusals of `fused_linear_divergence`, made before any collective: equal arguments are refused
alike on every rank.

Legend: T tokens, D student hidden size, E teacher hidden size, v vocabulary rows of this rank.
Every message says what was found and what was needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mtopd.kernels.rows import DIVERGENCES, NO_BETA


def check_choices(divergence: str, beta: float | None, teacher_neginf: str, backend: str) -> None:
    """Raise ValueError for names that do not exist and for a beta that does not fit the divergence."""
    for name, value, known in (
        ("divergence", divergence, DIVERGENCES),
        ("teacher_neginf", teacher_neginf, ("error", "floor")),
        ("backend", backend, ("auto", "triton", "cpu", "torch")),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; known: {', '.join(map(repr, known))}")
    if divergence in NO_BETA:
        if beta is not None:
            raise ValueError(
                f"beta={beta!r}: divergence={divergence!r} takes no beta; leave it None"
            )
    elif beta is None or not 0 < beta < 1:
        limits = {
            "jsd": "the limits are 'forward_kl' at 0 and 'reverse_kl' at 1",
            "skewed_reverse_kl": "the limit at 0 is 'reverse_kl', at 1 nothing is left",
            "skewed_forward_kl": "the limit at 0 is 'forward_kl', at 1 nothing is left",
        }[divergence]
        raise ValueError(
            f"beta={beta!r}: divergence={divergence!r} needs a beta with 0 < beta < 1; {limits}"
        )


def check_accumulator(
    accumulator_vD: object, student_weight_vD: Tensor, dtype: torch.dtype
) -> None:
    """Raise ValueError unless the weight gradient can be added to the accumulator once, in full
    precision.
    """
    if not isinstance(accumulator_vD, Tensor):
        raise ValueError(
            f"weight_grad_accumulator is {type(accumulator_vD).__name__}; a tensor is needed"
        )
    if (
        accumulator_vD.shape != student_weight_vD.shape
        or accumulator_vD.device != student_weight_vD.device
    ):
        raise ValueError(
            f"weight_grad_accumulator is {list(accumulator_vD.shape)} on {accumulator_vD.device}, "
            f"but student_weight is {list(student_weight_vD.shape)} on {student_weight_vD.device}"
        )
    if (
        accumulator_vD.dtype != dtype
        or not accumulator_vD.is_contiguous()
        or accumulator_vD.requires_grad
    ):
        raise ValueError(
            f"weight_grad_accumulator has dtype {accumulator_vD.dtype}, strides "
            f"{accumulator_vD.stride()} and requires_grad={accumulator_vD.requires_grad}; "
            f"a contiguous {dtype} buffer without gradient is needed"
        )
    if not student_weight_vD.requires_grad:
        raise ValueError(
            "weight_grad_accumulator is given, but student_weight does not require a gradient"
        )
    if torch._C._current_graph_task_id() != -1:
        raise ValueError(
            "weight_grad_accumulator cannot be used under activation recompute: the gradient would "
            "be added again in backward.  Keep the loss out of the recomputed part, or leave "
            "weight_grad_accumulator None"
        )


def check_tensors(
    student_hidden_TD: Tensor,
    student_weight_vD: Tensor,
    teacher_hidden_TE: Tensor,
    teacher_weight_vE: Tensor,
    token_weight_T: Tensor,
    teacher_bias_v: Tensor | None,
) -> None:
    """Raise ValueError unless dimensions, sizes, dtypes and devices fit together and every
    token_weight is finite.
    """
    tensors = {
        "student_hidden": (student_hidden_TD, 2),
        "student_weight": (student_weight_vD, 2),
        "teacher_hidden": (teacher_hidden_TE, 2),
        "teacher_weight": (teacher_weight_vE, 2),
        "token_weight": (token_weight_T, 1),
    }
    if teacher_bias_v is not None:
        tensors["teacher_bias"] = (teacher_bias_v, 1)
    for name, (tensor, num_dims) in tensors.items():
        if tensor.dim() != num_dims:
            raise ValueError(
                f"{name} has {tensor.dim()} dimensions {list(tensor.shape)}; {num_dims} are needed"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; a floating-point dtype is needed")
        if tensor.device != student_hidden_TD.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but student_hidden is on {student_hidden_TD.device}"
            )
    _check_same_size(
        "tokens",
        {name: tensors[name][0] for name in ("student_hidden", "teacher_hidden", "token_weight")},
    )
    heads = [
        name for name in ("student_weight", "teacher_weight", "teacher_bias") if name in tensors
    ]
    _check_same_size("vocabulary rows", {name: tensors[name][0] for name in heads})
    for model in ("student", "teacher"):
        pair = {name: tensors[name][0] for name in (f"{model}_hidden", f"{model}_weight")}
        _check_same_size("hidden columns", pair, dim=1)
    if student_weight_vD.numel() == 0 or teacher_weight_vE.numel() == 0:
        shapes = f"{list(student_weight_vD.shape)} and {list(teacher_weight_vE.shape)}"
        raise ValueError(
            f"student_weight and teacher_weight are {shapes}; at least one row and one column are "
            "needed"
        )
    if not torch.isfinite(token_weight_T).all():
        raise ValueError(
            f"token_weight holds {int((~torch.isfinite(token_weight_T)).sum())} NaN or infinite "
            "values"
        )


def check_labels(label_T: Tensor, hidden_TX: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless there is a token of the vocabulary for each hidden state."""
    if label_T.dtype != torch.int64 or label_T.shape != hidden_TX.shape[:1]:
        raise ValueError(
            f"labels are {label_T.dtype} {list(label_T.shape)}; int64 [{len(hidden_TX)}] is needed"
        )
    if label_T.device != hidden_TX.device:
        raise ValueError(f"labels are on {label_T.device}, hidden states on {hidden_TX.device}")
    if len(label_T) > 0:
        smallest, largest = torch.stack(label_T.aminmax()).tolist()  # on CUDA one wait, not two
        if smallest < 0 or largest >= vocab_size:
            raise ValueError(
                f"labels are {smallest} to {largest}; 0 to {vocab_size - 1} is the vocabulary"
            )


def check_matmul_precision(*operands: Tensor) -> None:
    """Raise ValueError where torch would round float32 operands of products to TF32 or bfloat16."""
    precision = torch.get_float32_matmul_precision()
    if precision != "highest" and any(operand.dtype == torch.float32 for operand in operands):
        raise ValueError(
            f"torch.get_float32_matmul_precision() is {precision!r}: float32 operands would be "
            "rounded, which is wrong near convergence.  Set it to 'highest', or pass bfloat16 "
            "tensors: their products are exact"
        )


def check_numbers(
    *,
    positive: Mapping[str, float | None],
    finite: Mapping[str, float],
    vocab_size: int | None,
    num_columns: int,
    workspace_bytes: int | None,
) -> None:
    """Raise ValueError unless each number is in its range (None: not given); `num_columns` is v
    over all tp ranks.
    """
    for name, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; a finite number > 0 is needed")
    for name, value in finite.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}; a finite number is needed")
    if vocab_size is not None and not 1 <= vocab_size <= num_columns:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the output layers have {num_columns} rows over all "
            "tp ranks"
        )
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ValueError(f"workspace_bytes is {workspace_bytes}; at least 1 is needed")


def _check_same_size(what: str, tensors: Mapping[str, Tensor], dim: int = 0) -> None:
    sizes = {name: tensor.shape[dim] for name, tensor in tensors.items()}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ValueError(f"the number of {what} differs: {found}")
