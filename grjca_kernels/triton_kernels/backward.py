"""The backward in one launch; its last phase reduces the weights' gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from grjca_kernels.triton_kernels.gates_backward import gates_backward, states_backward
from grjca_kernels.triton_kernels.iteration import attend, attend_stored, correlate, initial, project
from grjca_kernels.triton_kernels.iteration_backward import (
    attended_task,
    attended_tasks,
    correlate_backward,
    correlate_backward_stored,
    initial_backward,
    input_task,
    input_tasks,
    key_joint_backward,
    output_backward,
)
from grjca_kernels.triton_kernels.primitives import chunk_of, grid_barrier, last_program, run, run_task, task_of, turns
from grjca_kernels.triton_kernels.weights_backward import (
    gate_weights_task,
    gate_weights_tasks,
    key_weights_task,
    key_weights_tasks,
    linear_weights_task,
    linear_weights_tasks,
    output_weights_task,
    output_weights_tasks,
    reduce,
)


@triton.jit(do_not_specialize=["batch", "first_step", "last_step"])
def backward_kernel(a, to, batch, first_step, last_step, p_counter, C: tl.constexpr):
    """Run steps first_step <= step < last_step, with a barrier between every two.

    For every chunk of samples: X^0; the gates; for every iteration from the last, its activations and then its
    gradients; d x. After all chunks, the reduction runs once, if there is one.
    """
    PHASES: tl.constexpr = C.backward_phases
    STEPS: tl.constexpr = C.iterations * PHASES + 3
    for step in tl.range(first_step, last_step, disable_licm=True):
        first = step // STEPS * chunk_of(a)
        count = tl.minimum(batch - first, chunk_of(a))
        t, phase = C.iterations - 1 - (step % STEPS - 2) // PHASES, (step % STEPS - 2) % PHASES
        if first >= batch:
            if C.weights:
                run(reduce, a, to, t, first, count, C)
        elif step % STEPS == 0:
            run(initial, a, to, t, first, count, C)
        elif step % STEPS == 1:
            if C.gates > 0:
                run(gates_backward, a, to, t, first, count, C)
            run(states_backward, a, to, step * 0 + C.iterations, first, count, C)
        elif step % STEPS == STEPS - 1:
            run(initial_backward, a, to, t, first, count, C)
        elif C.stream:
            phase_streamed(a, to, t, phase, first, count, C)
        else:
            phase_stored(a, to, t, phase, first, count, C)
        if step + 1 < last_step:
            grid_barrier(p_counter, C)


@triton.jit
def phase_streamed(a, to, t, phase, first, count, C: tl.constexpr):
    """Run a phase of iteration t with C streamed."""
    SHIFT: tl.constexpr = 0 if C.released else 1  # the paper form has no phase for the output's relu and dropout
    if phase == 0:
        project_and_states(a, to, t, first, count, C)
    elif phase == 1:
        run(attend, a, to, t, first, count, C)
    elif phase == 4 - SHIFT:
        correlate_backward(a, to, t, first, count, C)
    else:
        phase_of_both(a, to, t, phase, 2, 5 - SHIFT, first, count, C)


@triton.jit
def phase_stored(a, to, t, phase, first, count, C: tl.constexpr):
    """Run a phase of iteration t with C stored."""
    SHIFT: tl.constexpr = 0 if C.released else 1
    if phase == 0:
        project_and_states(a, to, t, first, count, C)
    elif phase == 1:
        run(correlate, a, to, t, first, count, C)
    elif phase == 2:
        run(attend_stored, a, to, t, first, count, C)
    elif phase == 5 - SHIFT:
        correlate_backward_stored(a, to, t, first, count, C)
    elif phase == 6 - SHIFT:
        run(key_joint_backward, a, to, t, first, count, C)
    else:
        phase_of_both(a, to, t, phase, 3, 7 - SHIFT, first, count, C)


@triton.jit
def phase_of_both(a, to, t, phase, FIRST: tl.constexpr, LAST: tl.constexpr, first, count, C: tl.constexpr):
    """Run the phases that do not depend on where C is: the output projection first, the inputs last."""
    if phase == LAST:
        project_backward(a, to, t, first, count, C)
    elif phase == FIRST + C.released:
        attend_backward(a, to, t, first, count, C)
    elif C.released:
        run(output_backward, a, to, t, first, count, C)


@triton.jit
def attend_backward(a, to, t, first, count, C: tl.constexpr):
    """Compute d (V_m C_m), and d W_h while H is still there; d W_h goes first, as its sums are longer."""
    of_weights, tasks = output_weights_tasks(a, C) if C.weights else 0, attended_tasks(a, count, C)
    for turn in tl.range(0, turns(of_weights + tasks), disable_licm=True):
        i = task_of(turn)
        if i >= of_weights:
            run_task(attended_task, a, to, t, first, count, i - of_weights, tasks, C)
        elif C.weights:
            run_task(output_weights_task, a, to, t, first, count, i, of_weights, C)


@triton.jit
def project_backward(a, to, t, first, count, C: tl.constexpr):
    """Compute the gradients of the projections' weights, whose sums are longer, and of X^t."""
    of_linear, of_key = (linear_weights_tasks(a, C), key_weights_tasks(a, C)) if C.weights else (0, 0)
    of_weights, tasks = of_linear + of_key, input_tasks(a, count, C)
    for turn in tl.range(0, turns(of_weights + tasks), disable_licm=True):
        i = task_of(turn)
        if i >= of_weights:
            run_task(input_task, a, to, t, first, count, i - of_weights, tasks, C)
        elif C.weights:
            if i < of_linear:
                run_task(linear_weights_task, a, to, t, first, count, i, of_linear, C)
            else:
                run_task(key_weights_task, a, to, t, first, count, i - of_linear, of_key, C)


@triton.jit
def project_and_states(a, to, t, first, count, C: tl.constexpr):
    """Compute an iteration's projections and the gates' part of d X^t, and once the gates' weights."""
    if C.weights and C.gates > 0:
        if t == C.iterations - 1:
            tasks = gate_weights_tasks(a, C)
            for i in tl.range(last_program(), tasks, tl.num_programs(0), disable_licm=True):
                run_task(gate_weights_task, a, to, t, first, count, i, tasks, C)
    project(a, to, t, first, count, C)
    run(states_backward, a, to, t, first, count, C)
