"""Compiles kernel variants to cubins, without a GPU; needs Triton, which running the result does not.

compiled = compile_variant(variant, sm=90)
save(directory, sm, variants)              DIRECTORY/<variant.name>.cubin each, and DIRECTORY/kernels.json
load(directory)                            what `save` wrote: sm, and the kernels by variant name; no Triton
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.kernels.launches import Variant

INDEX = "kernels.json"
REQUIREMENT = "triton>=3.7,<3.8"
# Triton adds two addresses at the end: its scratch memory and its profiler's. These kernels use neither: pass 0.
HIDDEN = (("global_scratch", "*u8"), ("profile_scratch", "*u8"))


@dataclass(frozen=True, slots=True)
class Compiled:
    """A variant as a GPU loads and launches it.

    entry: the function's name in the cubin.
    arguments: (name, type) in order; "*..." is an 8-byte address, "i32" 4 bytes. The last two are always 0.
    shared: bytes of dynamic shared memory to launch with; above 48 KiB a function must be told beforehand.
    num_warps: threads of a block / 32.
    registers: per thread.
    spills: bytes per thread that did not fit into registers (local memory of any kind).
    """

    name: str
    kernel: str
    entry: str
    arguments: tuple[tuple[str, str], ...]
    shared: int
    num_warps: int
    registers: int
    spills: int
    cubin: bytes

    @property
    def block(self) -> tuple[int, int, int]:
        return (32 * self.num_warps, 1, 1)


def require_triton(what: str) -> str:
    """Triton's version; GateworkError where it is not installed."""
    if find_spec("triton") is None:
        fix = f"pip install '{REQUIREMENT}'"
        raise GateworkError(f"{what} needs the kernels' compiler", got="no triton", fix=fix)
    return version("triton")


def compile_variant(variant: Variant, sm: int) -> Compiled:
    """GateworkError with Triton's words where it refuses."""
    binary = triton_compile(variant, sm)
    metadata, cubin = binary.metadata, binary.asm["cubin"]
    assert metadata.global_scratch_size == metadata.profile_scratch_size == 0
    registers, spills = _resources(cubin, metadata.name)
    return Compiled(
        name=variant.name,
        kernel=variant.kernel,
        entry=metadata.name,
        arguments=(*variant.arguments, *HIDDEN),
        shared=metadata.shared,
        num_warps=metadata.num_warps,
        registers=registers,
        spills=spills,
        cubin=cubin,
    )


def triton_compile(variant: Variant, sm: int) -> Any:
    """Triton's CompiledKernel, whose `asm` holds every stage from ttir to cubin. Addresses are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gatework.plugins.moe.kernels.registry import KERNELS

    function, constants = KERNELS[variant.kernel], dict(variant.constants)
    types = dict(variant.arguments)
    assert sorted(function.arg_names) == sorted([*types, *constants]), (function.arg_names, types, constants)
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    assert [name for name in signature if name in types] == list(types)
    aligned = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(function, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    try:
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.disable_line_info = True  # it would carry this machine's paths into the cubin
            return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    except Exception as error:
        raise GateworkError(f"Triton does not compile {variant.kernel} for sm_{sm}", got=str(error)) from error


def _resources(cubin: bytes, entry: str) -> tuple[int, int]:
    """Registers and bytes of local memory per thread."""
    text = dump(cubin, "-res-usage")
    found = re.search(rf"Function {re.escape(entry)}:\s*(.*)", text)
    assert found, text
    usage = {name: int(count) for name, count in re.findall(r"(\w+):(\d+)", found[1])}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def dump(cubin: bytes, option: str) -> str:
    """What NVIDIA's cuobjdump, which comes with Triton, says of it."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def save(directory: Path, sm: int, variants: Iterable[Variant]) -> list[str]:
    """Compile and write; returns the names of the files. The same variants give the same index."""
    directory.mkdir(parents=True, exist_ok=True)
    index = []
    for variant in variants:
        entry = asdict(compile_variant(variant, sm))
        cubin = entry.pop("cubin")
        (directory / f"{variant.name}.cubin").write_bytes(cubin)
        index.append(entry | {"sha256": sha256(cubin).hexdigest()})
    about = {"sm": sm, "triton": require_triton("this"), "kernels": index}
    (directory / INDEX).write_text(json.dumps(about, indent=1) + "\n")
    return [INDEX, *(f"{entry['name']}.cubin" for entry in index)]


def load(directory: Path) -> tuple[int, dict[str, Compiled]]:
    """Compute capability (90) and compiled kernels by `Variant.name`; GateworkError for an altered or missing file."""
    found, file = {}, directory / INDEX
    try:
        about = json.loads(file.read_text())
        for entry in about["kernels"]:
            file = directory / f"{entry['name']}.cubin"
            cubin, digest = file.read_bytes(), entry.pop("sha256")
            if sha256(cubin).hexdigest() != digest:
                raise ValueError
            arguments = tuple((name, kind) for name, kind in entry.pop("arguments"))
            found[entry["name"]] = Compiled(**entry, arguments=arguments, cubin=cubin)
        return about["sm"], found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GateworkError(f"{file} is damaged or missing", fix="build the engine again") from error
