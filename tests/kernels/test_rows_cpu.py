"""The compiled row kernels: vectors, threads, instruction sets, and what happens without a compiler."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from row_cases import (
    DIVERGENCES,
    assert_close,
    check_extremes,
    check_levels,
    check_transforms,
    logits_like_a_model,
    oracle,
    problem,
    relative_error,
    run,
)

from mtopd.kernels import rows, rows_cpu


@pytest.mark.parametrize(("vocab_size", "shard_rows"), [(151936, 19072), (129280, 16256)])
def test_a_whole_vocabulary_over_eight_ranks(vocab_size: int, shard_rows: int) -> None:
    """Megatron's padding for tp 8, 152576 and 130048 rows: the last rank is not full."""
    student_CV, teacher_CV = logits_like_a_model(2, vocab_size, 0.1, seed=2)
    cuts = tuple(shard_rows * rank for rank in range(1, 8))
    for name, beta in DIVERGENCES:
        actual = run(rows_cpu.KERNELS, problem(name, beta), student_CV, teacher_CV, cuts=cuts)
        assert_close(actual, oracle(name, beta, student_CV, teacher_CV), name)


@pytest.mark.parametrize("kind", rows.Kind, ids=lambda kind: kind.name)
def test_the_compiled_merge_is_the_plain_one(kind: rows.Kind) -> None:
    """Also of ranks without columns, or whose columns one side or both exclude, and NaN stays NaN."""
    generator = torch.Generator().manual_seed(3)
    row_problem = rows.RowProblem(
        kind=kind, temperature=1.3, student=rows.LogitTransform(scale=0.7)
    )
    parts = []
    for rank in range(5):
        student_Cv = torch.randn(40, 33, generator=generator) * 4
        teacher_Cv = student_Cv + torch.randn(40, 33, generator=generator) * 0.1
        teacher_Cv[3, 4 : 4 + rank] = -math.inf
        for row, excluded in (
            (5 + rank, student_Cv),
            (6 + rank, teacher_Cv),
            (30, student_Cv),
            (31, teacher_Cv),
        ):
            excluded[row] = -math.inf if row < 30 or rank != 2 else excluded[row]
        parts.append(rows_cpu.KERNELS.statistics(row_problem, student_Cv, teacher_Cv))
    statistics_R9C = torch.stack([*parts, rows.no_columns(40, student_Cv)])
    weight_C = torch.rand(40, generator=generator)
    found, expected = (
        merge(row_problem, statistics_R9C, weight_C)
        for merge in (rows_cpu.KERNELS.merge, rows.merge)
    )
    assert bool((expected[rows.Row.EXCLUDED_MASS] > 0).any()) and bool(
        expected[:, :30].isfinite().all()
    )
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)
    for name in (rows.Statistic.STUDENT_MAX, rows.Statistic.TEACHER_SUM):
        damaged = statistics_R9C.clone()
        damaged[1, name, 0] = math.nan
        value_C = rows_cpu.KERNELS.merge(row_problem, damaged, weight_C)
        assert value_C[:, 0].isnan().any() and torch.equal(value_C[:, 1:], found[:, 1:])


@pytest.mark.parametrize("num_columns", [1, 2, 15, 16, 17, 1023, 1024, 1025, 2047])
def test_every_way_to_fill_vectors_and_blocks(num_columns: int) -> None:
    generator = torch.Generator().manual_seed(num_columns)
    student_CV = torch.randn(3, num_columns, generator=generator) * 3
    teacher_CV = student_CV + torch.randn(3, num_columns, generator=generator)
    for name, beta in DIVERGENCES:
        actual = run(rows_cpu.KERNELS, problem(name, beta), student_CV, teacher_CV)
        expected = oracle(name, beta, student_CV, teacher_CV)
        if num_columns == 1:
            assert not actual.value_C.any() and not actual.gradient_CV.any()
        else:
            assert relative_error(actual.gradient_CV, expected.gradient_CV) <= 1e-5
            assert relative_error(actual.value_C, expected.value_C) <= 5e-5


def test_threads_do_not_matter() -> None:
    student_CV, teacher_CV = logits_like_a_model(33, 4000, 1.0)
    answers = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        answers.append(run(rows_cpu.KERNELS, problem("jsd", 0.3), student_CV, teacher_CV))
    for answer in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answer, answers[0], strict=True))


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_other_instruction_sets(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same source for narrower vectors; each set has a library of its own in the cache."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    kernels = rows_cpu.CpuRows(rows_cpu._library())
    for check in (check_levels, check_extremes, check_transforms):
        check(kernels, "cpu")


def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path
) -> None:
    """Plain torch with one warning that says why; asking for the compiled kernels by name is
    refused.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delitem(__import__("sys").modules, "mtopd.kernels.rows_cpu")
    rows.select_row_kernels.cache_clear()
    for _ in range(3):
        assert rows.select_row_kernels("auto", "cpu", torch.float32).NAME == "torch"
    (message,) = (
        record.getMessage() for record in caplog.records if record.name == "mtopd.kernels.rows"
    )
    assert "plain torch, which is slow, because the CPU row kernels cannot be compiled (" in message
    assert "no-such-compiler: not found" in message
    with pytest.raises(ValueError, match="a C\\+\\+ compiler and ninja are needed"):
        rows.select_row_kernels("cpu", "cpu", torch.float32)
    assert not list((tmp_path / "mtopd").glob("*.so"))
    rows.select_row_kernels.cache_clear()


@pytest.mark.parametrize("found", [None, b"", b"half a library"], ids=["missing", "empty", "half"])
def test_a_missing_or_damaged_library_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: bytes | None
) -> None:
    """A power loss may leave one; every later run would take the slow path."""
    whole = Path(rows_cpu._library()._name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    builds: list[str] = []

    def compiled(flags: list[str], build_dir: str) -> Path:
        builds.append(build_dir)
        return Path(shutil.copy(whole, build_dir))

    monkeypatch.setattr(rows_cpu, "_compile", compiled)
    if found is not None:
        (tmp_path / "mtopd").mkdir()
        (tmp_path / "mtopd" / whole.name).write_bytes(found)
    for _ in range(2):
        assert Path(rows_cpu._library()._name) == tmp_path / "mtopd" / whole.name
    assert len(builds) == 1
    assert (tmp_path / "mtopd" / whole.name).read_bytes() == whole.read_bytes()
