"""Where blocks and devices are found: shipped ones by name, a user's own by path."""

from __future__ import annotations

from pathlib import Path

from squeeze.errors import SqueezeError, UsageError, nearest


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


def find(kind: str, name: str) -> Path:
    """The file of a shipped rule, or of the user's own where `name` is a path."""
    if name.endswith(".toml") or "/" in name or "\\" in name:
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        return path
    if name not in names(kind):
        what = kind.removesuffix("s")
        raise UsageError(f"no {what} {name!r}{nearest(name, names(kind))}")
    return folder(kind) / f"{name}.toml"
