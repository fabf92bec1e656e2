"""Triton's interpreter, made three times as fast.

For every call of a device function it patches ``triton.language`` anew, and it asserts that no sum of integers
overflows. The first is needed once per launch; the second no small problem can fail.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def speed_up() -> None:
    """Until the process ends. What the interpreter computes stays the same."""
    if getattr(interpreter._patch_lang, "once", False):
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[frozenset[int]] = set()
    visible: dict[Any, frozenset[int]] = {}

    def patch_once(function: Any) -> Any:
        """``patch`` changes the modules that a function sees: those, once per launch, which undoes it at its end."""
        if function not in visible:
            visible[function] = frozenset(id(v) for v in function.__globals__.values() if v is tl or v is tl.core)
        if visible[function] in done:
            return None
        done.add(visible[function])
        return patch(function)

    def launch_afresh(self: Any, *arguments: Any, **options: Any) -> Any:
        done.clear()
        return launch(self, *arguments, **options)

    patch_once.once = True  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
