"""Compile the Triton kernels for GPUs, without one, and record their registers and spills.

Needs the `triton` package, which is part of torch's CUDA builds: `make test-triton` makes an environment with it.

    .venv-triton/bin/python -m benchmarks.gpu.cubins
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.measure import show
from modeling_grin import gpu_kernels_grinmoe as gpu
from modeling_grin.kernels import gpu_experts

CAPABILITIES = (80, 90)  # A100; H100 and H200
THREADS_OF_WARP = 32

CHOICE = {"NUM_EXPERTS": 16, "COLUMNS": 16, "TOP_K": 2, "TOKENS": gpu.TOKENS_PER_PROGRAM}
SAMPLED = {**CHOICE, "SAMPLE": True, "EXCEPTION": True}
FEW = {"TOP_K": 2, "ROWS": gpu_experts.BLOCK_ROWS, "COLUMNS": gpu_experts.BLOCK_COLUMNS}
CHOOSE_TYPES = "*bf16 *i64 *i64 *fp32 *i1 i32 fp32 fp32"
FEW_TYPES = "*bf16 *i64 *bf16 *bf16 *bf16 i32 i32 i32"
# Name -> kernel, types of its arguments, constants.
VARIANTS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "jitter": (gpu.jitter_kernel, "*bf16 *i64 *bf16 i32 fp32 fp32", {"PAIRS": gpu.PAIRS_PER_PROGRAM}),
    "choose, training": (gpu.choose_kernel, CHOOSE_TYPES, SAMPLED),
    "choose, inference": (gpu.choose_kernel, CHOOSE_TYPES, {**SAMPLED, "SAMPLE": False}),
    "choose, backward": (gpu.choose_backward_kernel, "*bf16 *i64 *fp32 *bf16 i32 fp32", CHOICE),
    "experts, w1 and w3, 16 slots": (gpu_experts.few_slots_kernel, FEW_TYPES, {**FEW, "SLOTS": 16, "GATED": True}),
    "experts, w2, 16 slots": (gpu_experts.few_slots_kernel, FEW_TYPES, {**FEW, "SLOTS": 16, "GATED": False}),
    "experts, w1 and w3, 64 slots": (gpu_experts.few_slots_kernel, FEW_TYPES, {**FEW, "SLOTS": 64, "GATED": True}),
}


def compile_for(capability: int, kernel: Any, types: str, constants: dict[str, Any]) -> Any:
    """Compile a kernel whose pointers and sizes are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, types.split(), strict=True)) | dict.fromkeys(constants, "constexpr")
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if signature[name].startswith("*") or signature[name] == "i32"
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    return compile(source, target=GPUTarget("cuda", capability, THREADS_OF_WARP), options={"enable_fp_fusion": False})


def resources(cubin: bytes) -> dict[str, int]:
    """Return the registers, stack and local memory (spills) of a cubin's kernel, and its instructions."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run([tools / "cuobjdump", flag, path], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = {name: int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL", "SHARED")}
    return {**found, "SASS": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))}


COLUMNS = ["kernel", "capability", "registers", "stack", "spills", "shared memory", "instructions"]


def main(record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False) -> None:
    """Compile every kernel for every capability. Example: python -m benchmarks.gpu.cubins --record"""
    rows = []
    for name, (kernel, types, constants) in VARIANTS.items():
        for capability in CAPABILITIES:
            compiled = compile_for(capability, kernel, types, constants)
            used = resources(compiled.asm["cubin"])
            shared = f"{compiled.metadata.shared} bytes"
            numbers = [str(used["REG"]), f"{used['STACK']} bytes", f"{used['LOCAL']} bytes", shared, str(used["SASS"])]
            rows.append([name, f"sm_{capability}", *numbers])
    show("Triton kernels, compiled for GPUs and not run", COLUMNS, rows, record)


if __name__ == "__main__":
    typer.run(main)
