"""Run by test_rows_triton under TRITON_INTERPRET=1: prints the name of each check that has passed."""

import warnings

import torch
from divergence_cases import assert_as_good_as_dense, fused, make_case
from row_cases import CHECKS, SIX

from mtopd.kernels.rows_triton import KERNELS

torch.set_num_threads(1)
# Numpy's, about the NaN and inf that the kernels mask.
warnings.simplefilter("ignore", RuntimeWarning)
for check in CHECKS:
    check(KERNELS, "cpu")
    print(check.__name__)
for name, beta in SIX:
    case = make_case(9, 6, 8, 301, divergence=name, beta=beta, vocab_size=290, backend="triton")
    assert_as_good_as_dense(fused(case, workspace_bytes=30_000), case)
print("whole")
