"""The table in docs/compatibility.md is the one of the records, and they know every test of works_with/."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import record

ROOT = Path(__file__).parents[2]


def test_the_table_is_up_to_date():
    text = record.PAGE.read_text(encoding="utf-8")
    assert record.replaced(text, record.table(record.read())) == text, "run python tests/support/record.py --render"


def test_every_row_says_what_it_shows():
    rows = list(record.rows())
    assert len({(row.file, row.test) for row in rows}) == len(rows) > 40
    assert all(row.area and row.claim for row in rows)


@pytest.mark.skipif(not ROOT.joinpath("constraints.txt").exists(), reason="needs the sources")
def test_the_record_of_the_pinned_versions_knows_every_test():
    pinned = next(
        line for line in ROOT.joinpath("constraints.txt").read_text().splitlines() if line.startswith("torch==")
    )
    records = [one for one in record.read() if one["packages"]["torch"].partition("+")[0] == pinned[len("torch==") :]]
    assert records, "run python tests/support/record.py"
    for one in records:
        known = {key.removesuffix(record.GPU) for key in one["tests"]}
        assert known == {f"{row.file}::{row.test}" for row in record.rows()}


def test_nothing_that_failed_is_published_as_passed():
    reports = [
        ("a.py::test_one[1]", "passed", {}),
        ("a.py::test_one[2]", "failed", {}),
        ("a.py::test_one[3]", "passed", {}),
        ("a.py::test_two[cpu]", "passed", {"uses": ["peft"]}),
        ("a.py::test_two[cuda]", "skipped", {"gpu": True}),
        ("a.py::test_three", "skipped", {}),
    ]
    outcomes = record.Outcomes()
    for name, outcome, properties in reports:
        outcomes.pytest_runtest_logreport(
            SimpleNamespace(
                nodeid=f"tests/integration/{name}",
                when="setup" if outcome == "skipped" else "call",
                outcome=outcome,
                user_properties=list(properties.items()),
                longrepr=("a.py", 1, "Skipped: needs a GPU"),
            )
        )
    assert outcomes.counts == {"passed": 3, "failed": 1, "skipped": 2}
    assert outcomes.tests == {
        "a.py::test_one": "failed",
        "a.py::test_two": "passed",
        "a.py::test_two on a GPU": "needs a GPU",
        "a.py::test_three": "needs a GPU",
    }
    packages = {"torch": "2.13.0+cpu", "peft": "0.21.2"}
    records = [{"packages": packages, "tests": outcomes.tests, "uses": outcomes.uses}]
    assert record._passed_with("a.py::test_one", records) == "**fails with torch 2.13.0+cpu**"
    assert record._passed_with("a.py::test_two", records) == "torch 2.13.0; peft 0.21.2"
    assert record._passed_with("a.py::test_two on a GPU", records) == "not run: needs a GPU"


def test_a_readme_without_a_place_for_it_is_refused():
    with pytest.raises(ValueError, match="expected <!-- works with -->"):
        record.replaced("nothing", "table")
