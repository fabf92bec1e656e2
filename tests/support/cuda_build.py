"""The machine code of the CUDA C++ kernels, read from the library by cuobjdump. As a program, it prints a table."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DIRECTIONS, PRECISIONS = ("forward", "backward"), ("float32", "tf32", "bfloat16", "float16")
KERNELS = tuple(f"{direction}-{precision}" for direction in DIRECTIONS for precision in PRECISIONS)
KIB = 1024
REGISTERS = 64 * KIB  # of a multiprocessor
SHARED = {  # KiB of a multiprocessor, and whether two blocks are to share it: A100, A10, L4, H200, RTX PRO 6000
    "sm_80": (164, True), "sm_86": (100, False), "sm_89": (100, False), "sm_90": (228, True), "sm_120": (100, False)
}  # fmt: skip


def find(tool: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, where it is usually installed, or among what Triton brings."""
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which(tool, path=os.pathsep.join(folders))


def nvcc() -> str | None:
    """Find it as setup.py does."""
    named = os.environ.get("CUDACXX")
    return find("nvcc") if named is None else named or None


def library() -> Path:
    import grjca_kernels._native

    return Path(grjca_kernels._native.__file__)


# ---- what is in it


@dataclass(frozen=True)
class Built:
    """The machine code of a kernel for an architecture."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    local: int
    shared: int  # bytes that are not asked for at the launch

    def __str__(self) -> str:
        return f"{self.kernel}-{self.architecture}"


NAME = r"\w*?4cuda\d+(float32|tf32|bfloat16|float16)\d+(forward|backward)E\w*"
USAGE = re.compile(rf"^ Function {NAME}:\n(.*)$", re.MULTILINE)
FATBIN = re.compile(r"^Fatbin (elf|ptx) code:\n=+\narch = (\w+)$", re.MULTILINE)


def _sections(text: str) -> Iterator[tuple[str, str, str]]:
    """("elf" or "ptx", architecture, text) of everything that cuobjdump prints."""
    heads = list(FATBIN.finditer(text))
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        yield head[1], head[2], text[head.end() : following.start() if following else None]


def _dump(option: str) -> str:
    program = find("cuobjdump")
    if program is None:
        raise RuntimeError("cuobjdump: expected it beside nvcc or in the triton wheel; install the CUDA toolkit.")
    return subprocess.run([program, option, str(library())], capture_output=True, text=True, check=True).stdout


def built() -> list[Built]:
    """Every kernel for every architecture."""
    found = []
    for kind, architecture, text in _sections(_dump("-res-usage")):
        for usage in USAGE.finditer(text) if kind == "elf" else ():
            numbers = {name: int(number) for name, number in re.findall(r"\b(\w+):(\d+)", usage[3])}
            resources = (numbers[name] for name in ("REG", "STACK", "LOCAL", "SHARED"))
            found.append(Built(f"{usage[2]}-{usage[1]}", architecture, *resources))
    return found


def ptx() -> dict[tuple[str, str], Counter[str]]:
    """(kernel, architecture) -> how often its PTX has each instruction."""
    found = {}
    for kind, architecture, text in _sections(_dump("-ptx")):
        if kind == "ptx":
            for name in re.finditer(rf"\.entry {NAME}\(", text):  # of which a section has one
                words = re.findall(r"^\s+(?:\{ *)?(?:@!?%\w+ )?([a-z]\w*\.[\w.]+)", text, re.MULTILINE)
                found[f"{name[2]}-{name[1]}", architecture] = Counter(words)
    return found


def machine_code() -> dict[tuple[str, str], Counter[str]]:
    """(kernel, architecture) -> how often it has each instruction. Takes a quarter of a minute."""
    found = {}
    for kind, architecture, text in _sections(_dump("-sass")):
        for part in re.split(r"^\s+Function : ", text, flags=re.MULTILINE)[1:] if kind == "elf" else ():
            name = re.match(NAME, part)
            if name:
                words = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", part, re.MULTILINE)
                found[f"{name[2]}-{name[1]}", architecture] = Counter(words)
    return found


def count(words: Counter[str], name: str) -> int:
    """Count an instruction, whatever follows its name."""
    return sum(number for word, number in words.items() if word == name or word.startswith(name + "."))


def main() -> None:
    print(f"{'kernel':<20}{'for':<9}{'registers':>9}{'stack':>7}{'local':>7}{'shared':>8}  instructions")
    instructions = machine_code()
    for one in sorted(built(), key=lambda one: (KERNELS.index(one.kernel), one.architecture)):
        words = instructions[one.kernel, one.architecture]
        counts = {name: count(words, name) for name in ("HMMA", "LDSM", "LDGSTS", "MUFU.TANH", "STL", "LDL")}
        said = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
        print(
            f"{one.kernel:<20}{one.architecture:<9}{one.registers:>9}{one.stack:>7}{one.local:>7}{one.shared:>8}  "
            f"{words.total()}: {said}"
        )
    for architecture in sorted({architecture for _, architecture in ptx()}):
        print(f"PTX for {architecture} and later: {sum(key[1] == architecture for key in ptx())} kernels")


if __name__ == "__main__":
    main()
