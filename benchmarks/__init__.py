"""Time and memory of the fusion block: ``make bench``, or ``python -m benchmarks.report`` to publish."""

import sys
from pathlib import Path

TESTS = str(Path(__file__).parents[1] / "tests")  # tolerances.py, which pytest finds by itself
if TESTS not in sys.path:
    sys.path.append(TESTS)
