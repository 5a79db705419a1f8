"""Progress bars on stderr, for what takes over two seconds."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

_live: list[Progress] = []  # the display, while a bar is shown: bars within bars


@contextlib.contextmanager
def bar(title: str) -> Iterator[Callable[[float], None]]:
    """A function that takes the share done; silent where stderr is no terminal.

    Until it is called the bar moves without end. A bar within a bar is a line below.
    """
    if not sys.stderr.isatty():
        yield lambda share: None
        return
    with contextlib.ExitStack() as stack:
        if not _live:
            _live.append(stack.enter_context(_display()))
            stack.callback(_live.clear)
        shown = _live[0]
        task = shown.add_task(title, total=None)
        stack.callback(shown.remove_task, task)
        yield lambda share: shown.update(task, completed=share, total=1.0)


def _display() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=4,  # it runs beside what is timed
    )
