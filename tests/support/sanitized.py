"""The native code under AddressSanitizer and UBSan: ``python tests/support/sanitized.py``; arguments go to pytest.

It is built from a copy in build/sanitized, where it leaves the usual objects alone, and for one instruction set, for
compiling takes most of the time; GRJCA_INSTRUCTION_SET names another one, or all of them if it is empty. The tests run
in that folder, with this file as a plugin of pytest.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE, INSTALLED = (ROOT / "build" / "sanitized" / name for name in ("source", "installed"))
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1"
TESTS = ["tests/kernels/test_cpu.py", "tests/kernels/test_keeping.py"]
CASES = "everything or one-block-and-more or lengths or many-rows or four-modalities or empty or one-frame or hooks"
FOUND = "import grjca_kernels as g; from grjca_kernels.native import library; print(g.__file__, library.__file__)"


def main(arguments: list[str]) -> int:
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    build()
    preloaded = [_path(compiler, library) for library in ("libasan.so", "libstdc++.so")]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preloaded),  # Python itself is built without; the second, or a throw is not found
        "ASAN_OPTIONS": "detect_leaks=0",  # they are Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(INSTALLED / "tests" / "support"),  # for the plugin
    }
    found = subprocess.run(
        [sys.executable, "-c", FOUND], cwd=INSTALLED, env=environment, text=True, check=True, capture_output=True
    ).stdout
    if not all(Path(path).is_relative_to(INSTALLED) for path in found.split()):
        raise AssertionError(f"expected the package and the library of {INSTALLED}, got {found}")
    chosen = arguments or [*TESTS, "-k", CASES, "-m", "not slow"]
    pytest = [sys.executable, "-m", "pytest", "-p", "sanitized", "--numprocesses", "auto"]
    pytest.append("--capture=no")  # a report ends the process, and what pytest has captured is lost with it
    return subprocess.run([*pytest, *chosen], cwd=INSTALLED, env=environment).returncode


def build() -> None:
    """The package in INSTALLED, with the tests beside it."""
    left_out = shutil.ignore_patterns("_native*", "__pycache__", "results")
    for to, names in {
        SOURCE: ("csrc", "grjca_kernels", "python", "setup.py", "pyproject.toml", "README.md", "LICENSE"),
        INSTALLED: ("tests", "benchmarks", "pyproject.toml"),
    }.items():
        to.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.rmtree(to / name, ignore_errors=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, to / name, ignore=left_out)  # with times: ninja goes by them
            else:
                shutil.copy2(ROOT / name, to / name)
    environment = {"GRJCA_INSTRUCTION_SET": "avx2", **os.environ, "CXXFLAGS": FLAGS, "CUDACXX": ""}
    pip = [sys.executable, "-m", "pip", "install", ".", "--no-deps", "--upgrade", "--target", str(INSTALLED)]
    subprocess.run(pip, cwd=SOURCE, env=environment, check=True)


def pytest_configure() -> None:
    """All memory comes from malloc, around whose blocks AddressSanitizer sees what is out of bounds."""
    from grjca_kernels import memory

    memory.SMALLEST = sys.maxsize


def _path(compiler: list[str], library: str) -> str:
    command = [*compiler, f"-print-file-name={library}"]
    return subprocess.run(command, text=True, check=True, capture_output=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
