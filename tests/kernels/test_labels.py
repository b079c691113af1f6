"""Log-probs of given tokens alone, against dense float64 and against what a divergence reads off."""

import math

import pytest
import torch
from divergence_cases import fused, make_case, relative_error

from mtopd.kernels import label_log_probs
from mtopd.kernels.chunks import CHUNK_ROWS


@pytest.mark.parametrize("vocab_size", [None, 990])
@pytest.mark.parametrize("num_tokens", [1, CHUNK_ROWS["cpu"], CHUNK_ROWS["cpu"] + 1])
def test_they_are_those_of_the_divergence(num_tokens: int, vocab_size: int | None) -> None:
    case = make_case(num_tokens, masked=0, vocab_size=vocab_size)
    case.student_weight_VD[990:] += 0 if vocab_size is None else math.nan  # padding
    tensors = (case.student_hidden_TD, case.student_weight_VD, case.label_T)
    found = label_log_probs(*tensors, vocab_size=vocab_size)
    logits = case.student_hidden_TD.double() @ case.student_weight_VD.double().T
    oracle = logits[:, :vocab_size].log_softmax(1).gather(1, case.label_T[:, None])[:, 0]
    assert found.dtype == torch.float32 and relative_error(found, oracle) < 1e-6
    assert relative_error(fused(case).label_log_prob, oracle) < 1e-6
    shifted = label_log_probs(tensors[0].roll(1, 0), *tensors[1:], vocab_size=vocab_size)
    assert num_tokens == 1 or relative_error(shifted, oracle) > 0.1


def test_no_tokens() -> None:
    case = make_case(0, masked=0)
    tensors = (case.student_hidden_TD, case.student_weight_VD, case.label_T)
    assert label_log_probs(*tensors).shape == (0,)


def test_refusals() -> None:
    case = make_case()
    tensors = (case.student_hidden_TD, case.student_weight_VD)
    with pytest.raises(ValueError, match="0 to 99 is the vocabulary"):
        label_log_probs(*tensors, case.label_T, vocab_size=100)
    with pytest.raises(ValueError, match="vocab_size is 1004"):
        label_log_probs(*tensors, case.label_T, vocab_size=1004)
