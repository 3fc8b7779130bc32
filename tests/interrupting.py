"""Ctrl-C at a chosen place: raises KeyboardInterrupt where the interpreter may, between two lines of a function.

A native lock in a `with` is given back whatever happens, as the interpreter looks for signals on neither side of its
release. A trace function could raise there all the same, so those places are left out.
"""

from __future__ import annotations

import contextlib
import dis
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import hf_sparse_cache


PACKAGE = Path(hf_sparse_cache.__file__).parent
TRACED = (str(PACKAGE / "store"), str(PACKAGE / "planning"), str(PACKAGE / "request.py"), str(PACKAGE / "forks.py"))


@cache
def _traced(code: CodeType) -> bool:
    if code.co_name == "__del__":
        return False  # the interpreter swallows what is raised there
    return code.co_filename.startswith(TRACED) or code.co_filename == contextlib.__file__


@cache
def _exits(code: CodeType) -> frozenset[int]:
    """Where the lines begin that only leave a `with`: no signal is looked for before its `__exit__` runs."""
    steps = list(dis.get_instructions(code))
    found = set()
    for index, step in enumerate(steps):
        names = [later.opname for later in steps[index : index + 6]]
        while names and names[0] in ("NOP", "SWAP", "PUSH_NULL"):
            names.pop(0)
        raised = names[:2] == ["PUSH_EXC_INFO", "WITH_EXCEPT_START"]
        if raised or (names[:3] == ["LOAD_CONST"] * 3 and names[3:4] in (["PRECALL"], ["CALL"])):
            found.add(step.offset)
    return frozenset(found)


class Interrupter:
    """Counts the places where an interrupt may strike, and strikes at one of them.

    Args:
        at: the number of the place, from 0; None to count them.

    Attributes:
        places: those that it came by.
        where: the one at which it struck.
    """

    def __init__(self, at: int | None = None) -> None:
        self.at, self.where = at, ""
        self.places: list[str] = []

    def _look(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if not _traced(frame.f_code):
            return None
        if event == "call" or (event == "line" and frame.f_lasti not in _exits(frame.f_code)):
            self.places.append(
                f"{Path(frame.f_code.co_filename).name} {frame.f_code.co_name} {frame.f_lineno} ({event})"
            )
            if len(self.places) - 1 == self.at:
                sys.settrace(None)
                self.where = self.places[-1]
                raise KeyboardInterrupt(self.where)
        return self._look

    def strikes(self, job: Callable[[], object]) -> bool:
        """Runs a job; whether it was interrupted. Nothing of it lives on in a traceback."""
        told, sys.unraisablehook = sys.unraisablehook, lambda _: None  # of a generator that just goes, as always
        before = sys.gettrace()  # of who measures which test runs which line
        sys.settrace(self._look)
        try:
            job()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
            sys.unraisablehook = told
        return False
