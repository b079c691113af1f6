"""What each tensor-parallel rank runs in `test_divergence_tp`: gloo on the loopback interface, a
file as rendezvous.

Every rank builds the same whole case from a seed, keeps its rows of the vocabulary, and compares
with the dense answer of the whole case: values, its rows of the weight gradient, and the hidden
gradient after the caller's sum over ranks.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from divergence_cases import Answer, Case, assert_as_good_as_dense, dense, make_case, relative_error
from row_cases import SIX
from torch import Tensor

from mtopd.kernels import chunks, distribution_statistics, label_log_probs, output_logits

ROWS = 13  # of the vocabulary on each rank
CHUNKED = 8_000  # workspace_bytes that makes several chunks of every case here


def run_rank(rank: int, world_size: int, store_path: str) -> None:
    """Entry point of torch.multiprocessing.spawn; any failure here fails the test."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(store_path, world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    group_while_alive = weakref.ref(dist.group.WORLD)
    run_checks(rank, dist.group.WORLD)
    dist.barrier()
    dist.destroy_process_group()
    assert group_while_alive() is None, (
        "a group that outlives destroy now and then aborts the interpreter's exit"
    )


def run_checks(rank: int, group: dist.ProcessGroup) -> None:
    if group.size() == 8:
        check_real_vocabulary(group)
        return
    check_against_dense(group)
    check_shards_of_different_scale(group)
    check_nothing_to_do(group)
    check_number_of_collectives(group)
    check_collectives_travel_behind_products(group)
    check_accumulator(group)
    check_statistics(group)
    check_labels_alone(group)
    check_refusal_is_collective(group)
    if group.size() == 4:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        check_against_dense(pairs[rank // 2], seed=rank // 2)


def check_against_dense(group: dist.ProcessGroup, seed: int = 0) -> None:
    rows = ROWS * group.size()
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(9))
    # Padding: none, some, a whole rank and more.
    for vocab_size in (None, rows - 3, rows - ROWS, rows - ROWS - 5, 5):
        for options in (
            {},
            {
                "temperature": 1.4,
                "student_logit_scale": 1.3,
                "student_softcap": 5.0,
                "teacher_bias": bias,
            },
        ):
            for name, beta in SIX:
                kind = {"divergence": name, "beta": beta, "vocab_size": vocab_size}
                case = make_case(23, 6, 9, rows, distance=3.0, seed=seed, **kind, **options)
                assert_as_good_as_dense(sharded(case, group), case)
                assert_as_good_as_dense(sharded(case, group, workspace_bytes=CHUNKED), case)
                case = case.to(torch.float64)
                for actual, oracle in zip(
                    sharded(case, group, workspace_bytes=CHUNKED), dense(case), strict=True
                ):
                    assert relative_error(actual, oracle) < 1e-12


def check_real_vocabulary(group: dist.ProcessGroup) -> None:
    """151936 columns in the 152576 rows that Megatron pads to at tp 8; the second time the last
    rank has none.
    """
    for vocab_size in (151936, 7 * 19072 - 5):
        case = make_case(5, 4, 6, 152576, distance=2.0, masked=1, vocab_size=vocab_size)
        # What is left is the rounding of the products, which is the processor's: 1e-6 on Intel's,
        # 5e-6 on an AMD EPYC.
        assert_as_good_as_dense(sharded(case, group), case, 1e-5)


def check_shards_of_different_scale(group: dist.ProcessGroup) -> None:
    """Row maxima that differ between ranks by more than float32 can exponentiate, in either model,
    either way.
    """
    for seed, (student_offset, teacher_offset) in enumerate(
        [(0, 200), (200, 0), (200, 200), (150, -150), (1e4, 1e4)]
    ):
        case = make_case(11, 5, 8, ROWS * group.size(), seed=seed)
        offsets = torch.zeros(case.student_weight_VD.shape[0])
        offsets[seed % group.size() * ROWS :][:ROWS] = 1
        case.student_hidden_TD[:, 0] = case.teacher_hidden_TE[:, 0] = 1
        case.student_weight_VD[:, 0] += offsets * student_offset
        case.teacher_weight_VE[:, 0] += offsets * teacher_offset
        case = case.to(torch.float64)
        for actual, oracle in zip(sharded(case, group), dense(case), strict=True):
            assert relative_error(actual, oracle) < 1e-10
        assert_as_good_as_dense(sharded(case.to(torch.float32), group), case.to(torch.float32))


def check_nothing_to_do(group: dist.ProcessGroup) -> None:
    for num_tokens in (0, 4):
        case = make_case(
            num_tokens, masked=num_tokens, vocab_rows=ROWS * group.size(), vocab_size=ROWS
        )
        assert all(not tensor.any() for tensor in sharded(case, group))


def check_number_of_collectives(group: dist.ProcessGroup) -> None:
    """One all-gather for each chunk, two where a centre is needed, and one for each call, which
    takes the log-probs of labels along; no bytes per vocabulary.
    """
    case = make_case(19, vocab_rows=ROWS * group.size(), masked=0)
    for name, beta in SIX:
        per_chunk = 1 if name in ("reverse_kl", "forward_kl") else 2
        for workspace_bytes, num_chunks in ((1, 19), (None, 1)):
            with counted_all_gathers() as calls:
                sharded(case, group, workspace_bytes=workspace_bytes, divergence=name, beta=beta)
            assert len(calls) == per_chunk * num_chunks + 1
            assert sum(calls) == 4 * (9 + (per_chunk - 1) + 2) * 19


def check_collectives_travel_behind_products(group: dist.ProcessGroup) -> None:
    """Between the start of a chunk's collective and the wait for it stands a product of the next
    chunk.
    """
    events: list[str] = []
    all_gather, wait, mm = chunks.TensorParallel.all_gather, chunks.Gathered.wait, torch.mm

    def record(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def recording(*arguments: Any, **keywords: Any) -> Any:
            events.append(name)
            return function(*arguments, **keywords)

        return recording

    case = make_case(100, vocab_rows=ROWS * group.size(), masked=0)
    for name, beta in SIX:
        events.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunks.TensorParallel, "all_gather", record("start", all_gather))
            patch.setattr(chunks.Gathered, "wait", record("wait", wait))
            patch.setattr(torch, "mm", record("product", mm))
            sharded(case, group, workspace_bytes=CHUNKED, divergence=name, beta=beta)
        starts = [i for i, event in enumerate(events) if event == "start"]
        last_wait = max(i for i, event in enumerate(events) if event == "wait")
        # The last chunk has no successor.
        steady = starts[: -3 if name in ("reverse_kl", "forward_kl") else -4]
        assert len(steady) >= 3
        for start in steady:
            assert events[start + 1 : start + 3].count("product") >= 1, (name, events)
        assert events[last_wait - 1] == "start", (
            "only the value of the whole call is waited for at once"
        )


@contextmanager
def counted_all_gathers() -> Iterator[list[int]]:
    """Bytes sent by each all_gather_single of this rank."""
    original, calls = dist.all_gather_single, []

    def counting(output: Tensor, local: Tensor, **keywords: Any) -> Any:
        calls.append(local.nbytes)
        return original(output, local, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_single", counting)
        yield calls


def check_refusal_is_collective(group: dist.ProcessGroup) -> None:
    """A token that only one rank sees to be excluded is refused on all, with one message, and
    nobody hangs.
    """
    rows = ROWS * group.size()
    bias = torch.zeros(rows)
    bias[rows - 1] = -math.inf
    case = make_case(9, vocab_rows=rows, masked=2, teacher_bias=bias)
    message = ""
    try:  # pytest.raises would keep the traceback, and with it the group, in a reference cycle
        sharded(case, group, workspace_bytes=CHUNKED)
    except ValueError as refusal:
        message = str(refusal)
    assert "in 7 of 7 tokens" in message
    messages: list[str] = [""] * group.size()
    dist.all_gather_object(messages, message, group=group)
    assert len(set(messages)) == 1
    case.options["vocab_size"] = rows - 1
    case.label_T.clamp_(max=rows - 2)
    assert sharded(case, group).loss.isfinite()


def check_accumulator(group: dist.ProcessGroup) -> None:
    """Each rank's rows of the weight gradient arrive in its accumulator, whatever part of its shard
    is padding.
    """
    for vocab_size in (None, ROWS * group.size() - ROWS):
        case = make_case(19, vocab_rows=ROWS * group.size(), vocab_size=vocab_size)
        main_grad = torch.zeros(ROWS, case.student_weight_VD.shape[1])
        answer = sharded(case, group, workspace_bytes=CHUNKED, weight_grad_accumulator=main_grad)
        assert not answer.weight_grad.any()
        whole = torch.cat(gather(main_grad, group))
        assert_as_good_as_dense(answer._replace(weight_grad=whole), case)


def check_statistics(group: dist.ProcessGroup) -> None:
    """Over ranks as on one; also where the likeliest tokens are more than a rank has columns."""
    for vocab_size in (None, ROWS * group.size() - ROWS - 3):
        case = make_case(19, vocab_rows=ROWS * group.size(), vocab_size=vocab_size)
        student = output_logits(case.student_hidden_TD, case.student_weight_VD)
        teacher = output_logits(case.teacher_hidden_TE, case.teacher_weight_VE)
        whole = distribution_statistics(student, teacher, vocab_size=vocab_size, k=8)
        columns = slice(group.rank() * ROWS, (group.rank() + 1) * ROWS)
        shards = (student[:, columns], teacher[:, columns])
        actual = distribution_statistics(*shards, vocab_size=vocab_size, k=8, tp_group=group)
        for value, expected in zip(actual, whole, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
            copies = gather(value, group)
            assert all(torch.equal(copy, copies[0]) for copy in copies)


def check_labels_alone(group: dist.ProcessGroup) -> None:
    """Over ranks as on one; also where the last rank has padding alone."""
    for vocab_size in (None, ROWS * group.size() - ROWS - 3):
        case = make_case(19, vocab_rows=ROWS * group.size(), vocab_size=vocab_size)
        weight_VD, hidden_TD = case.student_weight_VD, case.student_hidden_TD
        whole = label_log_probs(hidden_TD, weight_VD, case.label_T, vocab_size=vocab_size)
        weight_vD = weight_VD[group.rank() * ROWS : (group.rank() + 1) * ROWS]
        found = label_log_probs(
            hidden_TD, weight_vD, case.label_T, vocab_size=vocab_size, tp_group=group
        )
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(copy, found) for copy in gather(found, group))


def sharded(case: Case, group: dist.ProcessGroup, **options: Any) -> Answer:
    """The answer of all ranks together; checks that outputs agree bit for bit."""
    num_rows = len(case.student_weight_VD) // group.size()
    rows = slice(group.rank() * num_rows, (group.rank() + 1) * num_rows)
    weights = (case.student_weight_VD[rows], case.teacher_weight_VE[rows])
    hidden = (case.student_hidden_TD, case.teacher_hidden_TE)
    per_token = (case.token_weight_T, case.label_T)
    shard = Case(hidden[0], weights[0], hidden[1], weights[1], *per_token, dict(case.options))
    if "teacher_bias" in shard.options:
        shard.options["teacher_bias"] = shard.options["teacher_bias"][rows]
    hidden, weight = shard.leaves()
    out = shard.call(hidden, weight, tp_group=group, **options)
    out.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    for tensor in (out.loss.detach().reshape(1), out.per_token, out.entropy, out.label_log_prob):
        copies = list(gather(tensor, group))
        assert all(torch.equal(copy, copies[0]) for copy in copies)
    dist.all_reduce(hidden.grad, group=group)  # the caller's mapping, not the function's business
    weight_grad_VD = torch.cat(gather(weight.grad, group))
    values = (out.loss.detach(), out.per_token, out.entropy, out.label_log_prob)
    return Answer(*values, hidden.grad, weight_grad_VD)


def gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if tensor.numel() == 0:
        return [tensor]
    copies = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(copies, tensor.contiguous(), group=group)
    return copies
