"""The row kernels in plain torch: float64 logits too."""

from row_cases import DIVERGENCES, logits_like_a_model, oracle, problem, relative_error, run

from mtopd.kernels import rows_torch


def test_float64_in_plain_torch() -> None:
    student_CV, teacher_CV = (z.double() for z in logits_like_a_model(4, 300, 0.3))
    for name, beta in DIVERGENCES:
        actual = run(rows_torch.KERNELS, problem(name, beta), student_CV, teacher_CV, cuts=(100,))
        expected = oracle(name, beta, student_CV, teacher_CV)
        assert relative_error(actual.gradient_CV, expected.gradient_CV) < 1e-12, name
        assert relative_error(actual.value_C, expected.value_C) < 1e-10, name
