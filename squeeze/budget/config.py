"""Checks as they are configured: `[[check]]` of squeeze.toml, flags, or a mapping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from squeeze.budget import files, units
from squeeze.budget.metrics import LAYER_METRICS, LEVELS, METRICS, Metric
from squeeze.budget.units import Quantity
from squeeze.errors import RuleError, UsageError, nearest

KEYS = ("name", "model", "baseline", "input_shape", "ignore_ops", "layer")
LAYER_KEYS = ("match", "op")


@dataclass(frozen=True)
class Limit:
    """Limits on one metric: `bounds` by key (max, max_increase, min, max_drop)."""

    metric: Metric
    level: str
    bounds: Mapping[str, Quantity]
    data: str | None = None
    reference: str | None = None
    device: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class LayerLimit:
    """Limits on every layer whose name matches `match` and whose op matches `op`."""

    match: str
    op: str
    limits: tuple[Limit, ...]

    @property
    def label(self) -> str:
        return self.match if self.op == "*" else f"{self.match} ({self.op})"


@dataclass(frozen=True)
class Check:
    """One budget: some models and the limits they keep. Paths start at `folder`."""

    name: str
    models: tuple[str, ...]
    limits: tuple[Limit, ...]
    layers: tuple[LayerLimit, ...] = ()
    baseline: str | None = None
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ignore_ops: frozenset[str] = frozenset()
    folder: Path = Path()
    images: Mapping[str, Any] = field(default_factory=dict)  # of data.Images

    @property
    def json_baseline(self) -> Path | None:
        """The baseline's file, where it is not a model."""
        if self.baseline is None or not self.baseline.endswith(".json"):
            return None
        return self.folder / self.baseline


@dataclass(frozen=True)
class Budget:
    """A configuration: its checks, and the file they came from."""

    checks: tuple[Check, ...]
    file: Path | None = None


def find(folder: Path) -> Path | None:
    """The configuration file of a folder that has checks."""
    for name, keys in files.CONFIGS:
        file = folder / name
        if file.is_file() and "check" in _section(files.read_toml(file), keys):
            return file
    return None


def load(file: Path) -> Budget:
    """Checks of a TOML file. RuleError names the key that is wrong."""
    table = files.read_toml(file)
    if file.name == "pyproject.toml":
        table = _section(table, ("tool", "squeeze"))
    return read(table, str(file), file.parent, file)


def _section(table: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    for key in keys:
        inner = table.get(key, {})
        table = inner if isinstance(inner, dict) else {}
    return table


def read(
    table: Mapping[str, Any], where: str, folder: Path, file: Path | None = None
) -> Budget:
    """Checks of a configuration's table; other commands' keys are theirs to read."""
    found = table.get("check")
    if found is None:
        raise RuleError(
            f"{where}: no [[check]] in it; squeeze check --init proposes some, or pass "
            "a limit such as --max-macs 600M"
        )
    if not isinstance(found, list) or not all(isinstance(c, dict) for c in found):
        raise RuleError(f"{where}: write [[check]], with two brackets")
    data = table.get("data")
    data = data if isinstance(data, dict) else {}
    shared = {
        "model": table.get("model"),
        "data": data.get("path"),
        "images": _images(data, f"{where}: data"),
    }
    checks = tuple(_check(c, i, where, folder, shared) for i, c in enumerate(found))
    names = [c.name for c in checks]
    for name in names:
        if names.count(name) > 1:
            raise RuleError(f"{where}: two checks are named {name!r}; rename one")
    return Budget(checks, file)


def one(
    table: Mapping[str, Any],
    where: str = "budget",
    folder: Path | None = None,
    data: Mapping[str, Any] | None = None,
) -> Check:
    """A single check from a mapping shaped like a `[[check]]`; `data` like `[data]`."""
    shared = {"images": _images(data or {}, f"{where}: data")}
    return _check(table, 0, where, folder or Path(), shared)


def _check(
    table: Mapping[str, Any],
    index: int,
    file: str,
    folder: Path,
    shared: Mapping[str, Any],
) -> Check:
    models = _texts(
        table.get("model", shared.get("model")), f"{file}: check {index + 1}: model"
    )
    name = table.get("name", models[0] if models else f"check {index + 1}")
    if not isinstance(name, str) or not name.strip():
        raise RuleError(f"{file}: check {index + 1}: name must be a text")
    where = f"{file}: check {name!r}"
    _known(table, [*KEYS, *METRICS], where)
    limits = tuple(
        _limit(METRICS[key], value, f"{where}: {key}", shared.get("data"))
        for key, value in table.items()
        if key in METRICS
    )
    layers = _layer_limits(table.get("layer", []), where)
    if not limits and not layers:
        raise RuleError(
            f'{where}: it limits nothing; add one such as macs = {{ max = "600M" }}'
        )
    check = Check(
        name=name,
        models=models,
        limits=limits,
        layers=layers,
        baseline=_text(table.get("baseline"), f"{where}: baseline"),
        input_shapes=_shapes(table.get("input_shape"), f"{where}: input_shape"),
        ignore_ops=frozenset(_texts(table.get("ignore_ops"), f"{where}: ignore_ops")),
        folder=folder,
        images=shared.get("images", {}),
    )
    _need_baseline(check, where)
    return check


def _need_baseline(check: Check, where: str) -> None:
    """Relative limits need something to be relative to."""
    layered = [limit for rule in check.layers for limit in rule.limits]
    for limit in (*check.limits, *layered):
        relative = "max_increase" in limit.bounds or "max_drop" in limit.bounds
        if relative and check.baseline is None and limit.reference is None:
            key = "reference" if "reference" in limit.metric.options else "baseline"
            raise RuleError(
                f"{where}: {limit.metric.name}: max_increase and max_drop compare with "
                f"something; name it with {key} = …"
            )
        if (
            limit.metric.name == "latency"
            and limit.reference is None
            and check.json_baseline
        ):
            raise RuleError(
                f"{where}: latency: a stored time says nothing about this machine; "
                'name a model to run beside it: reference = "main/model.onnx"'
            )
        if (
            limit.metric.name == "agreement"
            and limit.reference is None
            and (check.baseline is None or check.json_baseline)
        ):
            raise RuleError(
                f"{where}: agreement: with which model? "
                'name it: reference = "float.onnx"'
            )


def _limit(metric: Metric, table: Any, where: str, data: str | None = None) -> Limit:
    if not isinstance(table, Mapping):
        key = next(iter(metric.limits))
        raise RuleError(f"{where}: write {metric.name} = {{ {key} = … }}")
    if metric.name == "latency" and "max" in table:
        raise RuleError(
            f"{where}: an absolute time holds on one machine only; write "
            'max_increase = "10%" with a reference model, or predicted_latency'
        )
    _known(table, [*metric.limits, *metric.options, "level"], where)
    bounds = {
        key: units.parse(table[key], families, f"{where}: {key}")
        for key, families in metric.limits.items()
        if key in table
    }
    if not bounds:
        raise RuleError(f"{where}: no limit; write one of {', '.join(metric.limits)}")
    level = table.get("level", metric.level)
    if level not in LEVELS:
        hint = nearest(str(level), LEVELS)
        raise RuleError(f"{where}: level: unknown level {str(level)[:40]!r}{hint}")
    texts = {
        key: _text(table.get(key), f"{where}: {key}")
        for key in ("data", "reference", "device")
    }
    if "data" in metric.options and texts["data"] is None:
        texts["data"] = data
    seconds = None
    if "seconds" in table:
        seconds = float(
            units.parse(table["seconds"], ("count",), f"{where}: seconds").amount
        )
        if not 0 < seconds <= 3600:
            raise RuleError(f"{where}: seconds: between 0 and 3600")
    return Limit(metric, level, bounds, **texts, seconds=seconds)


def _layer_limits(tables: Any, where: str) -> tuple[LayerLimit, ...]:
    if not isinstance(tables, list) or not all(isinstance(t, Mapping) for t in tables):
        raise RuleError(f"{where}: write [[check.layer]], with two brackets")
    return tuple(
        _layer_limit(t, f"{where}: layer {i + 1}") for i, t in enumerate(tables)
    )


def _layer_limit(table: Mapping[str, Any], where: str) -> LayerLimit:
    _known(table, [*LAYER_KEYS, *LAYER_METRICS], where)
    match = _text(table.get("match"), f"{where}: match")
    op = _text(table.get("op"), f"{where}: op")
    if match is None and op is None:
        raise RuleError(f'{where}: which layers? write match = "head.*" or op = "Conv"')
    limits = tuple(
        _limit(metric, table[key], f"{where}: {key}")
        for key, metric in LAYER_METRICS.items()
        if key in table
    )
    if not limits:
        raise RuleError(f"{where}: no limit; write one of {', '.join(LAYER_METRICS)}")
    return LayerLimit(match or "*", op or "*", limits)


# -- small pieces -------------------------------------------------------------------


def _known(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in table:
        if key not in known:
            raise RuleError(
                f"{where}: unknown key {str(key)[:60]!r}{nearest(str(key), known)}"
            )


def _text(value: Any, where: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise RuleError(f"{where} must be a text")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    return tuple(str(_text(item, where)) for item in items)


def _shapes(value: Any, where: str) -> dict[str, tuple[int, ...]]:
    """`"1,3,224,224"` for a single input, or `{ input = [1, 3, 224, 224] }`."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        value = {"": value}
    return {str(name): _shape(dims, where) for name, dims in value.items()}


def _shape(dims: Any, where: str) -> tuple[int, ...]:
    if isinstance(dims, str):
        dims = [
            int(d) if d.strip().isdecimal() and len(d) < 12 else d
            for d in dims.split(",")
        ]
    valid = (
        isinstance(dims, list)
        and dims
        and all(
            isinstance(d, int) and not isinstance(d, bool) and 0 < d < 2**31
            for d in dims
        )
    )
    if not valid:
        raise RuleError(f"{where}: write a shape such as [1, 3, 224, 224]")
    return tuple(dims)


def _images(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """How image files become inputs, from the keys of [data]."""
    found: dict[str, Any] = {}
    if "size" in table:
        size = _numbers(table["size"], f"{where}: size")
        if len(size) not in (1, 2) or min(size) < 1:
            raise RuleError(f"{where}: size: write [224, 224]")
        found["size"] = (int(size[0]), int(size[-1]))
    for key in ("mean", "std"):
        if key in table:
            found[key] = _numbers(table[key], f"{where}: {key}")
    if "layout" in table:
        found["layout"] = str(table["layout"]).lower()
        if found["layout"] not in ("nchw", "nhwc"):
            raise RuleError(f"{where}: layout: nchw or nhwc")
    return found


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            raise RuleError(f"{where}: write numbers such as [0.485, 0.456, 0.406]")
    return tuple(items)


def models_of(check: Check, given: Sequence[str] = ()) -> list[str]:
    """The models a check holds, as written; UsageError where a pattern has none.

    Where models are `given` on the command line, the check holds those of them that
    its patterns match, or all of them where it names no model.
    """
    if not check.models:
        if not given:
            raise UsageError(
                f'check {check.name!r} names no model; add model = "build/*.onnx"'
            )
        return list(given)
    found: dict[str, None] = {}
    for pattern in check.models:
        found.update((p.as_posix(), None) for p in files.expand(pattern, check.folder))
    if not given:
        return list(found)
    wanted = {(Path.cwd() / g).resolve() for g in given}
    return [m for m in found if (check.folder / m).resolve() in wanted]
