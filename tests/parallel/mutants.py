"""Ways to be silently wrong on some layout, by name: each must turn its row of the parity matrix
red.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

# Mutant -> the row that must fail.
MUTANTS = {
    "tp reduction dropped": "tp2",
    "sp gather without its reduction": "tp2pp2 +sp",
    "1/N twice": "dp2",
    "gradients averaged over dp": "dp2",
    "shift off by one": "micro-batches of 2",
    "weights of other samples": "one micro-batch",
    "cp ranges not zigzag": "cp2",
    "cp keys not gathered": "tp2cp2 +sp",
    "sampled tokens of another cp rank": "cp2",
    "packed samples see one another": "packed",
    "packed cuts off by one": "packed, tp2 +sp",
    "tied gradients not summed over pp": "tied pp2",
    "interleaved sends batched": "pp2 vpp2",
    "overlapped gather not waited for": "dp2, both overlaps",
    "shards reduced by no one": "dp2, distributed optimizer",
    "router gradients not summed": "experts tp2 +sp etp2",
    "expert gradients averaged": "experts ep2",
    "norms not summed under sp": "experts tp2ep2 +sp",
    "down-projections not summed": "latent tp2 +sp",
    "recompute of other inputs": "recompute, full",
    "cached shares exchanged": "tied tp2pp2 +sp",
    "duplicates counted in the norm": "tied tp2",
    "norm of a shard": "dp2, distributed optimizer",
}


def install(name: str) -> None:
    """Break this process so; what is patched is what the product calls."""
    _INSTALL[name]()


def _identity(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    return tensor


def _tp_reduction() -> None:
    from mtopd.megatron import micro_batch

    micro_batch.copy_to_tensor_model_parallel_region = _identity


def _sp_gather() -> None:
    from mtopd.megatron import micro_batch

    original = micro_batch.gather_from_sequence_parallel_region
    micro_batch.gather_from_sequence_parallel_region = lambda x, tensor_parallel_output_grad: (
        original(x, tensor_parallel_output_grad=False)
    )


def _pack_rows(change: Callable[[list[float]], list[float]]) -> None:
    from mtopd.pipelines import micro_batches

    original = micro_batches.pack_rows
    micro_batches.pack_rows = lambda samples, weights, **rest: original(
        samples, change(list(weights)), **rest
    )


def _first_tokens() -> None:
    """Every rank reads as many tokens as it has rows, from a sample's first on."""
    from mtopd.pipelines import micro_batches

    original = micro_batches.sampled_tokens

    def from_first(session: Any, iteration: Any, runs: Any) -> Any:
        moved = [
            replace(run, samples=[replace(s, first=0, stop=s.stop - s.first) for s in run.samples])
            for run in runs
        ]
        return original(session, iteration, moved)

    micro_batches.sampled_tokens = from_first


def _exchanged(weights: list[float]) -> list[float]:
    """The trained samples' in reverse; a sample without trained tokens keeps its zero."""
    trained = [weight for weight in weights if weight]
    return [trained.pop() if weight else weight for weight in weights]


def _divided() -> None:
    """Megatron divides the gradients by the tokens that the loss counts; the loss itself stays
    right.
    """
    import torch

    from mtopd.megatron import micro_batch

    original = micro_batch.loss

    def counted(hidden: Any, **rest: Any) -> Any:
        loss, _, metrics = original(hidden, **rest)
        return loss, torch.tensor(len(rest["micro_batch"].position_T), dtype=torch.int), metrics

    micro_batch.loss = counted


def _averaged(which: Callable[[Any], bool]) -> None:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer

    original = _ParamAndGradBuffer.__init__

    def halved(buffer: Any, *args: Any, **kwargs: Any) -> None:
        original(buffer, *args, **kwargs)
        if all(map(which, buffer.params)):
            for bucket in buffer.buckets:
                bucket.gradient_scaling_factor = 0.5

    _ParamAndGradBuffer.__init__ = halved


def _shift() -> None:
    from mtopd.megatron import packing

    original = packing.loss_positions

    def one_early(samples: Any) -> tuple[Any, Any]:
        positions, owners = original(samples)
        return positions - 1, owners

    packing.loss_positions = one_early


def _contiguous() -> None:
    from mtopd.megatron import packing

    def halves(seq_length: int, cp_rank: int, cp_size: int) -> tuple[slice, slice]:
        chunk = seq_length // (2 * cp_size)
        return tuple(
            slice((2 * cp_rank + i) * chunk, (2 * cp_rank + i + 1) * chunk) for i in range(2)
        )

    packing.zigzag_chunks = halves


def _cp_keys() -> None:
    """Keys and values come from all ranks, their gradients do not go back to them."""
    from mtopd.megatron import without_te

    original = without_te.gather_from_sequence_parallel_region
    without_te.gather_from_sequence_parallel_region = lambda x, tensor_parallel_output_grad, group: (
        original(x, tensor_parallel_output_grad=False, group=group)
    )


def _cuts(change: Callable[[list[int]], list[int]]) -> None:
    import torch

    from mtopd.megatron.micro_batch import PackedMicroBatch

    original = PackedMicroBatch.packed_seq_params.fget

    def changed(batch: PackedMicroBatch) -> Any:
        params = original(batch)
        if params is not None:
            cuts = change(params.cu_seqlens_q.tolist())
            params.cu_seqlens_q = params.cu_seqlens_kv = torch.tensor(cuts, dtype=torch.int32)
            longest = max(b - a for a, b in pairwise(cuts))
            params.max_seqlen_q = params.max_seqlen_kv = longest
        return params

    PackedMicroBatch.packed_seq_params = property(changed)


def _tied() -> None:
    from megatron.core.distributed import finalize_model_grads

    module = __import__("sys").modules[finalize_model_grads.__module__]
    module._allreduce_word_embedding_grads = lambda *args, **kwargs: None


def _batched() -> None:
    from mtopd.pipelines import student

    original = student.config_overrides
    student.config_overrides = lambda *args, **kwargs: {
        **original(*args, **kwargs),
        "batch_p2p_comm": True,
        "overlap_p2p_comm": False,
    }


def _late() -> None:
    """The output weight is used before its gather has come; nobody waits before it is exported
    either.
    """
    from mtopd.megatron.trainer import Trainer

    Trainer.finish_param_sync = lambda trainer: None


def _unreduced() -> None:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    _ParamAndGradBucketGroup.start_grad_sync = lambda *args, **kwargs: None
    _ParamAndGradBucketGroup.finish_grad_sync = lambda *args, **kwargs: None


def _unmark(which: Callable[[str], bool]) -> None:
    """Weights that each tp rank has whole: under sequence parallelism their gradients are parts."""
    from mtopd.pipelines import student

    original = student.build_chunks

    def build(*args: Any, **kwargs: Any) -> Any:
        chunks = original(*args, **kwargs)
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if which(name):
                    parameter.sequence_parallel = False
        return chunks

    student.build_chunks = build


def _recompute() -> None:
    """The second forward of a layer sees other inputs than the first."""
    from megatron.core.tensor_parallel import random

    original = random.detach_variable

    def noisy(inputs: Any) -> Any:
        return tuple(
            (x * 1.001).detach().requires_grad_(x.requires_grad)
            if getattr(x, "requires_grad", False)
            else x
            for x in original(inputs)
        )

    random.detach_variable = noisy


def _shares() -> None:
    from mtopd.hidden_cache import CachedStates

    original: Any = CachedStates._reads

    def reads(self: Any, run: Any, number: int, rows: Any) -> Any:
        return original(self, run, self._ranks.tp_size - 1 - number, rows)

    CachedStates._reads = reads  # type: ignore[method-assign]


def _duplicates() -> None:
    from megatron.core import tensor_parallel

    tensor_parallel.param_is_not_tensor_parallel_duplicate = lambda *args, **kwargs: True


def _shard_norm() -> None:
    import torch.distributed as dist
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    alone: list[Any] = []

    def group(self: Any) -> Any:
        if not alone:
            alone.append(dist.new_subgroups(1)[0])
        return alone[0]

    DistributedOptimizer.get_grad_stats_parallel_group = group


_INSTALL: dict[str, Callable[[], None]] = {
    "tp reduction dropped": _tp_reduction,
    "sp gather without its reduction": _sp_gather,
    "1/N twice": _divided,
    "gradients averaged over dp": lambda: _averaged(lambda parameter: True),
    "shift off by one": _shift,
    "weights of other samples": lambda: _pack_rows(_exchanged),
    "cp ranges not zigzag": _contiguous,
    "cp keys not gathered": _cp_keys,
    "sampled tokens of another cp rank": _first_tokens,
    "packed samples see one another": lambda: _cuts(lambda cuts: [cuts[0], cuts[-1]]),
    "packed cuts off by one": lambda: _cuts(
        lambda cuts: [cuts[0], *(c + 1 for c in cuts[1:-1]), cuts[-1]]
    ),
    "tied gradients not summed over pp": _tied,
    "interleaved sends batched": _batched,
    "overlapped gather not waited for": _late,
    "shards reduced by no one": _unreduced,
    "router gradients not summed": lambda: _unmark(lambda name: ".router." in name),
    "expert gradients averaged": lambda: _averaged(
        lambda parameter: not getattr(parameter, "allreduce", True)
    ),
    "norms not summed under sp": lambda: _unmark(lambda name: "layernorm" in name),
    "down-projections not summed": lambda: _unmark(lambda name: "_down_proj." in name),
    "recompute of other inputs": _recompute,
    "cached shares exchanged": _shares,
    "duplicates counted in the norm": _duplicates,
    "norm of a shard": _shard_norm,
}
assert _INSTALL.keys() == MUTANTS.keys()
