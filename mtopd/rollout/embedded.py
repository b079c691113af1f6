"""The embedded rollout engine: a transformers model in this process, KV cache, our own sampling
loop.

What is promised: a batch is the unit of replay.  Its members, their order, padding and compaction
follow from the requests and the sampled tokens alone; the draw of a token is a function of (seed,
iteration, prompt, sample, position).  The same weights and the same batch give the same tokens on
the same hardware.  Ids >= vocab_size are never sampled.  Of generation_config files only the end
tokens are read: sampling is the student's own distribution at temperature 1, but for evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from mtopd.hf_checkpoint import stored_names, stored_pieces
from mtopd.rollout.ending import Ending
from mtopd.rollout.engine import UNFILTERED, Request, Response, Sampling
from mtopd.rollout.philox import uniform
from mtopd.types import MtopdError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_COMPACT_BELOW = 0.7  # drop finished rows once fewer than this share of a batch still runs


class EmbeddedEngine:
    """Holds one HF model; ``update_weights`` replaces its weights, ``generate`` answers one batch."""

    def __init__(
        self,
        hf_config: PretrainedConfig,
        *,
        dtype: torch.dtype,
        vocab_size: int,
        ending: Ending,
        pad_id: int,
        device: torch.device,
    ) -> None:
        self._model = empty_model(hf_config, dtype, device)
        for name, tensor in [*self._model.named_parameters(), *self._model.named_buffers()]:
            if any(part in name for part in self._model._keep_in_fp32_modules_strict or ()):
                # As from_pretrained keeps it: a rounded router bias chooses other experts.
                tensor.data = tensor.data.float()
        self._model.eval().requires_grad_(False)
        tied = {"lm_head.weight"} if hf_config.tie_word_embeddings else set()
        self._stored = {
            name: stored_names(self._model, name, tensor)
            for name, tensor in self._model.state_dict().items()
            if name not in tied
        }
        self._vocab_size = vocab_size
        self._ending = ending
        self._pad_id = pad_id
        self._device = device

    def update_weights(self, buckets: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Take HF-named tensors, bucket by bucket; a tied output layer may be left out, nothing else
        may, and nothing may come twice.  Raises MtopdError after the last bucket (giving buckets is
        collective) for weights of another model; the engine then holds a mixture.
        """
        pieces = {
            stored: piece
            for name, tensor in self._model.state_dict().items()
            if name in self._stored
            for stored, piece in stored_pieces(tensor, self._stored[name]).items()
        }
        ignored = {"lm_head.weight"} if self._model.config.tie_word_embeddings else set()
        taken: set[str] = set()
        wrong: dict[str, str] = {}  # the first of each kind
        for bucket in buckets:
            for name, tensor in bucket.items():
                if name in ignored:
                    continue
                if name in taken:
                    wrong.setdefault("twice", f"hold {name!r} twice")
                elif name not in pieces:
                    wrong.setdefault("beyond", f"have, beyond those of the model, {name!r}")
                elif tensor.shape != pieces[name].shape:
                    shapes = f"{tuple(tensor.shape)}, the model's is {tuple(pieces[name].shape)}"
                    wrong.setdefault("shape", f"have {name!r} in shape {shapes}")
                else:
                    pieces[name].copy_(tensor)
                taken.add(name)
        if lacking := pieces.keys() - taken:
            wrong["lack"] = f"lack {min(lacking)!r}"
        if wrong:
            raise MtopdError(
                f"the weights {'; '.join(wrong.values())}: they are not of this config.json"
            )

    @torch.no_grad()
    def generate(
        self,
        batch: Sequence[Request],
        *,
        max_response: int,
        seed: int = 0,
        iteration: int = 0,
        sampling: Sampling = UNFILTERED,
    ) -> list[Response]:
        """Answer a batch: the argmax where the temperature is 0, else by inverse CDF."""
        from transformers import DynamicCache

        ids_BS, mask_BS = self._left_pad([r.prompt_ids for r in batch])
        prompt_B = np.array([r.prompt_number for r in batch], np.uint64)
        sample_B = np.array([r.sample for r in batch], np.uint64)
        tokens: list[list[int]] = [[] for _ in batch]
        log_probs: list[list[float]] = [[] for _ in batch]
        is_over = [False] * len(batch)
        row_A = np.arange(len(batch))  # rows of the batch that the cache still holds
        cache = DynamicCache(config=self._model.config)
        position_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
        for position in range(max_response):
            output = self._model(
                input_ids=ids_BS,
                attention_mask=mask_BS,
                position_ids=position_BS,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            log_p_AV = torch.log_softmax(output.logits[:, -1, : self._vocab_size].double(), -1)
            if sampling.temperature == 0:
                token_A = log_p_AV.argmax(-1)
            else:
                u_A = uniform(seed, iteration, prompt_B[row_A], sample_B[row_A], position)
                # On the host: of floats CUDA has no deterministic cumsum.
                drawn_from_AV = filtered(log_p_AV.cpu(), sampling)
                token_A = inverse_cdf(drawn_from_AV, torch.from_numpy(u_A)).to(self._device)
            chosen_A = log_p_AV.gather(-1, token_A[:, None])[:, 0].tolist()
            for row, log_prob in zip(row_A, chosen_A, strict=True):
                if not math.isfinite(log_prob):
                    raise _diverged(batch[int(row)].prompt_id, position)
            running = np.zeros(len(row_A), bool)
            for i, (row, token, log_prob) in enumerate(
                zip(row_A, token_A.tolist(), chosen_A, strict=True)
            ):
                if is_over[row]:  # kept until compaction
                    continue
                tokens[row].append(token)
                log_probs[row].append(log_prob)
                is_over[row] = self._ending.is_over(tokens[row])
                running[i] = not is_over[row]
            if not running.any():
                break
            ids_BS = token_A[:, None]
            position_BS = position_BS[:, -1:] + 1
            mask_BS = torch.nn.functional.pad(mask_BS, (0, 1), value=1)
            # A finished row costs as much as a running one; dropping it copies the whole cache.
            if running.mean() < _COMPACT_BELOW:
                keep = torch.from_numpy(np.flatnonzero(running)).to(self._device)
                ids_BS = ids_BS[keep]
                position_BS = position_BS[keep]
                mask_BS = mask_BS[keep]
                cache.batch_select_indices(keep)
                row_A = row_A[running]
        return [
            Response(tuple(t), tuple(p), "stop" if over else "length")
            for t, p, over in zip(tokens, log_probs, is_over, strict=True)
        ]

    def _left_pad(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, prompts))
        ids_BS = torch.full((len(prompts), width), self._pad_id)
        mask_BS = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_BS[row, width - len(prompt) :] = torch.tensor(prompt)
            mask_BS[row, width - len(prompt) :] = 1
        return ids_BS.to(self._device), mask_BS.to(self._device)


def empty_model(
    hf_config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The causal model with whatever its memory holds: random weights would be drawn on the host, and
    copied.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation="sdpa")
    model.to_empty(device=device)
    model.tie_weights()
    computed = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    assert all(".rotary_emb." in name for name in computed), computed
    rotary = model.base_model.rotary_emb
    model.base_model.rotary_emb = type(rotary)(hf_config).to(device)
    return model


def _diverged(prompt_id: str, position: int) -> MtopdError:
    return MtopdError(
        f"log-probs of token {position} of an answer to {prompt_id} are not finite: weights of the "
        "model hold NaN or inf, or overflow; export it again, or, where it diverged in training, go "
        "on from an earlier checkpoint with a lower learning rate"
    )


def filtered(log_p_AV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """[A, V] log-probs at the temperature, -inf for tokens outside the nucleus; the same tensor for
    rollouts.  Of equal tokens the one with the lower id is the more likely.
    """
    if sampling.temperature != 1:
        log_p_AV = torch.log_softmax(log_p_AV / sampling.temperature, -1)
    if sampling.top_p < 1:
        ranked_AV, order_AV = log_p_AV.sort(stable=True, dim=-1, descending=True)
        p_AV = ranked_AV.exp()
        before_AV = p_AV.cumsum(-1) - p_AV  # of all tokens that are more likely
        outside_AV = torch.zeros_like(order_AV, dtype=torch.bool)
        # the most likely token stays, however small top_p is
        outside_AV[:, 1:] = before_AV[:, 1:] >= sampling.top_p
        outside_AV = torch.zeros_like(outside_AV).scatter(-1, order_AV, outside_AV)
        log_p_AV = log_p_AV.masked_fill(outside_AV, -torch.inf)
    return log_p_AV


def inverse_cdf(log_p_AV: torch.Tensor, u_A: torch.Tensor) -> torch.Tensor:
    """[A] token ids: the first whose cumulative probability exceeds u, in float64.  Never one of
    probability zero.
    """
    cdf_AV = log_p_AV.exp().cumsum(-1)
    # the sum is 1 up to rounding; scaling keeps u < 1 inside the table
    target_A = u_A * cdf_AV[:, -1]
    return torch.searchsorted(cdf_AV, target_A[:, None], right=True)[:, 0].clamp(
        max=cdf_AV.shape[-1] - 1
    )
