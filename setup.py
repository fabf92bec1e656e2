"""Builds grjca_kernels._native through one ninja file, because every instruction set needs flags of its own."""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# Where a source lies says how it is compiled; the first row that fits decides.
RULES = {
    "csrc/*.cpp": "once",
    "csrc/cpu/dispatch.cpp": "once",
    "csrc/cpu/*.cpp": "per instruction set",
    "csrc/cuda/*.cu": "by nvcc",
}
INSTRUCTION_SETS = {  # on x86-64; elsewhere baseline alone. A source knows its own as GRJCA_ISA
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512",
}
X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast"
FLAGS += " -Wall -Wextra -Wno-maybe-uninitialized"  # the last is wrong about GCC 12's own AVX-512 header
NVCC_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"  # below: A100, PTX for newer, H100
NVCC_FLAGS += " -gencode 'arch=compute_80,code=[sm_80,compute_80]' -gencode arch=compute_90a,code=sm_90a"
BYTES_PER_JOB = 3 << 29  # 1.5 GiB
# Not setuptools' temporary folder: an editable install throws that away, and the next one would start afresh.
BUILD = Path("build", f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}")


def works(cxx, flag, header):
    """Whether a library comes out: what PATH holds may be a stub, or lack its headers or its linker."""
    with tempfile.TemporaryDirectory() as folder, suppress(OSError):
        command = [*shlex.split(cxx), flag, "-fPIC", "-shared", "-x", "c++", "-", "-o", f"{folder}/probe"]
        return subprocess.run(command, input=f"#include <{header}>\n", text=True, capture_output=True).returncode == 0


def jobs():
    """One per core, but no more than fit into the memory of the machine and of the container."""
    room = [(os.cpu_count() or 1) * BYTES_PER_JOB]
    with suppress(OSError):
        room += [int(kib) << 10 for kib in re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup 2 and 1
        with suppress(OSError, ValueError):
            room.append(int(Path("/sys/fs/cgroup", limit).read_text()))
    return max(1, min(room) // BYTES_PER_JOB)


def ninja_file(cxx, library):
    import pybind11  # here, because metadata and source distributions do without it

    # An isolated build finds pybind11 in a new folder every time; with a copy the commands, and so the objects, stay.
    headers = BUILD / f"pybind11-{pybind11.__version__}"
    shutil.copytree(pybind11.get_include(), headers, dirs_exist_ok=True)
    rule_of = {source: rule for glob, rule in reversed(RULES.items()) for source in sorted(Path().glob(glob))}
    nvcc = os.environ.get("CUDACXX", shutil.which("nvcc")) if "by nvcc" in rule_of.values() else None
    openmp = works(cxx, "-fopenmp", "omp.h")
    host = f"{cxx} {os.environ.get('CXXFLAGS', '')} {FLAGS} {'-fopenmp' if openmp else '-Wno-unknown-pragmas'}"
    once = f"{host} -isystem {headers} -isystem {shlex.quote(sysconfig.get_path('include'))}"
    tools = [("once", "", once + " -DGRJCA_X86=1" * X86 + " -DGRJCA_CUDA=1" * bool(nvcc))]
    for isa, flags in INSTRUCTION_SETS.items() if X86 else [("baseline", "")]:
        tools.append(("per instruction set", f".{isa}", f"{host} {flags} -DGRJCA_ISA={isa}"))
    link = f"{host} {'-bundle -undefined dynamic_lookup' if sys.platform == 'darwin' else '-shared'}"
    if nvcc:
        nvcc += f" -ccbin {shlex.split(cxx)[-1]}"
        tools.append(("by nvcc", "", f"{nvcc} {NVCC_FLAGS}"))
        link = f"{nvcc} -cudart static -shared" + " -Xcompiler -fopenmp" * openmp

    steps = [(s, f"{BUILD}/{s}{suffix}.o", tool) for rule, suffix, tool in tools for s in rule_of if rule_of[s] == rule]
    text = f"builddir = {BUILD}\nrule compile\n  command = $tool -Icsrc -MMD -MF $out.d -c $in -o $out\n"
    text += f"  depfile = $out.d\n  deps = gcc\nrule link\n  command = {link} $in -o $out\n"
    text += "".join(f"build {out}: compile {source}\n  tool = {tool}\n" for source, out, tool in steps)
    # Of an inline function that several objects contain, the linker keeps the first. They stand in the order of
    # INSTRUCTION_SETS, so that the one kept runs wherever any of its callers does.
    return text + f"build {library}: link {' '.join(out for _, out, _ in steps)}\n"


class BuildNative(build_ext):
    def build_extension(self, ext):
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        cxx = next((name for name in names if works(name, "-std=c++17", "cmath")), None)
        if not cxx:
            return self.do_without(ext, f"a working C++17 compiler (tried {', '.join(names)}; Debian: g++)")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            return self.do_without(ext, "the header Python.h (Debian: python3-dev)")
        library, target = BUILD / Path(self.get_ext_filename(ext.name)).name, Path(self.get_ext_fullpath(ext.name))
        BUILD.mkdir(parents=True, exist_ok=True)
        Path(BUILD, "build.ninja").write_text(ninja_file(cxx, library))
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        if subprocess.run([*ninja, "-f", BUILD / "build.ninja", "-j", str(jobs())]).returncode:
            raise CompileError("grjca_kernels: csrc did not compile; the messages above say why")
        self.mkpath(str(target.parent))
        self.copy_file(str(library), str(target))

    def do_without(self, ext, missing):
        ext.optional = True  # or setuptools would look for the library
        message = (
            f"grjca_kernels: the native kernels are not built, for want of {missing}. All of it works without them, but"
            " several times slower, on the PyTorch reference backend. Install what is missing, then this package again."
        )
        with suppress(OSError), open("/dev/tty", "w") as terminal:  # pip hides the output of an install that succeeds
            print(f"\n{message}", file=terminal)
        print(message, file=sys.stderr)


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[Extension("grjca_kernels._native", [])],  # its sources follow from RULES
)
