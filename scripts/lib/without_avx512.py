"""ONNX Runtime as without AVX-512 and VNNI, on a processor that has them: real kernels, real speed.

Whether u8 x s8 sums saturate, and how much INT8 gains, depends on the processor. ONNX Runtime has no switch
for it and this kernel may not let a process hide its CPUID, so a private copy of the library is taken whose
`cpuid` instructions trap into without_avx512.c. Only measurements use it. x86-64 Linux with gcc and objdump.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
CPUID, TRAP = b"\x0f\xa2", b"\xcc\x90"
_LOADED, _ENTRY = 1, "<IIQQQQQQ"


class Impossible(Exception):
    """This machine cannot make such a copy; says why."""


def environment(python: Path, scratch: Path) -> Mapping[str, str]:
    """The variables under which `python` loads such a copy, made in `scratch` when it is not there.

    Raises:
        Impossible: a tool is missing, or the library has no `cpuid`.
    """
    for tool in ("gcc", "objdump"):
        if shutil.which(tool) is None:
            raise Impossible(f"{tool} is not installed")
    package = Path(_ask(python, "import onnxruntime, os; print(os.path.dirname(onnxruntime.__file__))"))
    version = _ask(python, "import onnxruntime; print(onnxruntime.__version__)")
    home = scratch / f"onnxruntime-{version}-without-avx512"
    if not (home / "done").exists():
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(package, home / "onnxruntime")
        if not sum(hide(library) for library in (home / "onnxruntime/capi").glob("*.so*")):
            raise Impossible("no cpuid instruction was found in ONNX Runtime")
        source, handler = HERE / "without_avx512.c", home / "handler.so"
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", handler, source], check=True)
        (home / "done").touch()
    path = os.pathsep.join(filter(None, (str(home), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "LD_PRELOAD": str(home / "handler.so")}


def hide(library: Path) -> int:
    """Turn each `cpuid` of an ELF library into a trap; returns how many there were."""
    listing = subprocess.run(
        ["objdump", "--disassemble", "--no-show-raw-insn", library],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    code = bytearray(library.read_bytes())
    places = [
        _offset(code, int(line.split(":")[0], 16))
        for line in listing.splitlines()
        if line.rstrip().endswith("cpuid")
    ]
    for place in places:
        if code[place : place + 2] != CPUID:
            raise Impossible(f"{library.name} is not what its disassembly says")
        code[place : place + 2] = TRAP
    library.write_bytes(code)
    return len(places)


def _offset(elf: bytes, address: int) -> int:
    """Where an address of an ELF64 file lies in it."""
    table, count = struct.unpack_from("<Q", elf, 32)[0], struct.unpack_from("<H", elf, 56)[0]
    for k in range(count):
        kind, _, offset, start, _, size, _, _ = struct.unpack_from(
            _ENTRY, elf, table + k * struct.calcsize(_ENTRY)
        )
        if kind == _LOADED and start <= address < start + size:
            return int(address - start + offset)
    raise Impossible("an instruction lies outside of the file")


def _ask(python: Path, question: str) -> str:
    return subprocess.run([python, "-c", question], capture_output=True, text=True, check=True).stdout.strip()
