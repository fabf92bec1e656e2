"""A long run of random problems: ``python tests/many_cases.py 100000 SEED`` compares that many with the reference.

It prints a line of JSON. A fault is kept with its problem and does not end the run.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from hypothesis import Phase, given, seed, settings

from cases import make, run
from grjca_kernels import cpu
from test_properties import any_case, instruction_sets, native
from tolerances import check_float64, exact


def main(count: int, number: int) -> int:
    """1 if there are faults."""
    torch.set_num_threads(1)
    faults: list[str] = []
    done, start = 0, time.perf_counter()

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
    )
    @given(any_case(), instruction_sets)
    def compare(case, instruction_set):
        nonlocal done
        done += 1
        try:
            with cpu.instruction_set(instruction_set):
                check_float64(run(native, case, make(case)), exact.__wrapped__(case, torch.float64))
        except AssertionError as error:
            faults.append(f"{case!r}, {instruction_set}: {str(error)[:300]}")

    compare()
    print(json.dumps({"cases": done, "seed": number, "seconds": round(time.perf_counter() - start), "faults": faults}))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
