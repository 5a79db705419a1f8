"""Small text files and file patterns from users: bounded in time and memory."""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from squeeze.errors import RuleError, UsageError

CONFIGS = (("squeeze.toml", ()), ("pyproject.toml", ("tool", "squeeze")))
TOML_LIMIT = 2**20
JSON_LIMIT = 2**26
ENTRY_LIMIT = 200_000  # files and folders that one pattern may walk over
_YAML = re.compile(r"^\s*(-\s+\w|[\w.-]+:(\s|$)|---\s*$)", re.MULTILINE)


def read_text(path: Path, limit: int) -> str:
    """A regular file of at most `limit` bytes; UsageError otherwise."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path}: not a regular file")
        if status.st_size > limit:
            raise UsageError(
                f"{path}: {status.st_size} bytes, more than {limit} allowed"
            )
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        broken = path.is_symlink()
        reason = "a symbolic link to nothing" if broken else "no such file"
        raise UsageError(f"{path}: {reason}") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RuleError(f"{path}: not a text file in UTF-8") from error


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file; RuleError where it isn't one, with a hint for YAML."""
    text = read_text(path, TOML_LIMIT)
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise RuleError(f"{path}: nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError, and integers of too many digits
        hint = "; this looks like YAML: write key = value" if _YAML.search(text) else ""
        reason = str(error).splitlines()[0]
        raise RuleError(f"{path}: not valid TOML: {reason}{hint}") from error


def read_json(path: Path) -> Any:
    """A JSON file of finite numbers and unique keys; RuleError where it isn't one."""
    text = read_text(path, JSON_LIMIT)
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except RecursionError as error:
        raise RuleError(f"{path}: nested too deeply") from error
    except ValueError as error:
        raise RuleError(
            f"{path}: not valid JSON: {str(error).splitlines()[0]}"
        ) from error


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [k for k, _ in pairs]
        twice = next(k for k in keys if keys.count(k) > 1)
        raise ValueError(f"the key {twice!r} appears twice (an unfinished merge?)")
    return table


# -- patterns -----------------------------------------------------------------------


def is_pattern(text: str) -> bool:
    return any(c in text for c in "*?[")


def expand(pattern: str, folder: Path) -> list[Path]:
    """Files that a glob matches, sorted; a plain path stands for itself.

    `**` crosses folders, never symbolic links to folders, so links can't make loops.
    Paths come back relative to where they were written. UsageError if there are none.
    """
    if not pattern:
        raise UsageError("an empty model pattern")
    if not is_pattern(pattern):
        file = folder / pattern
        if not is_file(file):
            raise UsageError(f"{pattern}: {_why_not_a_file(file)}")
        return [Path(pattern)]
    head, tail = _split(pattern)
    patterns = tail.split("/")
    depth = None if "**" in patterns else len(patterns)
    hidden = any(part.startswith(".") for part in patterns)
    found = [
        head / relative
        for relative in _walk(folder / head, depth, hidden, pattern)
        if _matches(relative, patterns)
    ]
    broken = [p for p in found if not is_file(folder / p)]
    if broken:
        raise UsageError(f"{broken[0]}: {_why_not_a_file(folder / broken[0])}")
    if not found:
        raise UsageError(f"the pattern {pattern!r} matches no file in {folder}")
    return sorted(found)


def is_file(path: Path) -> bool:
    """Whether it can be found and is a regular file; UsageError if it can't be told."""
    try:
        return path.is_file()
    except (OSError, ValueError) as error:  # no permission, a name too long, a null
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{str(path)[:200]}: {reason}") from error


def _is_folder_link(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: the caller names it as broken
        return False


def _why_not_a_file(file: Path) -> str:
    if file.is_symlink() and not file.exists():
        return "a symbolic link to nothing, or to itself"
    if file.is_dir():
        return (
            "is a folder; write a pattern for the files in it, such as 'folder/*.onnx'"
        )
    return "not a regular file" if file.exists() else "no such file"


def _split(pattern: str) -> tuple[Path, str]:
    """The folders before the first wildcard, and the rest."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if is_pattern(part))
    head = "/".join(parts[:first]) or ("/" if pattern.startswith("/") else ".")
    return Path(head), "/".join(parts[first:])


def _matches(relative: str, patterns: list[str]) -> bool:
    """Segment by segment, in time linear in each, whatever the pattern."""
    parts = relative.split("/")
    reached = {0}  # how many parts the patterns so far may have taken
    for pattern in patterns:
        if pattern == "**":
            reached = set(range(min(reached), len(parts) + 1)) if reached else reached
        else:
            reached = {
                i + 1
                for i in reached
                if i < len(parts) and fnmatchcase(parts[i], pattern)
            }
    return len(parts) in reached


def _walk(root: Path, depth: int | None, hidden: bool, pattern: str) -> Iterator[str]:
    """Files and broken links below `root`, relative, as 'a/b.onnx'."""
    seen = 0
    pending: list[tuple[str, int]] = [("", 1)]
    while pending:
        prefix, level = pending.pop()
        try:
            entries = list(os.scandir(root / prefix))
        except OSError:  # a folder that can't be opened holds no models of ours
            continue
        seen += len(entries)
        if seen > ENTRY_LIMIT:
            raise UsageError(
                f"the pattern {pattern!r} walks over more than {ENTRY_LIMIT} files; "
                "start it in a smaller folder"
            )
        for entry in entries:
            if entry.name.startswith(".") and not hidden:
                continue
            if entry.is_dir(follow_symlinks=False):
                if depth is None or level < depth:
                    pending.append((f"{prefix}{entry.name}/", level + 1))
            elif not _is_folder_link(entry):
                yield f"{prefix}{entry.name}"
