"""Results one JSON line each, so that an interrupted script goes on where it was."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def argument(parser: argparse.ArgumentParser) -> None:
    """--results FILE, which every resumable script takes."""
    parser.add_argument(
        "--results",
        type=Path,
        help="file of JSON lines: finished work is read from it and added to it",
    )


class Records:
    """Lines of `path` (none: kept in memory only), each known by some of its keys."""

    def __init__(self, path: Path | None, keys: Iterable[str]) -> None:
        self.path, self.keys = path, tuple(keys)
        self.found: dict[tuple[Any, ...], dict[str, Any]] = {}
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._keep(json.loads(line))

    def _keep(self, record: dict[str, Any]) -> None:
        self.found[tuple(record.get(key) for key in self.keys)] = record

    def get(self, *key: Any) -> dict[str, Any] | None:
        return self.found.get(key)

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        """Keep a record with the load average it was taken at, on disk at once."""
        record = {**record, "load": round(os.getloadavg()[0], 1)}
        self._keep(record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return record
