"""Next-token cross entropy for supervised training, vocabulary split over tp, padding excluded."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from mtopd.megatron.train_step import PackedMicroBatch


class CrossEntropy:
    """objective(...): sum over rows of token_weight x -log p(label).  ``micro_batch.payload`` holds
    the labels [T].
    """

    def __init__(self, *, vocab_size: int, tp_rank: int) -> None:
        self._vocab_size, self._tp_rank = vocab_size, tp_rank

    def __call__(
        self,
        student_hidden_TD: torch.Tensor,
        output_weight_vD: torch.Tensor,
        micro_batch: PackedMicroBatch,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rows = output_weight_vD.shape[0]
        valid = min(max(self._vocab_size - self._tp_rank * rows, 0), rows)
        logits_Tv = torch.nn.functional.linear(student_hidden_TD, output_weight_vD).float()
        if (
            valid < rows
            # the most negative finite number: Megatron's max and exp then leave these columns out
            # exactly
        ):
            padding = torch.zeros(rows, dtype=torch.bool, device=logits_Tv.device)
            padding[valid:] = True
            logits_Tv = logits_Tv.masked_fill(padding, torch.finfo(torch.float32).min)
        # A leading axis: Megatron's function takes [S, B, v].
        nll_T = vocab_parallel_cross_entropy(
            logits_Tv[:, None].clone(), micro_batch.payload[:, None]
        )[:, 0]
        loss = (nll_T * micro_batch.token_weight_T).sum()
        return loss, {
            "loss": loss.detach().double(),
            "tokens": torch.tensor(float(len(nll_T)), dtype=torch.float64),
        }
