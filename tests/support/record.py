"""Keeps what passed here, and writes the table "Works with" of docs/compatibility.md from what was kept.

``python tests/support/record.py`` runs the tests of this folder, with ``--all`` every test there is, and keeps their
outcomes in ``results/``, a file for each platform, Python and PyTorch; ``--render`` only rewrites the table.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest

FOLDER = Path(__file__).parents[1] / "integration"
ROOT, RESULTS = FOLDER.parents[1], FOLDER / "results"
PAGE = ROOT / "docs" / "compatibility.md"
MARKERS = "<!-- works with -->", "<!-- /works with -->"
PACKAGES = ("torch", "numpy", "triton", "accelerate", "lightning", "onnx", "onnxruntime", "onnxscript", "peft",
            "safetensors", "transformers")  # fmt: skip
GPU = " on a GPU"
Record = dict[str, Any]


class Row(NamedTuple):
    """A test: where it stands, and what it shows."""

    area: str
    file: str
    test: str
    claim: str


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="run every test, not only those of this folder")
    parser.add_argument("--render", action="store_true", help="only rewrite docs/compatibility.md")
    parser.add_argument("--commit", default=None, help="what the sources are, where git does not tell")
    arguments = parser.parse_args(argv)
    code = 0
    if not arguments.render:
        outcomes, commit = Outcomes(), arguments.commit or _commit()
        code = int(pytest.main(["-q", *options(), str(FOLDER.parent if arguments.all else FOLDER)], plugins=[outcomes]))
        if not outcomes.counts:
            return code or 1
        path = keep(outcomes, commit)
        print(f"wrote {path}")
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(replaced(text, table(read())), encoding="utf-8")
    return code


def options() -> list[str]:
    checks = FOLDER.parent / "repository" / "test_record.py"  # of what is about to be written
    return ["--all", "--numprocesses", "auto", "--dist", "loadfile", "-p", "no:cacheprovider", f"--ignore={checks}"]


class Outcomes:
    """Collect the worst outcome among each test's cases; cases for a GPU count as a separate test."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.tests: dict[str, str] = {}
        self.uses: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome = report.outcome
        if report.when != "call" and outcome == "passed":
            return
        self.counts[outcome] = self.counts.get(outcome, 0) + 1
        path, _, name = report.nodeid.partition("::")
        if FOLDER.name not in Path(path).parts:
            return
        properties = dict(report.user_properties)
        key = f"{Path(path).name}::{name.partition('[')[0]}{GPU if properties.get('gpu') else ''}"
        if outcome == "skipped":
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            outcome = reason.removeprefix("Skipped: ")
        before = self.tests.get(key)
        if before is None or outcome == "failed" or (outcome == "passed" and before != "failed"):
            self.tests[key] = outcome
        self.uses[key] = list(properties.get("uses", ()))


def keep(outcomes: Outcomes, commit: str) -> Path:
    record = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "compiler": any(map(shutil.which, ("c++", "g++", "clang++"))),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        **{name: outcomes.counts.get(name, 0) for name in ("passed", "failed", "skipped")},
        "tests": dict(sorted(outcomes.tests.items())),
        "uses": {key: used for key, used in sorted(outcomes.uses.items()) if used},
    }
    torch = record["packages"]["torch"].partition("+")[0]
    name = f"{record['platform']} python{record['python']} torch{torch}".lower().replace(" ", "-")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- the table


def read(folder: Path = RESULTS) -> list[Record]:
    """Return the records, from the oldest PyTorch to the newest."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(records, key=lambda record: _order(record["packages"]["torch"]))


def _order(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def rows() -> Iterator[Row]:
    """Every test of this folder."""
    for path in sorted(FOLDER.glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        area = (ast.get_docstring(tree) or "").partition("\n")[0]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield Row(area, path.name, node.name, " ".join((ast.get_docstring(node) or "").split()))


def table(records: list[Record]) -> str:
    lines = ["| Python | torch | other versions | on | tests passed | failed | skipped | commit |"]
    lines.append("|---|---|---|---|--:|--:|--:|---|")
    for record in records:
        packages = record["packages"]
        others = ", ".join(f"{name} {packages[name]}" for name in ("numpy", "triton") if name in packages)
        place = record["platform"] + ("" if record["compiler"] else ", no compiler")
        figures = (str(record[name]) for name in ("passed", "failed", "skipped", "commit"))
        lines.append(f"| {record['python']} | {packages['torch']} | {others} | {place} | {' | '.join(figures)} |")
    lines += ["", "| with | what | test | passed with |", "|---|---|---|---|"]
    before = None
    for row in rows():
        key = f"{row.file}::{row.test}"
        ran = [_passed_with(name, records) for name in (key, key + GPU)]
        if any(ran):
            test = f"[`{row.test}`](../tests/integration/{row.file})"
            passed = "; ".join(where + said for where, said in zip(("", "on a GPU: "), ran, strict=True) if said)
            passed = passed.replace("on a GPU: not run: needs a GPU", "**on a GPU: not run**")
            lines.append(f"| {'' if row.area == before else row.area} | {row.claim} | {test} | {passed} |")
            before = row.area
    return "\n".join(lines)


def _passed_with(key: str, records: list[Record]) -> str:
    ran = [record for record in records if key in record["tests"]]
    if not ran:
        return ""
    failed = [record["packages"]["torch"] for record in ran if record["tests"][key] == "failed"]
    passed = [record for record in ran if record["tests"][key] == "passed"]
    if not passed and not failed:
        return f"not run: {ran[0]['tests'][key]}"
    if not passed:
        return f"**fails with torch {', '.join(failed)}**"
    used = ["torch", *(name for name in ran[0]["uses"].get(key, ()) if any(name in r["packages"] for r in ran))]
    found = []
    for name in used:
        versions = {record["packages"][name].partition("+")[0] for record in passed if name in record["packages"]}
        found.append(f"{name} {', '.join(sorted(versions, key=_order))}")
    return "; ".join([*found, *(f"**fails with torch {version}**" for version in failed)])


def replaced(text: str, table: str) -> str:
    """``text`` with ``table`` between the markers."""
    start, end = (text.find(marker) for marker in MARKERS)
    if not 0 <= start < end:
        raise ValueError(f"docs/compatibility.md: expected {MARKERS[0]} and {MARKERS[1]}, each once and in this order.")
    return f"{text[: start + len(MARKERS[0])]}\n{table}\n{text[end:]}"


if __name__ == "__main__":
    sys.exit(main())
