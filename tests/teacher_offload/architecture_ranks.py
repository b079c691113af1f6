"""Worker of test_architectures: every model on every mesh, under a student's tp 2 x pp 2, against
transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from mtopd.config import ParallelConfig
from mtopd.convert.bridge import Bridge
from mtopd.convert.layer_parts import layer_parts
from mtopd.dtypes import dtype_name
from mtopd.hf_checkpoint import load_hf_config
from mtopd.megatron import parallel
from mtopd.megatron.layers import TeacherLayers
from mtopd.megatron.model import HiddenStateModel, block_spec
from mtopd.megatron.options import config_overrides
from mtopd.teacher_offload.probe import check_probe
from mtopd.tokenizer import load_tokenizer, vocab_size

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]


def joined(
    bridge: Bridge, tensors: Weights, layer: int, slices: int, mesh: parallel.TeacherMesh
) -> Weights:
    """This rank's weights of a layer, put together from the stored parts as the store's format
    says.
    """
    layer_tensors, expert_tensors = layer_parts(bridge, tensors, layer, slices)
    count, by_name, weights = slices // mesh.tp_size, {}, {}
    for stored, tensor in layer_tensors:
        section, _, name = stored.partition("/")
        if section == "common" or int(section.removeprefix("slice.")) // count == mesh.tp_rank:
            by_name.setdefault(name, []).append(tensor)
    whole = {name: torch.cat(parts) for name, parts in by_name.items()}
    for name, tensor in whole.items():
        if name.endswith(".gate"):
            name = name.removesuffix(".gate")
            weights[name] = torch.cat([tensor, whole[name + ".up"]])
        elif name.endswith(".T"):
            weights[name.removesuffix(".T")] = tensor.T
        elif not name.endswith(".up"):
            weights[name] = tensor
    first = mesh.ep_rank * (bridge.facts.num_experts_of(layer) // mesh.ep_size)
    for stored, tensor in expert_tensors:
        section, _, name = stored.partition("/")
        index = int(section.removeprefix("expert."))
        if index * mesh.ep_size // bridge.facts.num_experts_of(layer) == mesh.ep_rank:
            weights[f"mlp.experts.local_experts.{index - first}.{name}"] = tensor
    return weights


def resident(
    bridge: Bridge, hf_config: Any, tensors: Weights, mesh: parallel.TeacherMesh
) -> torch.nn.Module:
    """The whole teacher as a Megatron GPTModel of the same mesh."""
    config = bridge.transformer_config
    model = HiddenStateModel(
        config=config,
        transformer_layer_spec=block_spec(config),
        vocab_size=hf_config.vocab_size,
        max_sequence_length=128,
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=bridge.facts.rope_theta,
        pg_collection=mesh.collection,
    )
    state = {"embedding.word_embeddings.weight": tensors["model.embed_tokens.weight"]}
    state["decoder.final_layernorm.weight"] = tensors["model.norm.weight"]
    if not hf_config.tie_word_embeddings:
        state["output_layer.weight"] = tensors["lm_head.weight"]
    for layer in range(hf_config.num_hidden_layers):
        weights = joined(bridge, tensors, layer, 1, mesh)
        state |= {f"decoder.layers.{layer}.{name}": tensor for name, tensor in weights.items()}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and all("_extra_state" in k for k in result.missing_keys), (
        result
    )
    return model.eval()


def check_mesh(mesh: parallel.TeacherMesh, tp: int, ep: int) -> None:
    """The fields of a mesh say what its groups are."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = {size: list(range(rank // size * size, rank // size * size + size)) for size in (tp, ep)}
    columns = {size: list(range(rank % size, world_size, size)) for size in (tp, ep)}
    members = dist.get_process_group_ranks
    assert (mesh.tp_rank, mesh.tp_size, mesh.replica, mesh.num_replicas) == (
        rank % tp,
        tp,
        rank // tp,
        world_size // tp,
    )
    assert members(mesh.tp_group) == rows[tp] and members(mesh.peer_group) == columns[tp]
    assert (mesh.ep_rank, mesh.ep_size) == (rank % ep, ep)
    assert (
        members(mesh.expert_peer_group) == columns[ep]
        and len(columns[ep]) == mesh.num_expert_replicas
    )
    assert columns[ep].index(rank) == mesh.expert_replica
    for name, group in vars(mesh.collection).items():
        expected = rows[tp] if name in ("tp", "tp_cp", "tp_dp_cp", "mp") else [rank]
        expected = rows[ep] if name in ("ep", "tp_ep", "tp_ep_pp") else expected
        assert members(group) == expected, (name, members(group))


def held_bytes(layers: TeacherLayers) -> int:
    """Bytes of weights; tables of the rotary embedding are none."""
    values = [value for module in layers._modules for value in module.state_dict().values()]
    return sum(
        value.untyped_storage().nbytes() for value in values if isinstance(value, torch.Tensor)
    )


@torch.no_grad()
def check(
    folder: Path, mesh: parallel.TeacherMesh, slices: int, chunks: Weights, dtype: torch.dtype
) -> tuple[float, float, float]:
    """Worst relative error against transformers over this rank's chunks, and to a resident model
    (0: skipped); the difference that the probe, the last chunk, finds (0: another replica's).
    """
    hf_config = load_hf_config(folder)
    # Cloned: the BLAS sums in another order where a matrix is not aligned, and the resident model's
    # are.
    tensors = {
        k: v.to(dtype, copy=True) for k, v in load_file(folder / "model.safetensors").items()
    }
    bridge = Bridge(
        hf_config,
        dtype=dtype,
        padded_vocab_size=hf_config.vocab_size,
        overrides=config_overrides(CPU),
        tp=mesh.tp_size,
        ep=mesh.ep_size,
    )
    layers = TeacherLayers(bridge.transformer_config, mesh.collection, bridge.facts.rope_theta, CPU)
    assert held_bytes(layers) == 0, "weights are held before any is bound"
    ids = [chunks[f"ids/{i}"] for i in range(len(chunks) // 2)]
    mine = [i for i in range(len(ids)) if i % mesh.num_replicas == mesh.replica]
    hidden = [
        torch.nn.functional.embedding(ids[i].T, tensors["model.embed_tokens.weight"]) for i in mine
    ]
    while len(hidden) < -(-len(ids) // mesh.num_replicas):
        # Every rank makes the same number of calls.
        hidden.append(torch.zeros(1, 1, hf_config.hidden_size, dtype=dtype))
    for layer in range(hf_config.num_hidden_layers):
        weights = joined(bridge, tensors, layer, slices, mesh)
        layers.bind(layer, weights)
        pointers = {t.data_ptr() for t in weights.values()}
        bound = [m for m in layers._modules if any(p.numel() for p in m.parameters())]
        assert bound == [layers.layer], "a layer of another kind still holds weights"
        assert {p.data_ptr() for p in layers.layer.parameters()} <= pointers, (
            "bound parameters are views, not copies"
        )
        hidden = [layers.forward_layer(h) for h in hidden]
    layers.bind_norm(tensors["model.norm.weight"])
    states = [layers.forward_norm(h).transpose(0, 1) for h in hidden]
    layers.release()
    assert held_bytes(layers) == 0, f"a released teacher holds {held_bytes(layers)} bytes"
    wanted = [chunks[f"states/{i}"] for i in mine]
    worst = max(
        (
            float((s.float() - w).norm(dim=-1).div(w.norm(dim=-1)).max())
            for s, w in zip(states, wanted, strict=False)
        ),
        default=0.0,
    )
    difference = 0.0
    if mesh.tp_size == mesh.ep_size == 1 and dtype == torch.float32:
        model = resident(bridge, hf_config, tensors, mesh)
        for i, state in zip(mine, states, strict=False):
            positions = torch.arange(ids[i].shape[1]).expand_as(ids[i])
            found = model(ids[i], positions, None).transpose(0, 1)
            difference = max(difference, float((found - state).abs().max()))
    probed = 0.0
    if len(ids) - 1 in mine:
        probe, vocab = (
            json.loads(folder.with_suffix(".probe.json").read_text()),
            vocab_size(load_tokenizer(folder)),
        )
        head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
        logits = states[mine.index(len(ids) - 1)][0].float() @ head[:vocab].float().T
        log_probs = torch.log_softmax(logits, -1).gather(-1, torch.tensor(probe["targets"]))
        name = dtype_name(dtype)
        probed = check_probe(
            probe, log_probs.numpy(), name=folder.name, vocab_size=vocab, dtype=name
        )
    return worst, difference, probed


def main() -> None:
    root, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
    # The student's groups: nothing of them may leak into a teacher's result.
    parallel.initialize(ParallelConfig(tp=2, pp=2), seed=1)
    for name, slices, sizes in plan:
        chunks = load_file(root / f"{name}.chunks.safetensors")
        for tp, ep, dtype in [(*size, torch.float32) for size in sizes] + [
            (*sizes[-1], torch.bfloat16)
        ]:
            mesh = parallel.build_teacher_mesh(tp, ep)
            check_mesh(mesh, tp, ep)
            errors = torch.tensor(check(root / name, mesh, slices, chunks, dtype))
            dist.all_reduce(errors, op=dist.ReduceOp.MAX)
            if dist.get_rank() == 0:
                kind = dtype_name(dtype)
                print(
                    f"RESULT {name} {tp} {ep} {kind}",
                    *(f"{e:.2e}" for e in errors.tolist()),
                    flush=True,
                )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
