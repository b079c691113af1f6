"""The names inside a teacher store: its paths, and the tensors of its files, built and parsed.

    path     embedding.safetensors, layers/00000.safetensors, experts/00000.safetensors, ...
    tensor   SECTION/NAME, where SECTION is common, slice.0000 or expert.0000

NAME is Megatron's local-spec name inside the layer.  Of what is sliced along another dimension
than the first it has a suffix that says how slices become a weight again: gate and up stand apart
(``.gate``, ``.up``), row-parallel weights transposed (``.T``).
"""

from __future__ import annotations

MANIFEST = "teacher.json"
EMBEDDING = "embedding.safetensors"
FINAL_NORM = "final_norm.safetensors"
HEAD = "head.safetensors"
COMMON = "common"  # the section of what tp replicates
GATE, UP, TRANSPOSED = ".gate", ".up", ".T"
_EXPERT = "expert."
_EXPERTS = "experts/"


def layer_path(layer: int) -> str:
    return f"layers/{layer:05d}.safetensors"


def experts_path(layer: int) -> str:
    return f"{_EXPERTS}{layer:05d}.safetensors"


def is_experts_path(path: str) -> bool:
    return path.startswith(_EXPERTS)


def tokenizer_path(file: str) -> str:
    return f"tokenizer/{file}"


def slice_section(index: int) -> str:
    return f"slice.{index:04d}"


def expert_section(expert: int) -> str:
    return f"{_EXPERT}{expert:04d}"


def stored_name(section: str, name: str) -> str:
    return f"{section}/{name}"


def section_of(stored: str) -> str:
    return stored.partition("/")[0]


def expert_weight(expert: int, name: str) -> str:
    """Megatron's local-spec name of an expert's weight inside its layer."""
    return f"mlp.experts.local_experts.{expert}.{name}"


def local_name(stored: str, first_expert: int) -> str:
    """Megatron's local-spec name of a stored tensor on a rank whose experts begin with
    ``first_expert``; the suffixes of slices stay.
    """
    section, _, name = stored.partition("/")
    if section.startswith(_EXPERT):
        return expert_weight(int(section.removeprefix(_EXPERT)) - first_expert, name)
    return name
