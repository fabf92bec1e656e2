"""The forward in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from grjca_kernels.triton_kernels.gates import gate
from grjca_kernels.triton_kernels.iteration import attend, attend_stored, correlate, initial, output, project
from grjca_kernels.triton_kernels.primitives import chunk_of, grid_barrier, run


@triton.jit(do_not_specialize=["batch", "first_step", "last_step"])
def forward_kernel(a, to, batch, first_step, last_step, p_counter, C: tl.constexpr):
    """Run steps first_step <= step < last_step; all steps make the whole forward, and one step is one phase alone.

    For every chunk of samples: X^0; the phases of every iteration; the gates. A barrier separates every two steps.
    """
    PHASES: tl.constexpr = 3 if C.stream else 4
    STEPS: tl.constexpr = C.iterations * PHASES + 2
    for step in tl.range(first_step, last_step, disable_licm=True):
        first = step // STEPS * chunk_of(a)
        count = tl.minimum(batch - first, chunk_of(a))
        t, phase = (step % STEPS - 1) // PHASES, (step % STEPS - 1) % PHASES
        if step % STEPS == 0:
            run(initial, a, to, t, first, count, C)
        elif step % STEPS == STEPS - 1:
            run(gate, a, to, t, first, count, C)
        elif phase == 0:
            project(a, to, t, first, count, C)
        elif phase == PHASES - 1:
            run(output, a, to, t, first, count, C)
        elif C.stream:
            run(attend, a, to, t, first, count, C)
        elif phase == 1:
            run(correlate, a, to, t, first, count, C)
        else:
            run(attend_stored, a, to, t, first, count, C)
        if step + 1 < last_step:
            grid_barrier(p_counter, C)
