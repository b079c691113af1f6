"""The import directions of the design, read from the source: who may know whom, and where heavy
libraries may enter.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.conftest import REPOSITORY

PARTS = {
    "rollout",
    "teacher_offload",
    "hidden_cache",
    "kernels",
    "objectives",
    "megatron",
    "convert",
}
LOWER = {
    "planning",
    "data",
    "trajectories",
    "run_dir",
    "manifest",
    "files",
    "metrics",
    "metrics_lines",
    "report",
    "progress",
    "tokenizer",
    "safetensors_file",
    "dtypes",
    "families",
    "hf_checkpoint",
}
BOTTOM = {"config", "types"}
# Part -> other parts it may import: the stated exceptions.
ALLOWED = {
    "teacher_offload": {"megatron"},  # teacher_pass builds layers
    "convert": {"megatron", "teacher_offload"},  # teacher writes a store
    "objectives": {"kernels"},
}
ONE_PLACE = {  # library -> where it may be imported
    "megatron": r"mtopd/megatron/.*",
    "mbridge": r"mtopd/convert/bridge\.py",
    "zarr": r"(?!)",  # a reader's tool: tests open our segments with it
    "reasoning_gym": r"mtopd/data\.py",
    "transformer_engine": r"mtopd/megatron/.*",
    "triton": r"mtopd/kernels/rows_triton\.py",
    "jinja2": r"mtopd/report/page\.py",
    "matplotlib": r"mtopd/report/plots\.py",
    "obstore": r"mtopd/teacher_offload/storage\.py",
    "typer": r"pipelines/cli\.py",
}
UNSAFE = r"pickle\.load|torch\.load\(|yaml\.(load\((?!.*_Loader)|unsafe_load|full_load)|trust_remote_code=True|\bexec\("


def sources() -> list[Path]:
    return sorted(
        [*(REPOSITORY / "mtopd").rglob("*.py"), *(REPOSITORY / "pipelines").rglob("*.py")]
    )


def imports(path: Path) -> set[str]:
    """Whatever the file imports, inside functions too; relative names are made absolute."""
    folder = path.relative_to(REPOSITORY).parts[:-1]
    package = ["mtopd", *folder] if folder[0] == "pipelines" else list(folder)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def test_pipelines_import_themselves_relatively() -> None:
    """So that tools which read the source see who knows whom inside the folder."""
    written = r"^\s*(from|import)\s+mtopd\.pipelines\b"
    wrong = [
        f"{path.name}: {line.group().strip()}"
        for path in sorted((REPOSITORY / "pipelines").glob("*.py"))
        for line in re.finditer(written, path.read_text(), re.MULTILINE)
    ]
    assert wrong == [], "write `from . import x` or `from .x import y`"


def test_parts_import_downwards_only() -> None:
    wrong = []
    for path in sources():
        name = str(path.relative_to(REPOSITORY))
        if name.startswith("pipelines/"):
            continue
        part = path.relative_to(REPOSITORY / "mtopd").parts[0].removesuffix(".py")
        for module in imports(path):
            pieces = module.split(".")
            if pieces[0] != "mtopd" or len(pieces) < 2:
                continue
            target = pieces[1]
            if target == "pipelines":
                wrong.append(f"{name} imports {module}: mtopd never imports pipelines")
            elif part == "kernels" and target != "kernels":
                wrong.append(f"{name} imports {module}: kernels import nothing from mtopd")
            elif part in PARTS and target in PARTS - {part} - ALLOWED.get(part, set()):
                wrong.append(f"{name} imports {module}: parts do not import one another")
            elif (part in LOWER and target in PARTS) or (
                part in BOTTOM and target in PARTS | LOWER
            ):
                wrong.append(f"{name} imports {module}: it lies above")
    assert wrong == []


def test_heavy_and_optional_libraries_enter_in_one_place() -> None:
    wrong = []
    for path in sources():
        name = str(path.relative_to(REPOSITORY))
        for library, place in ONE_PLACE.items():
            if not re.fullmatch(place, name) and any(
                m.split(".")[0] == library for m in imports(path)
            ):
                wrong.append(f"{name} imports {library}")
    assert wrong == []


def test_planning_and_types_need_no_tensor_library() -> None:
    folder = REPOSITORY / "mtopd"
    for path in (*folder.glob("planning/*.py"), folder / "types.py", folder / "config.py"):
        heavy = {m.split(".")[0] for m in imports(path)} & {
            "torch",
            "numpy",
            "pyarrow",
            "megatron",
        }
        assert heavy == set(), f"{path} imports {heavy}"


def test_nothing_that_can_execute_code_is_loaded() -> None:
    # Megatron's checkpoint index is a pickle: one file reads it, after its seal, through an
    # unpickler of its own.
    index = Path("mtopd/megatron/checkpoint.py")
    wrong = [path for path in sources() if re.search(UNSAFE, path.read_text())]
    assert [path.relative_to(REPOSITORY) for path in wrong] == [index]


def test_the_loop_stays_a_table_of_contents() -> None:
    text = (REPOSITORY / "pipelines" / "consolidate.py").read_text()
    assert len(text.splitlines()) < 100
    assert not re.search(r"\btry:|\.rank\b|import torch", text)


def test_environment_is_not_configuration() -> None:
    """os.environ is read only for torchrun's own variables and the folder of caches, and set only
    for libraries.
    """
    allowed = {
        "mtopd/megatron/parallel.py",
        "mtopd/progress.py",
        "mtopd/megatron/cpu.py",
        "mtopd/kernels/rows_cpu.py",
    } | {f"pipelines/{n}.py" for n in ("start", "cli", "prepare", "doctor")}
    users = {str(p.relative_to(REPOSITORY)) for p in sources() if "os.environ" in p.read_text()}
    assert users <= allowed, users - allowed
