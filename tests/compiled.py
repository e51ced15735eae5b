"""Resources of Triton kernels that were compiled for a GPU."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton


def resources_of(compiled, backend: str) -> dict[str, int]:
    """Returns the kernel's shared memory, registers and spills. compiled: from triton.compile; backend: cuda or hip."""
    if backend == "cuda":
        [tool] = Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        found = re.findall("(REG|STACK):([0-9]+)", usage)
    else:
        found = re.findall("([a-z]+_(?:spill_)?count): *([0-9]+)", compiled.asm["amdgcn"])
    return {"shared": compiled.metadata.shared, **{name: int(number) for name, number in found}}
