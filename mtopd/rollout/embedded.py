"""The embedded rollout engine: a transformers model in this process, KV cache, our own sampling
loop.

What is promised: a batch is the unit of replay.  Its members, their order, padding and compaction
follow from the requests and the sampled tokens alone; the draw of a token is a function of (seed,
iteration, prompt, sample, position).  The same weights and the same batch give the same tokens on
the same hardware, on whichever rank.  A batch that a kill has cut off goes on from its log: what is
logged is read through the model step by step as it was sampled, not drawn again and not read in one
piece, whose last bits differ; so the rest is, to the bit, what an undisturbed batch has.  Ids >=
vocab_size are never sampled.  Of generation_config files only the end tokens are read: sampling is
the student's own distribution at temperature 1, but for evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from mtopd.hf_checkpoint import stored_names, stored_pieces
from mtopd.metrics_lines import WeightUpdateLine
from mtopd.rollout.ending import Ending
from mtopd.rollout.engine import Follow, Request, Sampling, student_version
from mtopd.rollout.memory_log import Held, MemoryLog, Response
from mtopd.rollout.philox import uniform
from mtopd.types import MtopdError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_COMPACT_BELOW = 0.7  # drop finished rows once fewer than this share of a batch still runs
_WINDOW = 8  # tokens of each response between two words to the log


class EmbeddedEngine:
    """One HF model on each rank, which answers whole batches: whichever rank is free takes the next.

    The model is built when weights first come.  ``deal(name, k)`` gives the next number that no rank
    has had, in the k-th call for this piece of work; one beyond all batches where a rank has failed.
    """

    kind = "embedded"
    answers_elsewhere = False

    def __init__(
        self,
        hf_config: PretrainedConfig,
        *,
        dtype: torch.dtype,
        vocab_size: int,
        ending: Ending,
        pad_id: int,
        device: torch.device,
        batch_size: int,
        deal: Callable[[str, int], int],
    ) -> None:
        self.version: str | None = None
        self.update: WeightUpdateLine | None = None
        self._hf_config = hf_config
        self._dtype = dtype
        self._vocab_size = vocab_size
        self._ending = ending
        self._pad_id = pad_id
        self._device = device
        self._batch_size = batch_size
        self._deal = deal
        self._model: Any = None  # until weights come
        self._stored: dict[str, list[str]] = {}  # tensor of the model -> its names in a checkpoint
        self._sizes: dict[str, int] = {}  # bytes of what was released, by tensor of the model
        self._is_paused = False

    # -- weights -----------------------------------------------------------------------------------
    def taker(self, bucket: int) -> None:
        """Every rank has a model, and needs every bucket."""

    def update_weights(self, buckets: Iterable[Mapping[str, torch.Tensor]], version: str) -> None:
        """Take HF-named tensors, bucket by bucket; a tied output layer may be left out, nothing else
        may, and nothing may come twice.  Raises MtopdError after the last bucket (giving buckets is
        collective) for weights of another model; the engine then has none.
        """
        self.version = None
        if self._model is None:
            self._build()
        self._take_memory()
        pieces = {
            stored: piece
            for name, tensor in self._model.state_dict().items()
            if name in self._stored
            for stored, piece in stored_pieces(tensor, self._stored[name]).items()
        }
        ignored = {"lm_head.weight"} if self._hf_config.tie_word_embeddings else set()
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
        self.version = version

    def _build(self) -> None:
        model = empty_model(self._hf_config, self._dtype, self._device)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if any(part in name for part in model._keep_in_fp32_modules_strict or ()):
                # As from_pretrained keeps it: a rounded router bias chooses other experts.
                tensor.data = tensor.data.float()
        model.eval().requires_grad_(False)
        tied = {"lm_head.weight"} if self._hf_config.tie_word_embeddings else set()
        self._stored = {
            name: stored_names(model, name, tensor)
            for name, tensor in model.state_dict().items()
            if name not in tied
        }
        self._model = model

    def release(self) -> None:
        """Weights go, the modules stay: building them draws random weights first."""
        self.version = None
        if self._model is None or self._sizes:
            return
        for name, tensor in self._model.state_dict().items():
            if name in self._stored:
                self._sizes[name] = tensor.untyped_storage().nbytes()
                tensor.untyped_storage().resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _take_memory(self) -> None:
        if self._sizes:
            for name, tensor in self._model.state_dict().items():
                if name in self._sizes:
                    tensor.untyped_storage().resize_(self._sizes[name])
            self._sizes = {}

    def pause(self) -> None:
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False

    def close(self) -> None:
        self.version, self._model, self._sizes = None, None, {}

    # -- answers -----------------------------------------------------------------------------------
    def generate(
        self,
        requests: Sequence[Request],
        log: MemoryLog,
        sampling: Sampling,
        follow: Follow | None = None,
    ) -> Iterator[Response]:
        """Answer batches of neighbours: the argmax where the temperature is 0, else by inverse CDF.
        What follows from a batch is a batch, so that its members, too, are the same after a kill.
        """
        assert self.version is not None, "weights come first"
        call, size = log.num_calls, self._batch_size
        log.num_calls += 1
        num_batches = -(-len(requests) // size)
        while not self._is_paused and (number := self._deal(log.name, call)) < num_batches:
            batch = requests[number * size : (number + 1) * size]
            while batch:
                yield from self._answer(batch, log, sampling)
                batch = follow(batch) if follow is not None and not self._is_paused else ()

    def _answer(
        self, batch: Sequence[Request], log: MemoryLog, sampling: Sampling
    ) -> Iterator[Response]:
        """Answer one batch, from what the log holds of it."""
        assert self.version is not None
        held = log.begin(batch)
        yield from log.take()
        if all(h.finish_reason is not None for h in held):
            return
        rows = _Rows(batch, held, sampling, self._ending, student_version(self.version))
        for position in self._positions(rows):
            if (position + 1) % _WINDOW == 0 and not rows.are_over:
                rows.tell(log)
                yield from log.take()
            if self._is_paused:
                rows.tell(log)
                return
        rows.tell(log)
        log.flush()  # none of this rank's responses runs
        yield from log.take()

    @torch.no_grad()
    def _positions(self, rows: _Rows) -> Iterator[int]:
        """Give every row of a batch its next token, position by position."""
        from transformers import DynamicCache

        ids_BS, mask_BS = self._left_pad([r.prompt_ids for r in rows.batch])
        row_A = np.arange(len(rows.batch))  # rows of the batch that the cache still holds
        cache = DynamicCache(config=self._model.config)
        position_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
        for position in range(rows.width):
            output = self._model(
                input_ids=ids_BS,
                attention_mask=mask_BS,
                position_ids=position_BS,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            if rows.are_logged(row_A, position):
                token_A = rows.logged(row_A, position, self._pad_id)
            else:
                drawn_A, log_prob_A = self._draw(output.logits[:, -1], rows, row_A, position)
                token_A = rows.take(row_A, position, drawn_A, log_prob_A, self._pad_id)
            running = rows.end(row_A, position)
            yield position
            if not running.any():
                return
            ids_BS = torch.from_numpy(token_A)[:, None].to(self._device)
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

    def _draw(
        self, logits_AV: torch.Tensor, rows: _Rows, row_A: npt.NDArray[np.intp], position: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """A token of each row, and its log-prob under the model's own distribution."""
        sampling = rows.sampling
        log_p_AV = torch.log_softmax(logits_AV[:, : self._vocab_size].double(), -1)
        if sampling.temperature == 0:
            token_A = log_p_AV.argmax(-1)
        else:
            prompt_A, sample_A = rows.prompt_B[row_A], rows.sample_B[row_A]
            place_A = rows.first_B[row_A] + position
            u_A = uniform(sampling.seed, rows.iteration_B[row_A], prompt_A, sample_A, place_A)
            # On the host: of floats CUDA has no deterministic cumsum.
            drawn_from_AV = filtered(log_p_AV.cpu(), sampling)
            token_A = inverse_cdf(drawn_from_AV, torch.from_numpy(u_A)).to(self._device)
        log_prob_A = log_p_AV.gather(-1, token_A[:, None])[:, 0]
        return token_A.cpu().numpy(), log_prob_A.cpu().numpy()

    def _left_pad(self, prompts: Sequence[npt.ArrayLike]) -> tuple[torch.Tensor, torch.Tensor]:
        arrays = [np.asarray(prompt, np.int64) for prompt in prompts]
        width = max(map(len, arrays))
        ids_BS = torch.full((len(arrays), width), self._pad_id)
        mask_BS = torch.zeros(len(arrays), width, dtype=torch.long)
        for row, prompt in enumerate(arrays):
            ids_BS[row, width - len(prompt) :] = torch.from_numpy(prompt)
            mask_BS[row, width - len(prompt) :] = 1
        return ids_BS.to(self._device), mask_BS.to(self._device)


class _Rows:
    """The responses of a batch: what the log had of each, and what was drawn behind it.  A position
    counts from where the request's ids end.
    """

    def __init__(
        self,
        batch: Sequence[Request],
        held: Sequence[Held],
        sampling: Sampling,
        ending: Ending,
        version: int,
    ) -> None:
        count = len(batch)
        self.batch = batch
        self.sampling = sampling
        self.prompt_B = np.array([r.prompt_number for r in batch], np.uint64)
        self.sample_B = np.array([r.sample for r in batch], np.uint64)
        self.iteration_B = np.array([r.iteration for r in batch], np.uint64)
        self.first_B = np.array([r.position for r in batch])  # of position 0 in the whole response
        self._budget_B = np.array([sampling.budget(r) for r in batch])
        self.width = int(self._budget_B.max())
        self._ending = ending
        self._version = version
        self._tokens_BS = np.zeros((count, self.width), np.int32)
        self._log_probs_BS = np.zeros((count, self.width), np.float32)
        self._logged_B = np.array([len(h.response_ids) for h in held])  # tokens before this start
        self._was_over_B = np.array([h.finish_reason is not None for h in held])
        self._length_B = np.zeros(count, np.int64)  # tokens so far, logged or drawn
        self._told_B = self._logged_B.copy()  # tokens that the log has
        self._is_over_B = np.zeros(count, bool)
        self._has_stopped_B = np.zeros(count, bool)
        self._is_told_B = self._was_over_B.copy()  # the log knows that it is over
        for row, h in enumerate(held):
            self._tokens_BS[row, : len(h.response_ids)] = h.response_ids
            self._log_probs_BS[row, : len(h.response_ids)] = h.log_probs

    @property
    def are_over(self) -> bool:
        return bool(self._is_over_B.all())

    def are_logged(self, row_A: npt.NDArray[np.intp], position: int) -> bool:
        """Whether no row needs a draw."""
        return bool((self._is_over_B[row_A] | (position < self._logged_B[row_A])).all())

    def logged(
        self, row_A: npt.NDArray[np.intp], position: int, pad_id: int
    ) -> npt.NDArray[np.int64]:
        """[A] what the model reads next: the logged tokens."""
        token_A = self._tokens_BS[row_A, position].astype(np.int64)
        return np.where(self._is_over_B[row_A], pad_id, token_A)

    def take(
        self,
        row_A: npt.NDArray[np.intp],
        position: int,
        drawn_A: npt.NDArray[np.int64],
        log_prob_A: npt.NDArray[np.float64],
        pad_id: int,
    ) -> npt.NDArray[np.int64]:
        """Keep what was drawn for rows that lack it; [A] what the model reads next: of rows that are
        over padding, whatever was drawn.
        """
        is_new_A = ~self._is_over_B[row_A] & (position >= self._logged_B[row_A])
        if not np.isfinite(log_prob_A[is_new_A]).all():
            wrong = row_A[is_new_A][~np.isfinite(log_prob_A[is_new_A])][0]
            raise _diverged(self.batch[int(wrong)].prompt_id, position)
        new = row_A[is_new_A]
        self._tokens_BS[new, position] = drawn_A[is_new_A]
        self._log_probs_BS[new, position] = log_prob_A[is_new_A]
        return self.logged(row_A, position, pad_id)

    def end(self, row_A: npt.NDArray[np.intp], position: int) -> npt.NDArray[np.bool_]:
        """[A] which rows go on behind the token at ``position``."""
        active = row_A[~self._is_over_B[row_A]]
        self._length_B[active] = position + 1
        last_logged = position + 1 == self._logged_B[active]
        was_over = self._was_over_B[active]
        # A logged token has ended its response or not: that is known, but of the last one where a
        # kill tore the word of its end.
        stops = was_over & last_logged
        unknown = (position >= self._logged_B[active]) | (last_logged & ~was_over)
        unknown &= self.first_B[active] + position + 1 >= self.sampling.min_response
        if unknown.any():
            first = max(position + 1 - self._ending.window, 0)  # all would cost their square
            tokens_BS = self._tokens_BS[active[unknown], first : position + 1]
            stops[unknown] = self._ending.are_over(tokens_BS, self.sampling.min_response)
        self._is_over_B[active[stops]] = True
        self._has_stopped_B[active[stops]] = True
        self._is_over_B[active[position + 1 == self._budget_B[active]]] = True
        return ~self._is_over_B[row_A]

    def tell(self, log: MemoryLog) -> None:
        """Give the log what it lacks.  Ends and other tokens go together: were ends told sooner,
        short responses would outlive more kills than long ones.
        """
        lacking = (self._length_B > self._told_B) | (self._is_over_B & ~self._is_told_B)
        for row in np.flatnonzero(lacking).tolist():
            new = slice(self._told_B[row], self._length_B[row])
            reason = None
            if self._is_over_B[row]:
                reason = "stop" if self._has_stopped_B[row] else "length"
            log.append(
                self.batch[row].sample_id,
                self._tokens_BS[row, new],
                self._log_probs_BS[row, new],
                version=self._version,
                finish_reason=reason,
            )
        self._told_B = np.maximum(self._told_B, self._length_B)
        self._is_told_B |= self._is_over_B


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
