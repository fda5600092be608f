"""Where the command line writes: results to stdout (text or JSON, never both), all else to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from lcpaq_onnx.manager.analysis import Progress

__all__ = ["BarProgress", "Console", "LineProgress", "text_table"]


@dataclass(frozen=True)
class Console:
    """``as_json``: stdout carries one JSON document. ``quiet``: no text on stdout, no progress. ``verbosity``: how many
    ``-v`` were given.
    """

    as_json: bool = False
    quiet: bool = False
    verbosity: int = 0

    def result(self, text: str, document: object) -> None:
        """The answer of a command: ``document`` (a JSON text, or what ``json`` can write) or ``text``."""
        if self.as_json:
            written = document if isinstance(document, str) else json.dumps(document, indent=1, ensure_ascii=False)
            print(written.rstrip("\n"))
        elif not self.quiet:
            print(text.rstrip("\n"))

    def note(self, text: str) -> None:
        """News for people, on stderr."""
        if not self.quiet:
            print(f"lcpaq: {text}", file=sys.stderr)

    def complain(self, text: str) -> None:
        """Something that the exit code stands for, on stderr, ``--quiet`` or not."""
        print(f"lcpaq: error: {text}", file=sys.stderr)

    def progress(self) -> Progress:
        """Bars where a person watches; elsewhere nothing, or with ``-v`` a line for each stretch of work."""
        from lcpaq_onnx.manager.analysis import SilentProgress

        if self.quiet:
            return SilentProgress()
        if sys.stderr.isatty():
            return BarProgress()
        return LineProgress(self) if self.verbosity else SilentProgress()


class LineProgress:
    """One line for each stretch of work when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def track(self, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        started, done = time.perf_counter(), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count

        yield advance
        steps = "1 step" if done == 1 else f"{done} steps"
        self._console.note(f"{label}: {steps} in {time.perf_counter() - started:.1f} s")


class BarProgress:
    """Bars on stderr, one below the other while stretches are nested, gone when the outermost ends."""

    def __init__(self) -> None:
        self._bars: RichProgress | None = None
        self._depth = 0

    @contextmanager
    def track(self, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        bars = self._opened()
        task = bars.add_task(label, total=total)
        self._depth += 1
        try:
            yield lambda steps: bars.advance(task, steps)
        finally:
            bars.remove_task(task)
            self._depth -= 1
            if self._depth == 0:
                bars.stop()
                self._bars = None

    def _opened(self) -> RichProgress:
        from rich.console import Console as RichConsole
        from rich.progress import Progress as RichProgress

        if self._bars is None:
            self._bars = RichProgress(console=RichConsole(stderr=True), transient=True)
            self._bars.start()
        return self._bars


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns as in reports; those whose cells all start with a digit or a sign are set to the right."""
    from lcpaq_onnx.verification.text_table import Column, table_lines

    columns = [
        Column(header, right=bool(rows) and all(row[index][:1] in "0123456789+-" for row in rows))
        for index, header in enumerate(headers)
    ]
    return "\n".join(table_lines(columns, rows)) + "\n"
