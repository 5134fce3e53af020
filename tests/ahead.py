"""Compiles Triton kernels for a GPU that need not be here, and reads their machine code."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Code(NamedTuple):
    """What a kernel was compiled to."""

    registers: int  # of a thread
    spills: int  # accesses to local memory in loops, where registers did not suffice
    narrow: int  # accesses of less than 4 bytes to global memory in loops
    loop: int  # instructions of the longest innermost loop
    products: int  # instructions for tensor cores
    shared: int  # bytes of shared memory of a program


def compiled(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    warps: int,
    stages: int | None = None,
    most_registers: int | None = None,
) -> Code:
    """Compiles a kernel.

    Args:
        types: Triton's types of those arguments that are known at run time, as "*bf16" or "i32".
            Pointers are multiples of 16, as torch's are.
        constants: values of all other arguments.
        capability: the GPU's compute capability, as 90.
        stages: tiles of a loop that are loaded at a time. None: as Triton decides.
        most_registers: of a thread. None: as the compiler decides.
    """
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for tool in ("ptxas", "cuobjdump"):
        if not (tools / tool).exists():
            pytest.skip(f"Triton came without {tool}")
    names = kernel.arg_names
    assert types.keys() | constants.keys() == set(names)
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={
            (number,): [["tt.divisibility", 16]]
            for number, name in enumerate(names)
            if types.get(name, "").startswith("*")
        },
    )
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": warps, "maxnreg": most_registers}
    options |= {} if stages is None else {"num_stages": stages}
    result = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return read(text, result.metadata.shared)


def read(text: str, shared: int) -> Code:
    """Reads the output of `cuobjdump -res-usage -sass`."""
    registers = re.search(r"REG:(\d+)", text)
    assert registers, text[:500]
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/ +(?:@!?U?P\w+ +)?(\S+)([^;]*);", text)
    at = {int(address, 16): number for number, (address, _, _) in enumerate(found)}
    operations = [operation for _, operation, _ in found]
    loops = []
    for number, (_, operation, operands) in enumerate(found):
        target = re.search(r"0x([0-9a-f]+)", operands)
        if operation.startswith("BRA") and target and at[int(target[1], 16)] < number:
            loops.append((at[int(target[1], 16)], number))
    inner = [
        last - first + 1
        for first, last in loops
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
    ]
    looped = [
        operation
        for number, operation in enumerate(operations)
        if any(first <= number <= last for first, last in loops)
    ]
    return Code(
        registers=int(registers[1]),
        spills=sum(operation.startswith(("LDL", "STL")) for operation in looped),
        narrow=sum(bool(re.match(r"(LDG|STG)\S*\.[US](8|16)", op)) for op in looped),
        loop=max(inner),
        products=sum("MMA" in operation for operation in operations),
        shared=shared,
    )
