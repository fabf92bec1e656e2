"""The documents: short where they begin, with links that lead somewhere, and code that is Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md", ROOT / "grjca_kernels/operator.md"]
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="needs the sources")


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        path, _, heading = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page}: {target}"
        assert not heading or heading in headings(there), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_documents_is_python(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        ast.parse(code)


def test_the_readme_is_a_screen_or_two():
    assert len((ROOT / "README.md").read_bytes()) < 9_000
    linked = set(re.findall(r"\]\((docs/[\w.]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert linked == {f"docs/{path.name}" for path in ROOT.glob("docs/*.md")}
