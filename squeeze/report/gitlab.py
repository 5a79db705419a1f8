"""GitLab's code-quality report: a JSON list of issues."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from squeeze.budget.verdict import Report, Result
from squeeze.report import checks


def document(report: Report, file: Path | None) -> str:
    """The whole file. The fingerprint stays the same while the same limit fails."""
    issues = [_issue(r, file) for r in report.failures()]
    return json.dumps(issues, indent=2, ensure_ascii=False) + "\n"


def _issue(result: Result, file: Path | None) -> dict[str, Any]:
    parts = (result.name, result.model, result.layer, result.metric, result.bound)
    identity = json.dumps(parts)
    severity = "minor"
    if result.fails:
        severity = "critical" if result.status == "over" else "blocker"
    return {
        "description": f"{checks.headline(result)}: {checks.explanation(result)}",
        "check_name": f"squeeze/{result.metric}",
        "fingerprint": hashlib.sha256(identity.encode()).hexdigest(),
        "severity": severity,
        "location": {
            "path": file.as_posix() if file is not None else result.model,
            "lines": {"begin": 1},
        },
    }
