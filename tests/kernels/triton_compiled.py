"""Run by test_rows_triton: compile every variant of the kernels for sm_90 without a GPU and print
what came out.
"""

import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mtopd.kernels import rows_triton
from mtopd.kernels.rows import Kind

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
FLAGS = [
    f"{model}_{what}" for model in ("STUDENT", "TEACHER") for what in ("SCALED", "CAPPED", "BIASED")
]


def compile_kernel(
    function: triton.JITFunction, constants: dict[str, object], is_plain: bool
) -> dict[str, object]:
    signature = {name: _type(name, constants) for name in function.arg_names}
    aligned = [
        i for i, name in enumerate(function.arg_names) if re.search("_ptr|stride|num_columns", name)
    ]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": rows_triton.NUM_WARPS, "enable_fp_fusion": is_plain}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|LOCAL|SHARED):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (\S+)", ptx)
    assert target
    return {
        "target": target[1],
        "registers": numbers["REG"],
        "spilled_bytes": numbers["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "vector_loads": len(re.findall(r"ld\.global\.v4", ptx)),
        "fused_products": len(re.findall(r"fma\.rn\.f32", ptx)),
    }


def _type(name: str, constants: dict[str, object]) -> str:
    if name in constants:
        return "constexpr"
    if name == "gradient_ptr":
        return "*bf16"
    if name.endswith("_ptr"):
        return "*fp32"
    return "i32" if name.startswith("num_") or name.endswith("stride") else "fp32"


def main() -> None:
    found = {}
    for is_plain in (True, False):
        constants: dict[str, object] = dict.fromkeys(FLAGS, not is_plain) | {
            "BLOCK": rows_triton.MAX_BLOCK
        }
        kind_of_logits = "plain" if is_plain else "transformed"
        found[f"statistics {kind_of_logits}"] = compile_kernel(
            rows_triton.statistics_kernel, constants, is_plain
        )
        for kind, write in itertools.product(Kind, (True, False)):
            name = f"gradient {kind.name} {'write' if write else 'mean'} {kind_of_logits}"
            all_constants = constants | {"KIND": int(kind), "WRITE": write}
            found[name] = compile_kernel(rows_triton.gradient_kernel, all_constants, is_plain)
    for has_centre, num_rows in itertools.product((True, False), (64, 128)):
        name = f"merge {has_centre} {num_rows}"
        constants = {"HAS_CENTRE": has_centre, "BLOCK": num_rows}
        found[name] = compile_kernel(rows_triton.merge_kernel, constants, True)
    print(json.dumps(found))


main()
