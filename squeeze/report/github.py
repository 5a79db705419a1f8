"""GitHub Actions: annotations on the run, and its step summary.

Workflow commands go to stderr, which the runner reads as it reads stdout, so that
`--json` stays alone on stdout.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from squeeze.budget.verdict import Report, Result
from squeeze.report import checks


def running_there(environment: Mapping[str, str] = os.environ) -> bool:
    return environment.get("GITHUB_ACTIONS") == "true"


def commands(report: Report, file: Path | None) -> list[str]:
    """One workflow command per failure; warn-level ones are warnings."""
    return [_annotation(r, file) for r in report.failures()]


def _annotation(result: Result, file: Path | None) -> str:
    kind = "error" if result.fails else "warning"
    where = f"file={_property(file.as_posix())}," if file is not None else ""
    title = _property(f"squeeze check: {checks.clean(result.name)}")
    message = f"{checks.headline(result)}: {checks.explanation(result)}"
    return f"::{kind} {where}title={title}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def write_summary(text: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Append to the step's summary; why it could not be, for a note."""
    path = environment.get("GITHUB_STEP_SUMMARY")
    if not path:
        return None
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        return f"no step summary: {path}: {error.strerror}"
    return None
