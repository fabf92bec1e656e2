"""Every example runs, and does what it says."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="needs the sources")


def run(name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run an example, and return what it prints."""
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments)
    return capsys.readouterr().out


def test_swap(capsys):
    printed = run("swap", capsys)
    assert "flat gates, T = 2, L = 300, widths (256, 128)" in printed
    assert float(printed.split("largest difference: ")[1].split()[0]) < 1e-5


def test_live(capsys):
    printed = run("live", capsys)
    assert [line.split(":")[0] for line in printed.splitlines()[:-1]] == [f"frame {n}" for n in range(3, 31, 3)]


def test_three_modalities(capsys):
    printed = run("three_modalities", capsys)
    assert "fused: (3, 50, 144)" in printed and "'text': (3, 50, 48)" in printed


def test_training_loop(capsys):
    printed = run("training_loop", capsys, "25")
    assert float(printed.split("CCC of a new batch: ")[1]) > 0.6


def test_every_example_is_tested_and_linked():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"swap", "live", "three_modalities", "training_loop", "extract_with_torchvision"}
    pages = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    assert all(f"examples/{name}.py" in pages for name in names)
    assert "torchvision" not in sys.modules
