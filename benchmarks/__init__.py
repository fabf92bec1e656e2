"""Time and memory of the fusion block: ``make bench``, or ``python -m benchmarks.report`` to publish."""

import sys
from pathlib import Path

SUPPORT = str(Path(__file__).parents[1] / "tests" / "support")  # tolerances.py, which pytest finds by itself
if SUPPORT not in sys.path:
    sys.path.append(SUPPORT)
