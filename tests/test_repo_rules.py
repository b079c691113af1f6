"""The import directions of the design, read from the source: who may know whom, and where heavy
libraries may enter.
"""

from __future__ import annotations

import ast
import importlib.metadata
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
    "child_process",
    "step_sums",
    "planning",
    "data",
    "prompt_table",
    "trajectories",
    "run_dir",
    "manifest",
    "content",
    "config_docs",
    "files",
    "metrics",
    "metrics_lines",
    "report",
    "progress",
    "user_cache",
    "tokenizer",
    "tokenizer_files",
    "char_tokenizer",
    "safetensors_file",
    "dtypes",
    "families",
    "config_json",
    "hf_checkpoint",
    "hf_export",
    "hf_fp8",
    "hf_weights",
    "hf_writer",
}
BOTTOM = {
    "config",
    "config_data",
    "config_file",
    "config_rollout",
    "config_specialist",
    "config_values",
    "yaml_file",
    "types",
}
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
    "reasoning_gym": r"mtopd/data/verifiers\.py",
    "transformer_engine": r"mtopd/megatron/.*",
    "aiohttp": r"mtopd/rollout/sglang.*\.py",
    "orjson": r"mtopd/rollout/sglang_wire\.py",
    "triton": r"mtopd/kernels/rows_triton\.py",
    "jinja2": r"mtopd/report/page\.py",
    "matplotlib": r"mtopd/report/plots\.py",
    "obstore": r"mtopd/teacher_offload/storage\.py",
    "typer": r"pipelines/cli(_stores|_host)?\.py",
}
# pipelines/, from the top: a file imports only files of the rows below its own.
PIPELINES = (
    ("cli",),
    ("cli_stores", "cli_host"),
    ("start",),
    ("own_ranks",),
    ("serve",),  # servers that ranks sample with, while these run
    ("prepare",),  # what a verb checks and writes before its ranks start
    ("serving",),
    ("failures", "continuation", "inputs"),  # why a rank ended; what a start goes on from
    ("shards",),
    ("checks", "stores", "caches", "doctor", "imports"),  # bodies of verbs
    ("layouts", "memory", "notices"),  # refusals of layouts; what a rank will hold; what is said
    ("consolidate", "supervised", "phase"),  # what the ranks of a verb run
    ("baselines",),
    ("rollout", "teacher_pass", "train", "evaluate"),  # a phase each
    ("answering",),  # a rollout under way
    ("sequence_filter", "staleness", "rollout_files", "requests", "carry_over"),
    ("micro_batches", "teacher_stream"),
    ("session",),
    ("iteration", "engines", "export", "teachers"),
    ("scores",),
    ("student",),
)
MEGATRON_DATACLASSES = {  # file below megatron/core -> dataclasses whose fields are options
    "model_parallel_config.py": {"ModelParallelConfig"},
    "transformer/transformer_config.py": {"TransformerConfig", "MLATransformerConfig"},
    "distributed/distributed_data_parallel_config.py": {"DistributedDataParallelConfig"},
    "optimizer/optimizer_config.py": {"OptimizerConfig"},
}
OUR_WORDS = {  # options of Megatron whose names are also words of ours, and where
    "hidden_size": "an array of the teacher store, a column of the cache's index",
    "num_layers": "a field of the teacher store's manifest",
    "optimizer": "the prefix of optimizer state in a checkpoint",
    "lr": "a setting of ours, a key of metrics.jsonl",
    "fp8": "a quant_method of HF folders",
    "bf16": "a way of multiplying in the row kernels",
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


def modules() -> dict[str, Path]:
    """Every module of the product by its name as it is imported; a package by its own."""
    named = {}
    for path in sources():
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        parts = ("mtopd", *parts) if parts[0] == "pipelines" else parts
        named[".".join(parts).removesuffix(".__init__")] = path
    return named


def imported_modules() -> dict[str, set[str]]:
    """Module -> modules of the product that it imports, inside functions and for types too.

    A name that is taken from a package counts as the module the package's ``__init__`` took it
    from.
    """
    named = modules()
    written = {name: imports(path) for name, path in named.items()}

    def origin(full: str) -> str | None:
        """The module that ``full``, a module or a name in one, comes from."""
        if full in named:
            return full
        module, _, name = full.rpartition(".")
        if module not in named:
            return None
        if named[module].name == "__init__.py":
            for taken in written[module]:
                if taken.rpartition(".")[2] == name and taken != full and origin(taken):
                    return origin(taken)
        return module

    found = {}
    for name, targets in written.items():
        # `from package import name` is written down as the package, too: the name alone counts.
        names = {t for t in targets if not any(other.startswith(f"{t}.") for other in targets)}
        found[name] = {o for o in map(origin, names) if o} - {name}
    return found


def test_no_circles_of_imports() -> None:
    """Whoever is in a circle can only be read, tested and moved together with all the others."""
    edges = imported_modules()
    reached: dict[str, set[str]] = {}
    for name in edges:
        seen: set[str] = set()
        waiting = [*edges[name]]
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += edges[module]
        reached[name] = seen
    circles = {
        frozenset(other for other in reached[name] if name in reached[other])
        for name in edges
        if name in reached[name]
    }
    said = [
        "; ".join(f"{a} imports {b}" for a in sorted(c) for b in sorted(edges[a] & c))
        for c in circles
    ]
    assert said == [], "modules that import one another in a circle"


def test_every_module_has_a_place_in_the_directions() -> None:
    """A module that is in none of the sets could import whatever it likes."""
    top = {
        p.relative_to(REPOSITORY / "mtopd").parts[0] for p in (REPOSITORY / "mtopd").rglob("*.py")
    }
    names = {name.removesuffix(".py") for name in top} - {"__init__"}
    missing = names - PARTS - LOWER - BOTTOM
    assert missing == set(), "add these to PARTS, LOWER or BOTTOM"
    gone = (PARTS | LOWER | BOTTOM) - names
    assert gone == set(), "no such modules any more"
    # What a checkpoint folder, a model family, a prompt and a report are is known without Megatron.
    assert {"families", "hf_checkpoint", "prompt_table", "report"} <= LOWER


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
    for path in (*folder.glob("planning/*.py"), folder / "types.py", *folder.glob("config*.py")):
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
        "mtopd/user_cache.py",
        "mtopd/megatron/cpu.py",
        "mtopd/kernels/rows_cpu.py",
        "mtopd/rollout/sglang_command.py",
    } | {f"pipelines/{n}.py" for n in ("start", "own_ranks", "cli", "checks", "doctor")}
    users = {str(p.relative_to(REPOSITORY)) for p in sources() if "os.environ" in p.read_text()}
    assert users <= allowed, users - allowed


def test_pipelines_import_downwards_only() -> None:
    """The command line starts verbs, a verb is made of phases, a phase takes a session and an
    iteration.
    """
    level = {name: -i for i, names in enumerate(PIPELINES) for name in names}
    wrong = [
        f"{path.name} has no place in PIPELINES"
        for path in sorted((REPOSITORY / "pipelines").glob("*.py"))
        if path.stem not in {*level, "__init__"}
    ]
    for name, targets in imported_modules().items():
        for target in sorted(targets):
            if not (name.startswith("mtopd.pipelines.") and target.startswith("mtopd.pipelines.")):
                continue
            user, used = name.rpartition(".")[2], target.rpartition(".")[2]
            if level.get(used, 0) >= level.get(user, 0):
                wrong.append(f"pipelines/{user}.py imports {used}, which does not lie below it")
    assert wrong == []


def test_pipelines_stay_short() -> None:
    """Composition: what grows here belongs into a part."""
    limits = {"consolidate.py": 60}
    long = [
        f"pipelines/{path.name} has {count} lines, {limits.get(path.name, 250)} are allowed"
        for path in sorted((REPOSITORY / "pipelines").glob("*.py"))
        if (count := len(path.read_text().splitlines())) > limits.get(path.name, 250)
    ]
    assert long == []


def test_no_job() -> None:
    """What a rank holds is a session, what it works on is an iteration: a job is both and all else."""
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.strip("_").lower() == "job"
    ]
    assert wrong == [], "no class or function is named Job"


def test_phases_take_an_iteration_not_its_number() -> None:
    """A number is no use without the session it belongs to, so the two went everywhere together."""
    wrong = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            kinds = {p.arg: ast.unparse(p.annotation) for p in parameters if p.annotation}
            has_session = any(re.search(r"\bSession\b", kind) for kind in kinds.values())
            numbers = [p for p, k in kinds.items() if "iteration" in p and re.search(r"\bint\b", k)]
            if has_session and numbers:
                where = f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name}"
                wrong.append(f"{where} takes a Session and the number {numbers[0]}")
    assert wrong == [], "pass the Iteration"


def test_a_train_step_names_nothing_of_its_objective() -> None:
    """An objective's sums are its own: another objective must not change pipelines/train.py."""
    names = set()
    for path in (REPOSITORY / "mtopd" / "objectives").glob("[a-z]*.py"):
        names |= {text for text, _ in string_literals(path) if text.isidentifier()}
    lines = ast.parse((REPOSITORY / "mtopd" / "metrics_lines.py").read_text())
    for node in ast.walk(lines):
        if isinstance(node, ast.ClassDef) and node.name == "DivergenceMetrics":
            names |= {ast.unparse(s.target) for s in node.body if isinstance(s, ast.AnnAssign)}
    assert {"kl_sum", "reverse_kl", "entropy"} <= names, "where have an objective's names gone?"
    train = REPOSITORY / "pipelines" / "train.py"
    registered = string_literals(REPOSITORY / "mtopd" / "objectives" / "__init__.py")
    wrong = {
        f"line {line}: {text!r}"
        for text, line in string_literals(train)
        if text in names - {name for name, _ in registered}
    }
    for node in ast.walk(ast.parse(train.read_text())):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "arg", None)
        if isinstance(node, ast.Attribute | ast.keyword) and name in names - {"tokens"}:
            wrong.add(f"line {node.lineno}: {name}")  # tokens: of the plan, whatever is learnt
    assert wrong == set(), "pipelines/train.py names what its objective measures"


def test_names_of_megatron_options_are_written_in_one_place() -> None:
    """A literal outside says that a second file knows whose option it is, or whether it may
    change.
    """
    options = megatron_options()
    places = r"mtopd/megatron/options\.py|mtopd/families/.*"
    wrong = []
    for path in sources():
        name = str(path.relative_to(REPOSITORY))
        if not re.fullmatch(places, name):
            wrong += [
                f"{name}:{line} {text!r}"
                for text, line in string_literals(path)
                if text in options - OUR_WORDS.keys()
            ]
    assert wrong == [], "name Megatron's options in mtopd/megatron/options.py or mtopd/families/"


def megatron_options() -> set[str]:
    """Fields of the dataclasses that an entry of student.megatron can be, from Megatron's source."""
    (core,) = importlib.metadata.files("megatron-core") and [
        Path(str(file.locate())).parent
        for file in importlib.metadata.files("megatron-core") or ()
        if str(file) == "megatron/core/__init__.py"
    ]
    found = set()
    for file, classes in MEGATRON_DATACLASSES.items():
        for node in ast.walk(ast.parse((core / file).read_text())):
            if isinstance(node, ast.ClassDef) and node.name in classes:
                fields = [s for s in node.body if isinstance(s, ast.AnnAssign)]
                assert fields, f"{node.name} of {file} has no fields"
                found |= {ast.unparse(field.target) for field in fields}
    return found


def string_literals(path: Path) -> list[tuple[str, int]]:
    """All strings of a file with their lines; docstrings are long, they match no name."""
    return [
        (node.value, node.lineno)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_any_is_for_what_a_library_leaves_open() -> None:
    count = num_lines = 0
    by_file = {}
    for path in sources():
        tree = ast.parse(path.read_text())
        names = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "Any"]
        taken = [n for n in ast.walk(tree) if isinstance(n, ast.alias) and n.name == "Any"]
        by_file[str(path.relative_to(REPOSITORY))] = len(names) + len(taken)
        count += len(names) + len(taken)
        num_lines += len(path.read_text().splitlines())
    most = sorted(by_file, key=lambda name: -by_file[name])[:5]
    assert count <= num_lines * 12 / 1000, (
        f"{1000 * count / num_lines:.1f} Any per 1,000 lines, 12 are allowed; most are in {most}"
    )


def test_megatron_on_cpu_is_known_inside_megatron_only() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, path in modules().items()
        for target in sorted(imports(path))
        if re.match(r"mtopd\.megatron\.cpu\b", target) and not name.startswith("mtopd.megatron")
    ]
    assert wrong == [], "whether Megatron runs on CPU is the business of mtopd/megatron/ alone"
