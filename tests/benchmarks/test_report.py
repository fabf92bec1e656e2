"""The tables of README.md and docs/results.md are those of the files; every figure in here is invented."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import report

ABOUT = {"device": "A CPU (R)", "threads": 2, "torch": "2"}


def case(implementation, seconds, pass_name="forward", shape="abaw, B = 12", **extra):
    about = {"shape": shape, "pass": pass_name, "implementation": implementation, "dtype": "float32", **extra}
    return {"stats": {"median": seconds}, "extra_info": about}


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A repository in which the report can write, and a function that saves a file of pytest-benchmark."""
    for name, path in {"RESULTS": "results", "README": "README.md", "PAGE": "PAGE.md"}.items():
        monkeypatch.setattr(report, name, tmp_path / path)
    for name in ("README.md", "PAGE.md"):
        (tmp_path / name).write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    (tmp_path / "results").mkdir()

    def save(name, *cases, **about):
        saved = {"machine_info": ABOUT | about, "commit_info": {"id": "abcdefgh", "dirty": False}, "benchmarks": cases}
        (tmp_path / "results" / name).write_text(json.dumps(saved))

    save.folder = tmp_path
    return save


def test_tables(published):
    steps = [case("eager", 0.3, "training step", saved_bytes=6_000_000), case("compiled", 0.25, "training step")]
    steps.append(case("fused", 0.1, "training step", saved_bytes=1_000_000))
    peak = case("fused", 9.0, "training step", peak_bytes=2_000_000)  # of the same place, with the time of a process
    forwards = [case("eager", 0.2), case("strong", 0.15), case("fused", 0.1)]
    published("a-cpu.json", *forwards, *steps, peak, case("MultiheadAttention", 1e-4, shape="call overhead"))
    assert report.main([]) == 0
    readme, page = ((published.folder / name).read_text() for name in ("README.md", "PAGE.md"))
    assert "| abaw, B = 12 | 150 | 100 | 1.5x | 300 | 100 | 3.0x |\n" in readme and "call overhead" not in readme
    assert "A CPU (R), 2 threads, torch 2, commit abcdefg, float32" in readme
    assert "| abaw, B = 12 | float32 | forward | 200 | 150 |  | 100 |  | 2.0x | 1.5x |\n" in page
    assert "| abaw, B = 12 | float32 | training step | 300 |  | 250 | 100 |  | 3.0x | 2.5x |\n" in page
    assert "| shape | dtype | pass | saved: eager, released | saved: fused | peak: fused |\n" in page
    assert "| abaw, B = 12 | float32 | training step | 6 | 1 | 2 |\n" in page
    assert page.startswith("before\n<!-- results -->\n### A CPU") and page.endswith("\n<!-- /results -->\nafter\n")


def test_a_gpu_shows_the_time_on_the_device(published):
    published("a-cpu.json", case("eager", 0.2), case("fused", 0.1))
    triton, cuda = (case(name, 0.1, device_ms=ms) for name, ms in (("triton", 0.4), ("cuda-graph", 0.2)))
    published("gpu.json", case("eager", 0.2, device_ms=1.0), triton, cuda, device="A GPU")
    assert report.main([]) == 0
    page = (published.folder / "PAGE.md").read_text()
    assert "| abaw, B = 12 | float32 | forward | 1 | 0.4 | 0.2 | 5.0x | 5.0x |\n" in page


def test_check(published, capsys):
    published("a-cpu.json", case("eager", 0.2), case("fused", 0.1))
    assert report.main(["--check"]) == 1 and report.main([]) == 0 and report.main(["--check"]) == 0
    page = published.folder / "PAGE.md"
    page.write_text(page.read_text().replace("| 200 |", "| 20 |"))
    assert report.main(["--check"]) == 1
    assert "| 20 |" in page.read_text(), "a check repairs nothing"
    page.write_text("no markers")
    assert report.main(["--check"]) == 1
    page.unlink()
    assert report.main(["--check"]) == 1
    assert "PAGE.md" in capsys.readouterr().err


def test_without_files(published):
    assert report.main([]) == 0
    assert report.NOTHING in (published.folder / "README.md").read_text()


@pytest.mark.skipif(not report.README.exists(), reason="needs the sources")
def test_the_tables_are_those_of_the_files():
    """The command finds its modules without pytest's help."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "benchmarks.report", "--check"]
    result = subprocess.run(command, cwd=report.ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
