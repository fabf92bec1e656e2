"""A test here proves a row of the table in docs/compatibility.md: its docstring is the row, record.py writes it."""

from importlib.util import find_spec

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that ``uses`` a package that is not installed is skipped, and one for a GPU without a GPU."""
    for item in items:
        used = [name for marker in item.iter_markers("uses") for name in marker.args]
        on_gpu = item.get_closest_marker("gpu") is not None
        item.user_properties += [("uses", used), ("gpu", on_gpu)]
        missing = [name for name in used if find_spec(name) is None]
        if on_gpu and not torch.cuda.is_available():
            missing.append("a GPU")
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)}"))
