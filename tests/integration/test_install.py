"""Installation"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from pytest import fixture, mark

import grjca  # noqa: F401
import grjca_kernels  # noqa: F401

ROOT = Path(__file__).parents[2]
LIBRARIES = Path(torch.__file__).parents[1]
pytestmark = [mark.slow, mark.uses("build")]
needs_sources = mark.skipif(not Path(ROOT, "csrc").exists(), reason="needs the sources")
needs_compiler = mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")


def run(*command: str | Path, stderr: int = subprocess.PIPE, **options) -> str:
    line = [str(part) for part in command]
    result = subprocess.run(line, stdout=subprocess.PIPE, stderr=stderr, text=True, **options)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout


class Environment:
    """A new one, which sees the libraries of this one, but not this package."""

    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.folder, self.bin = folder, folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / "python"
        self.packages = Path(run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        Path(self.packages, "libraries.pth").write_text(f"{LIBRARIES}\n")

    def pip(self, *arguments: str | Path) -> None:
        run(sys.executable, "-m", "pip", "--python", self.python, *arguments)

    def run(self, *command: str | Path, **options) -> str:
        """Run a command without a compiler: only what this environment brings is on the path."""
        environment = {key: value for key, value in os.environ.items() if key not in ("CXX", "CC", "PYTHONPATH")}
        return run(*command, env=environment | {"PATH": str(self.bin)}, **options)

    def files(self) -> set[Path]:
        return {path for path in self.folder.rglob("*") if "__pycache__" not in path.parts}


@fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A folder with the source distribution and the wheel; what is compiled already is not compiled again."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--sdist", "--wheel", "--outdir", folder, ROOT)
    return folder


@needs_sources
@needs_compiler
def test_wheel(distributions, tmp_path):
    """`python -m build`: the wheel passes tests of every layer where there is no compiler, and is uninstalled whole"""
    environment = Environment(tmp_path / "venv")
    before = environment.files()
    environment.pip("install", "--no-deps", "--no-index", next(distributions.glob("*.whl")))
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    code = "import grjca_kernels, grjca; print(grjca_kernels.__file__, grjca.__file__, grjca_kernels.backends()['cpu'])"
    ours, theirs, reason = environment.run(environment.python, "-c", code, cwd=tmp_path).split()
    assert Path(ours).is_relative_to(environment.packages) and Path(theirs).is_relative_to(environment.packages)
    assert reason == "None"
    of_library = [f"tests/library/test_{name}.py" for name in ("reference", "manual_backward", "module")]
    layers = [*of_library, "tests/kernels/test_cpu.py"]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "released-hierarchical or everything or backends"]
    environment.run(environment.python, "-m", "pytest", *options, *layers, cwd=tmp_path)
    if find_spec("jsonargparse"):
        assert "train" in environment.run(environment.bin / "grjca", "--help")
    environment.pip("uninstall", "--yes", "grjca-kernels")
    assert environment.files() == before


@needs_sources
@needs_compiler
def test_source_distribution(distributions):
    """The source distribution holds native code, tests and documents; the wheel the package, typed, and no tests"""
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    expected = run("git", "-C", ROOT, "ls-files", "csrc", "tests", "benchmarks", "grjca_kernels", "python").split()
    assert {x for x in expected if Path(ROOT, x).exists() and not x.startswith("benchmarks/results/")} <= held
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "setup.py", "pyproject.toml"} <= held
    with zipfile.ZipFile(next(distributions.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    library = f"grjca_kernels/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert {library, "grjca_kernels/py.typed", "grjca_kernels/operator.md", "grjca_kernels/_native.pyi"} <= set(names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"grjca", "grjca_kernels"}


@needs_sources
def test_without_compiler(tmp_path):
    """Built where no compiler works, it installs all the same, says so, and computes by the reference"""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "grjca_kernels", "python"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    wheels = tmp_path / "wheels"
    without = os.environ | {"CXX": "/nonexistent", "CUDACXX": ""}
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", wheels, tmp_path]
    said = run(*command, env=without, stderr=subprocess.STDOUT)
    assert "the native kernels are not built, for want of a working C++17 compiler" in said
    environment = Environment(tmp_path / "venv")
    environment.pip("install", "--no-deps", "--no-index", next(wheels.glob("*.whl")))
    code = (
        "import torch; from grjca_kernels import GatedRJCAFused, backends; print(backends()['cpu']);"
        "print(*(y.shape for y in GatedRJCAFused(5, 3, 4)(torch.randn(2, 4, 5), torch.randn(2, 4, 3))))"
    )
    reason, shapes = environment.run(environment.python, "-c", code, cwd=tmp_path / "venv").splitlines()
    assert "install a C++17 compiler" in reason and shapes == "torch.Size([2, 4, 5]) torch.Size([2, 4, 3])"


@needs_sources
@mark.uses("setuptools")
def test_windows(tmp_path):
    """On Windows, here only pretended, the build leaves the native code out and says so"""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    code = (
        "import runpy, sys, sysconfig, setuptools, setuptools.command.build_ext\n"
        "sysconfig.get_config_vars()\n"
        "sys.platform, sys.argv = 'win32', ['setup.py', '-q', 'build_ext', '--build-lib', 'out']\n"
        "runpy.run_path('setup.py')\n"
    )
    said = run(sys.executable, "-c", code, cwd=tmp_path, stderr=subprocess.STDOUT)
    assert "the native kernels are not built" in said and "WSL" in said and not list(tmp_path.rglob("out/*/_native*"))


def test_portable():
    """Nothing in the Python code assumes Linux: no module that others lack, and files of /proc only where they exist"""
    lacking = {"fcntl", "grp", "pwd", "resource", "termios", "pty", "posix", "syslog", "spwd", "crypt"}  # on Windows
    for package in ("grjca_kernels", "grjca"):
        for path in Path(sys.modules[package].__file__).parent.rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not lacking.intersection(name.partition(".")[0] for name in names), path
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("/proc"):
                    assert path.name == "environment.py", path  # which tries, and goes on without
    code = (
        "import sys, psutil, torch._dynamo\n"  # these look at sys.platform themselves
        "sys.modules.update(dict.fromkeys(('fcntl', 'resource', 'pwd', 'grp', 'termios')))\n"  # importing them fails
        "sys.platform = 'win32'\n"
        "import grjca_kernels, grjca.environment\n"
        "y = grjca_kernels.GatedRJCAFused(5, 3, 4, backend='reference')(torch.randn(2, 4, 5), torch.randn(2, 4, 3))\n"
        "print(*(x.shape for x in y))"
    )
    shapes = run(sys.executable, "-c", code, cwd=ROOT)
    assert shapes.strip() == "torch.Size([2, 4, 5]) torch.Size([2, 4, 3])"
