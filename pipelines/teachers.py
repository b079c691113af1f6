"""The teachers of a run: their stores on meshes of their own, their layers by Megatron."""

from __future__ import annotations

import torch

from mtopd.config import ConsolidateConfig
from mtopd.convert.bridge import Bridge
from mtopd.dtypes import torch_dtype
from mtopd.files import read_json
from mtopd.hf_checkpoint import hf_config_from_dict
from mtopd.megatron import parallel
from mtopd.megatron.layers import TeacherLayers
from mtopd.megatron.options import config_overrides
from mtopd.run_dir import RunDir
from mtopd.teacher_offload.store import TeacherStore, open_store
from mtopd.teacher_offload.teachers import Teachers

from .student import Student


def build_teachers(config: ConsolidateConfig, student: Student, run: RunDir) -> Teachers:
    """The config's teachers, those that the start has checked, on meshes of their own; teachers of
    one shape share a mesh.  Collective.
    """
    ranks = student.ranks
    shapes = [(config.teacher_tp(i), t.parallel.ep) for i, t in enumerate(config.teachers)]
    meshes = {shape: parallel.build_teacher_mesh(*shape) for shape in dict.fromkeys(shapes)}
    head_rows = None
    if ranks.is_last_stage:
        num_rows = student.trainer.output_weight().shape[0]
        head_rows = range(ranks.tp_rank * num_rows, (ranks.tp_rank + 1) * num_rows)
    checked = read_json(run.manifest)["teachers"]
    return Teachers(
        [
            open_store(teacher.store, name=teacher.name, expected=entry["fingerprint"])
            for teacher, entry in zip(config.teachers, checked, strict=True)
        ],
        [meshes[shape] for shape in shapes],
        ranks.device,
        build_layers=build_teacher_layers,
        offload=config.teacher_offload,
        cache=config.hidden_cache,
        head_rows=head_rows,
    )


def build_teacher_layers(
    store: TeacherStore, mesh: parallel.TeacherMesh, device: torch.device
) -> TeacherLayers:
    """The layer modules of a teacher on its mesh; they hold no weight until a stream binds some."""
    hf_config = hf_config_from_dict(store.manifest["architecture"])
    bridge = Bridge(
        hf_config,
        dtype=torch_dtype(store.dtype),
        padded_vocab_size=hf_config.vocab_size,
        overrides=config_overrides(device),
        tp=mesh.tp_size,
        ep=mesh.ep_size,
    )
    return TeacherLayers(
        bridge.transformer_config, mesh.collection, bridge.facts.rope_theta, device
    )
