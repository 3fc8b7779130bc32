"""Where the rows go: a file of JSON lines, written row by row, that a run cut short is continued from."""

import json
import os
import time
import traceback


MACHINE = "machine"
# A row is not begun in the last seconds of a budget.
_MARGIN = 3.0


class OtherMachineError(Exception):
    """A file of results is of another device, other versions or other sizes."""


class Ledger:
    """One file of rows, each a dict with a `section` and a `case`.

    Args:
        path: the file.
        until: when to begin no further row, in seconds of `time.time()`.
    """

    def __init__(self, path, until=float("inf")):
        self.path, self.until = path, until

    def rows(self):
        """All rows so far; a line that was cut off while it was written is left out."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def open(self, machine, about):
        """Begin the file with what it is measured on, or go on with one that is of the same.

        Args:
            machine: what has to be the same in all rows.
            about: what else there is to say.

        Raises:
            OtherMachineError: It says something else.
        """
        first = next((row for row in self.rows() if row["section"] == MACHINE), None)
        if first is None:
            self.add({"section": MACHINE, "case": MACHINE, **about, **machine})
            return
        differs = [name for name, value in machine.items() if first.get(name) != json.loads(json.dumps(value))]
        if differs:
            said = "; ".join(f"{name}: {first.get(name)} there, {machine[name]} here" for name in differs)
            raise OtherMachineError(f"{self.path} holds results of something else ({said})")

    def add(self, row):
        """Write one row, so that it is there whatever happens next."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_off = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut_off else "") + json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def forget_errors(self):
        """Leave out the rows that say what went wrong, so that they are measured anew."""
        kept = [json.dumps(row) + "\n" for row in self.rows() if "error" not in row]
        beside = self.path.with_suffix(".new")
        beside.write_text("".join(kept), encoding="utf-8")
        beside.replace(self.path)

    def has(self, section, case):
        return any((row["section"], row["case"]) == (section, case) for row in self.rows())

    @property
    def over(self):
        """Whether no further row may begin."""
        return time.time() > self.until - _MARGIN

    def measure(self, section, case, work, **about):
        """One row, made by `work()`, which returns its values, unless it is there or the time is over.

        What goes wrong is the row's `error`, and the next row is another matter.

        Returns:
            Whether the row is there now.
        """
        if self.has(section, case):
            return True
        if self.over:
            return False
        started = time.time()
        try:
            values = work()
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {str(error)[:500]}"
            values = {"error": said, "at": f"{os.path.basename(last.filename)}:{last.lineno}"}
        row = {"section": section, "case": case, **about, **values, "took_seconds": round(time.time() - started, 3)}
        self.add(row)
        print(_short(row), flush=True)
        return True


def _short(row):
    """A row on a line of a terminal."""
    said = ", ".join(f"{name} {_cell(value)}" for name, value in row.items() if name not in ("section", "case"))
    return f"{row['section']} / {row['case']}: {said[:400]}"


def _cell(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
