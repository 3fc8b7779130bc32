"""Plants faults, one at a time, and asks tests whether they notice: for `make mutants`.

Most faults lie within a function. pytest then collects its tests once, and each fault is put into the function as it
lives in a child of that process, which runs the tests of the line and is gone. Where a fault lies in what a module
does when it is imported, pytest starts anew in a child of a process that has torch loaded and nothing of ours.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

import pytest
from _pytest.main import pytest_runtestloop
from faults import Fault


# A plugin that transformers has imported before.
OPTIONS = [
    "-q",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:cov",
    "-p",
    "no:xdist",
    "--capture=sys",
    "--hypothesis-profile=planted",
]
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
Codes = list[tuple[CodeType, CodeType]]


class Trial(NamedTuple):
    """A fault, the tests to ask, and after how many seconds they hang, which is noticed."""

    fault: Fault
    tests: list[str]
    patience: float


class Hot:
    """A plugin of pytest that, instead of running the tests that were collected, plants faults and runs some of them.

    Args:
        trials: what to plant.
        told: is told of each whether it was noticed; not of those that cannot be planted here.
    """

    def __init__(self, trials: list[Trial], told: Callable[[Trial, bool], None]) -> None:
        self._trials = trials
        self._told = told

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Plant them all."""
        items = {item.nodeid: item for item in session.items}
        living = _living_functions()
        gc.freeze()
        for trial in self._trials:
            swaps = _swaps(trial.fault, living)
            if swaps is not None:
                asked = [items[test] for test in trial.tests if test in items]
                with written(trial.fault):
                    self._told(trial, noticed(partial(_run, session, asked, swaps), trial.patience))
        return True


def _run(session: pytest.Session, items: list[pytest.Item], swaps: list[tuple[FunctionType, CodeType]]) -> bool:
    for function, code in swaps:
        function.__code__ = code
    session.items = items
    session.config.option.maxfail = 1
    session.config._tmp_path_factory._basetemp = Path(tempfile.mkdtemp())
    with suppress(session.Failed):
        pytest_runtestloop(session)
    return session.testsfailed > 0


def cold(tests: list[str]) -> bool:
    """Whether one of the tests fails in a pytest of its own, in this process."""
    base = f"--basetemp={tempfile.mkdtemp()}"
    return pytest.main(["-x", *OPTIONS, base, *tests]) != 0


@contextmanager
def written(fault: Fault) -> Iterator[None]:
    """With the fault in the file as well, for tests that start processes."""
    right = fault.right
    fault.module.write_text(fault.wrong, encoding="utf-8")
    try:
        yield
    finally:
        fault.module.write_text(right, encoding="utf-8")


def noticed(fails: Callable[[], bool], seconds: float) -> bool:
    """Whether `fails()` says so, hangs or ends its process, in a child of this one, which prints nothing."""
    folder = tempfile.mkdtemp(prefix="planted-")
    child = os.fork()
    if not child:
        try:
            os.setsid()
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1), os.dup2(silent, 2)
            os.environ.update(PYTHONDONTWRITEBYTECODE="1", TMPDIR=folder)
            sys.dont_write_bytecode = True
            tempfile.tempdir = folder
            os._exit(fails())
        finally:
            os._exit(3)  # and touches nothing of the parent's
    try:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status) != 0
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return True
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _living_functions() -> dict[tuple[str, str, int], list[FunctionType]]:
    """All functions that were made in this process, by where their code begins."""
    found: dict[tuple[str, str, int], list[FunctionType]] = {}
    for each in gc.get_objects():
        if type(each) is FunctionType:  # an object of upstream warns where it is asked for its class
            found.setdefault(_key(each.__code__), []).append(each)
    return found


def _key(code: CodeType) -> tuple[str, str, int]:
    return os.path.abspath(code.co_filename), code.co_qualname, code.co_firstlineno


def _swaps(
    fault: Fault, living: dict[tuple[str, str, int], list[FunctionType]]
) -> list[tuple[FunctionType, CodeType]] | None:
    """The functions that a fault is in, with their code when it is planted; None where it lies outside functions."""
    file = str(fault.module.absolute())
    pairs: Codes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a number compared by `is`
        right, wrong = (compile(text, file, "exec", dont_inherit=True) for text in (fault.right, fault.wrong))
    if not _pair(right, wrong, pairs):
        return None
    found = [(function, new) for old, new in pairs for function in living.get(_key(old), ())]
    fits = all(function.__code__.co_freevars == new.co_freevars for function, new in found)
    return found if found and fits else None


def _pair(right: CodeType, wrong: CodeType, pairs: Codes) -> bool:
    """Gather the functions below two pieces of code that differ; False where anything differs outside functions."""
    if right == wrong:
        return True
    mine, theirs = _parts(right), _parts(wrong)
    if right.co_flags & CO_OPTIMIZED and (not right.co_name.startswith("<") or right.co_name == "<lambda>"):
        pairs.append((right, wrong))
        for old, new in zip(mine, theirs, strict=False):
            _pair(old, new, pairs)
        return True
    rest = [[const for const in code.co_consts if not isinstance(const, CodeType)] for code in (right, wrong)]
    same = right.co_code == wrong.co_code and right.co_names == wrong.co_names and repr(rest[0]) == repr(rest[1])
    if not same or len(mine) != len(theirs) or right.co_flags & CO_OPTIMIZED:
        return False
    return all(_pair(old, new, pairs) for old, new in zip(mine, theirs, strict=True))


def _parts(code: CodeType) -> list[CodeType]:
    return [const for const in code.co_consts if isinstance(const, CodeType)]
