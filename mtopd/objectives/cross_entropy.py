"""Next-token cross entropy for supervised training, vocabulary split over tp, padding excluded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mtopd.step_sums import LocalSums, StepSums

# ([S, B, v] logits of this rank's rows, [S, B] labels) -> [S, B] negative log-likelihoods in nats
VocabParallelCrossEntropy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class CrossEntropy:
    """The objective sum over rows of token_weight x -log p(label).

    ``micro_batch.payload`` holds the labels [T].  One object for one train step.
    """

    def __init__(
        self, *, vocab_size: int, tp_rank: int, cross_entropy: VocabParallelCrossEntropy
    ) -> None:
        self._vocab_size = vocab_size
        self._tp_rank = tp_rank
        self._cross_entropy = cross_entropy
        self._loss = torch.zeros((), dtype=torch.float64)
        self._num_tokens = torch.zeros((), dtype=torch.float64)

    def __call__(
        self, student_hidden_TD: torch.Tensor, output_weight_vD: torch.Tensor, micro_batch: Any
    ) -> torch.Tensor:
        num_rows = output_weight_vD.shape[0]
        num_valid = min(max(self._vocab_size - self._tp_rank * num_rows, 0), num_rows)
        logits_Tv = torch.nn.functional.linear(student_hidden_TD, output_weight_vD).float()
        # Padding gets the most negative finite number: Megatron's max and exp then leave these
        # columns out exactly.
        if num_valid < num_rows:
            is_padding_v = torch.zeros(num_rows, dtype=torch.bool, device=logits_Tv.device)
            is_padding_v[num_valid:] = True
            logits_Tv = logits_Tv.masked_fill(is_padding_v, torch.finfo(torch.float32).min)
        # A leading axis: Megatron's function takes [S, B, v].
        nll_T = self._cross_entropy(logits_Tv[:, None].clone(), micro_batch.payload[:, None])[:, 0]
        loss = (nll_T * micro_batch.token_weight_T).sum()
        self._loss = self._loss + loss.detach().double()
        self._num_tokens = self._num_tokens + len(nll_T)
        return loss

    def finish(self) -> LocalSums:
        return LocalSums({"loss": self._loss, "tokens": self._num_tokens})

    @staticmethod
    def loss(sums: StepSums) -> float:
        """The mini-batch's loss."""
        return sums.values["loss"]
