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

# A source's path decides how it is compiled; the first matching row applies.
RULES = {
    "csrc/*.cpp": "once",
    "csrc/cpu/dispatch.cpp": "once",
    "csrc/cpu/stop.cpp": "once",
    "csrc/cpu/*.cpp": "per instruction set",
    "csrc/cuda/launch.cu": "by nvcc",
    "csrc/cuda/*.cu": "by nvcc, per precision",
}
INSTRUCTION_SETS = {  # on x86-64; elsewhere baseline alone. A source knows its own as GRJCA_ISA
    "baseline": "-O2 -fpeel-loops",  # in half the time of -O3, with 8 % more instructions: processors of before 2013
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512",
    "avx512bf16": "-mavx512bf16 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
}
X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast"
FLAGS += " -Wall -Wextra -Wno-maybe-uninitialized"  # that warning is a false alarm on GCC 12's own AVX-512 header
NVCC_FLAGS = "-O3 -std=c++17 -Xfatbin -compress-all -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
# Its runtime is hidden: PyTorch brings one of its own, whose functions would otherwise be taken for these.
LINK_CUDA = "-cudart static -shared -Xlinker --exclude-libs,ALL"
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")  # a source knows its own as GRJCA_PRECISION
ARCHITECTURES = ["80", "90"]  # A100; H100 and H200; and by PTX whatever is newer
BYTES_PER_JOB = 3 << 29  # 1.5 GiB
# Not setuptools' temporary folder: an editable install throws that away, and the next one would start afresh.
BUILD = Path("build", f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}")


def works(cxx, flag, header, text=""):
    """Return whether this compiler makes a library: one on PATH may be a stub, or lack its headers or its linker."""
    with tempfile.TemporaryDirectory() as folder, suppress(OSError):
        command = [*shlex.split(cxx), flag, "-fPIC", "-shared", "-x", "c++", "-", "-o", f"{folder}/probe"]
        source = f"#include <{header}>\n{text}\n"
        return subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0


# The kernels need nvcc's headers, a host compiler that it accepts, kernel arguments of more than 4 KB (CUDA 12.1), and
# an architecture with cp.async (8.0).
PROBE = """#include <cuda_runtime.h>
#include <string>
struct Large { char bytes[8000]; };
__global__ void probe(const __grid_constant__ Large) { asm volatile("cp.async.wait_all;"); }
int version() { int n = 0; return cudaDriverGetVersion(&n) + n; }
"""


def find_nvcc(cxx):
    """The command of an nvcc that works, or None. An empty CUDACXX turns the CUDA kernels off."""
    nvcc = os.environ.get("CUDACXX")
    if nvcc is None:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc:
        return None
    if all(re.fullmatch(r"\d+[a-z]?", name) for name in architectures()):
        command = f"{nvcc} -ccbin {shlex.split(cxx)[-1]} {generate_code()}"
        fault = fault_of(command)
        if not fault:
            return command
    else:
        fault = f"GRJCA_CUDA_ARCHITECTURES: expected numbers as in '80;90', got {';'.join(architectures())!r}"
    tell(
        "grjca_kernels: the CUDA C++ kernels are not built. They take the CUDA toolkit, 12.1 or later, a host compiler "
        f"that it accepts, and architectures from 80 on; here, {fault}. CUDACXX names another nvcc, CXX another "
        "compiler."
    )
    return None


def fault_of(nvcc):
    """Why this command does not make a library, or None."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text(PROBE)
        line = [*shlex.split(f"{nvcc} {NVCC_FLAGS} {LINK_CUDA}"), str(source), "-o", f"{folder}/probe"]
        try:
            result = subprocess.run(line, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except OSError as error:
            return str(error)
    if result.returncode == 0:
        return None
    said = result.stdout.splitlines() or [f"{line[0]} fails without a word"]
    return next((text for text in said if re.search("error|fatal", text)), said[0])


def architectures():
    given = os.environ.get("GRJCA_CUDA_ARCHITECTURES", "").replace(",", ";").split(";")
    return [name.strip() for name in given if name.strip()] or ARCHITECTURES


def generate_code():
    """The flags for machine code of every architecture. The front end takes a third of nvcc's time and nothing in csrc
    depends on the architecture, so it runs once, for the oldest, whose PTX also runs on newer GPUs. Architectures named
    with a letter are compiled separately."""
    plain = sorted((name for name in architectures() if name.isdecimal()), key=int)
    codes = {name: [f"sm_{name}"] for name in architectures() if not name.isdecimal()}
    if plain:
        codes[plain[0]] = [*(f"sm_{name}" for name in plain), f"compute_{plain[0]}"]
    return " ".join(f"-gencode 'arch=compute_{name},code=[{','.join(code)}]'" for name, code in codes.items())


def jobs():
    """One job per core, but no more than fit into the memory of the machine and of the container."""
    room = [(os.cpu_count() or 1) * BYTES_PER_JOB]
    with suppress(OSError):
        room += [int(kib) << 10 for kib in re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup 2 and 1
        with suppress(OSError, ValueError):
            room.append(int(Path("/sys/fs/cgroup", limit).read_text()))
    return max(1, min(room) // BYTES_PER_JOB)


def instruction_sets(cxx):
    """The instruction sets that the library will contain: name -> flags."""
    alone = os.environ.get("GRJCA_INSTRUCTION_SET")
    if alone and X86:  # the library then knows no other, and chooses none at run time
        if alone not in (takes_all := [name for name in INSTRUCTION_SETS if name != "avx512bf16"]):
            raise CompileError(f"GRJCA_INSTRUCTION_SET: expected one of {', '.join(takes_all)}, got {alone!r}")
        return {"baseline": INSTRUCTION_SETS[alone]}
    sets = dict(INSTRUCTION_SETS) if X86 else {"baseline": ""}
    asked = 'int asked() { return __builtin_cpu_supports("avx512bf16"); }'
    if X86 and not works(cxx, "-mavx512bf16", "immintrin.h", asked):  # an older compiler
        del sets["avx512bf16"]
    return sets


def ninja_file(cxx, library):
    import pybind11  # here, because metadata and source distributions do without it

    # An isolated build finds pybind11 in a new folder every time; with a copy the commands, and so the objects, stay.
    headers = BUILD / f"pybind11-{pybind11.__version__}"
    shutil.copytree(pybind11.get_include(), headers, dirs_exist_ok=True)
    rule_of = {source: rule for glob, rule in reversed(RULES.items()) for source in sorted(Path().glob(glob))}
    nvcc = find_nvcc(cxx)
    openmp = works(cxx, "-fopenmp", "omp.h")
    given, own, sets = os.environ.get("CXXFLAGS", ""), FLAGS, instruction_sets(cxx)
    if re.search(r"-O[01g]\b", given):  # somebody debugs; the -O2 that distributions set is nobody's wish
        own = own.replace("-O3 ", "")
        sets = {name: flags.replace(INSTRUCTION_SETS["baseline"], "") for name, flags in sets.items()}
    host = f"{cxx} {given} {own} {'-fopenmp' if openmp else '-Wno-unknown-pragmas'}"
    once = f"{host} -isystem {headers} -isystem {shlex.quote(sysconfig.get_path('include'))}"
    if nvcc:
        names = ";".join(architectures())
        once += f""" '-DGRJCA_CUDA="{names}"'"""
    once += " -DGRJCA_X86=1" * ("avx2" in sets) + " -DGRJCA_AVX512BF16=1" * ("avx512bf16" in sets)
    tools = [("once", "", once)]
    for isa, flags in sets.items():
        tools.append(("per instruction set", f".{isa}", f"{host} {flags} -DGRJCA_ISA={isa}"))
    link = f"{host} {'-bundle -undefined dynamic_lookup' if sys.platform == 'darwin' else '-shared'}"
    if nvcc:
        tools.append(("by nvcc", "", f"{nvcc} {NVCC_FLAGS}"))
        for precision in PRECISIONS:
            tools.append(
                ("by nvcc, per precision", f".{precision}", f"{nvcc} {NVCC_FLAGS} -DGRJCA_PRECISION={precision}")
            )
        link = f"{nvcc} {LINK_CUDA}" + " -Xcompiler -fopenmp" * openmp

    steps = [(s, f"{BUILD}/{s}{suffix}.o", tool) for rule, suffix, tool in tools for s in rule_of if rule_of[s] == rule]
    text = f"builddir = {BUILD}\nrule compile\n  command = $tool -Icsrc -MMD -MF $out.d -c $in -o $out\n"
    text += f"  depfile = $out.d\n  deps = gcc\nrule link\n  command = {link} $in -o $out\n"
    longest_first = {"csrc/cuda/backward.cu": 0, "csrc/cuda/forward.cu": 1}
    for source, out, tool in sorted(steps, key=lambda step: longest_first.get(step[0].as_posix(), 2)):
        text += f"build {out}: compile {source}\n  tool = {tool}\n"
    # The linker keeps the first copy of an inline function that several objects contain. Objects are in the order of
    # INSTRUCTION_SETS, so the copy kept runs on every processor that runs one of its callers.
    return text + f"build {library}: link {' '.join(out for _, out, _ in steps)}\n"


def tell(message):
    with suppress(OSError), open("/dev/tty", "w") as terminal:  # pip hides the output of an install that succeeds
        print(f"\n{message}", file=terminal)
    print(message, file=sys.stderr)


class BuildNative(build_ext):
    def build_extension(self, ext):
        if sys.platform == "win32":
            return self.do_without(ext, "Linux or macOS; on Windows, that is WSL")
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
            if sys.platform != "linux":  # where nobody has tried them yet
                return self.do_without(ext, "a compiler that accepts them; the messages above say why")
            raise CompileError("grjca_kernels: csrc did not compile; the messages above say why")
        self.mkpath(str(target.parent))
        self.copy_file(str(library), str(target))

    def do_without(self, ext, missing):
        ext.optional = True  # or setuptools would look for the library
        message = (
            f"grjca_kernels: the native kernels are not built, for want of {missing}. All of it works without them, but"
            " several times slower, on the PyTorch reference backend. Install what is missing, then this package again."
        )
        tell(message)


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[Extension("grjca_kernels._native", [])],  # its sources follow from RULES
)
