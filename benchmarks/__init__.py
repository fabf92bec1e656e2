"""Time and memory of the fusion block: ``make bench``, or ``python -m benchmarks.report`` to publish."""
