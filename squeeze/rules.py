"""Where blocks and devices are found: shipped ones by name, a user's own by path."""

from __future__ import annotations

import tomllib
from pathlib import Path

from squeeze.errors import SqueezeError, UsageError, nearest

DEVICE_KEYS = {"internal_memory", "bandwidth", "matrix", "elementwise"}


def folder(kind: str) -> Path:
    """`rules/<kind>` of the wheel, else of the checkout. Kinds: blocks, devices."""
    package = Path(__file__).resolve().parent
    for rules in (package / "rules", package.parent / "rules"):
        if (rules / kind).is_dir():
            return rules / kind
    raise SqueezeError(f"squeeze is installed without its rules/{kind}; reinstall it")


def names(kind: str) -> list[str]:
    """The rules of a kind that squeeze ships."""
    return sorted(f.stem for f in folder(kind).glob("*.toml"))


def kind(name: str) -> str:
    """`devices` or `blocks`, whichever `name` is: shipped, or a .toml file's path."""
    if not _is_path(name):
        for each in ("blocks", "devices"):
            if name in names(each):
                return each
        known = [*names("blocks"), *names("devices")]
        raise UsageError(f"no block or device {name!r}{nearest(name, known)}")
    try:
        table = tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "blocks"  # which says what is wrong with it
    return "blocks" if "layer" in table or not DEVICE_KEYS & table.keys() else "devices"


def _is_path(name: str) -> bool:
    return name.endswith(".toml") or "/" in name or "\\" in name


def find(kind: str, name: str) -> Path:
    """The file of a shipped rule, or of the user's own where `name` is a path."""
    if _is_path(name):
        path = Path(name)
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "no such file"
            raise UsageError(f"{path}: {what}")
        return path
    if name not in names(kind):
        what = kind.removesuffix("s")
        raise UsageError(f"no {what} {name!r}{nearest(name, names(kind))}")
    return folder(kind) / f"{name}.toml"
