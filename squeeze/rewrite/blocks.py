"""Blocks: read from TOML, checked, and built at a site as a real fragment.

rules/README.md describes the format. A rule is layers in a chain; everything it says
is an expression over the site (`SITE_NAMES`), the rule's parameters and its lets.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import onnx

from squeeze import rules
from squeeze.errors import RuleError, UsageError, nearest
from squeeze.rewrite import expressions
from squeeze.rewrite.expressions import Value
from squeeze.rewrite.sites import Site

SITE_NAMES = frozenset(
    """cin cout group axes kernel_size kh kw kd sh sw sd dh dw dd activation
    same_shape""".split()
)
AXIS_NAMES = ("d", "h", "w")

# op → the keys a layer of it has beside id, from, when; True where it must
LAYER_KEYS: dict[str, dict[str, bool]] = {
    "Conv": dict(out=True, group=False, window=False, stride=False, kernel=False),
    "MaxPool": dict(stride=True),
    "AveragePool": dict(stride=True),
    "GlobalAveragePool": {},
    "Activation": {"else": False},
    "ChannelShuffle": dict(group=True),
    "Add": {},
    "Mul": {},
    "Concat": {},
}
SEVERAL_INPUTS = ("Add", "Mul", "Concat")
# activations by their own name: ONNX attributes are the keys
NAMED_ACTIVATIONS = frozenset(
    """Relu LeakyRelu Sigmoid Tanh HardSigmoid HardSwish Elu Selu Softplus
    Softsign""".split()
)
TOP_KEYS = (
    "summary",
    "source",
    "pool",
    "keep_first",
    "params",
    "let",
    "accept",
    "layer",
)
PARAM_KEYS = ("default", "min", "max", "above", "choices", "help")
ALL_AXES = "all"


@dataclass(frozen=True)
class Expression:
    """A parsed expression with its text and where it stands."""

    text: str
    where: str
    tree: Any

    def __call__(self, names: Mapping[str, Value]) -> Value:
        return expressions.evaluate(self.tree, names, self.where)

    def integer(self, names: Mapping[str, Value]) -> int:
        value = self(names)
        if isinstance(value, Fraction) and value.denominator == 1:
            value = value.numerator
        if isinstance(value, bool) or not isinstance(value, int):
            raise RuleError(
                f"{self.where}: {self.text} gives {value}, not a whole number"
            )
        return value


@dataclass(frozen=True)
class Param:
    """A parameter that --set changes, with its bounds."""

    name: str
    default: Value
    minimum: Value | None
    maximum: Value | None
    above: Value | None
    choices: tuple[str, ...]
    help: str

    @property
    def numeric(self) -> bool:
        return not isinstance(self.default, (str, bool))

    def check(self, value: Value, where: str) -> Value:
        """The value, or RuleError with the bound it breaks."""
        if self.choices and value not in self.choices:
            known = nearest(str(value), self.choices)
            raise RuleError(f"{where}: {self.name} can't be {value!r}{known}")
        if self.numeric:
            if isinstance(value, (str, bool)):
                raise RuleError(f"{where}: {self.name} must be a number, not {value!r}")
            self._bounds(value, where)
        return value

    def _bounds(self, value: Any, where: str) -> None:
        for broken, text in (
            (self.minimum is not None and value < self.minimum, f"≥ {self.minimum}"),
            (self.maximum is not None and value > self.maximum, f"≤ {self.maximum}"),
            (self.above is not None and value <= self.above, f"> {self.above}"),
        ):
            if broken:
                raise RuleError(
                    f"{where}: {self.name} must be {text}, not {number(value)}"
                )


@dataclass(frozen=True)
class Accept:
    """A condition on the site, and the reason printed where it is false."""

    when: Expression
    because: str


@dataclass(frozen=True)
class Layer:
    """One layer of a rule. `window` and `stride` name axes, or are "all"."""

    op: str
    id: str
    sources: tuple[str, ...]
    when: Expression | None
    numbers: Mapping[str, Expression]
    window: tuple[str, ...] | str = ()
    stride: tuple[str, ...] | str = ()
    kernel: tuple[Expression, ...] = ()
    otherwise: str = ""
    attributes: Mapping[str, Expression] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """A block as its file declares it."""

    name: str
    path: Path
    summary: str
    source: str
    pool: str
    keep_first: bool
    params: Mapping[str, Param]
    lets: Mapping[str, Expression]
    accepts: tuple[Accept, ...]
    layers: tuple[Layer, ...]

    def settings(self, given: Mapping[str, str | Value]) -> dict[str, Value]:
        """Every parameter's value; UsageError for a name or value that can't be."""
        values = {p.name: p.default for p in self.params.values()}
        for name, raw in given.items():
            if name not in self.params:
                known = nearest(name, self.params)
                raise UsageError(
                    f"--set: block {self.name!r} has no parameter {name!r}{known}"
                )
            parsed = parse_value(raw) if isinstance(raw, str) else raw
            if isinstance(self.params[name].default, str):
                parsed = str(raw)
            values[name] = self.params[name].check(parsed, "--set")
        return values

    def names(self, site: Site, settings: Mapping[str, Value]) -> dict[str, Value]:
        """Everything that the rule's expressions can read at a site."""
        names = {**site_names(site), **settings}
        for name, expression in self.lets.items():
            names[name] = expression(names)
        return names

    def refusal(self, names: Mapping[str, Value]) -> str:
        """The first reason that speaks against the site, or nothing."""
        for accept in self.accepts:
            if not accept.when(names):
                return accept.because
        return ""


def parse_value(text: str) -> Value:
    """A number where the text is one (exactly), else the text."""
    try:
        exact = Fraction(text)
    except (ValueError, ZeroDivisionError):
        return text
    return exact.numerator if exact.denominator == 1 else exact


def number(value: Value) -> str:
    """A value as a person writes it."""
    if isinstance(value, Fraction):
        return f"{float(value):.6g}"
    return str(value)


def plain(value: Value) -> int | float | str | bool:
    """A value for JSON."""
    return float(value) if isinstance(value, Fraction) else value


def site_names(site: Site) -> dict[str, Value]:
    """SITE_NAMES at a site; an axis that the site hasn't got is 1."""
    names: dict[str, Value] = {
        "cin": site.cin,
        "cout": site.cout,
        "group": site.group,
        "axes": len(site.axes),
        "kernel_size": 1,
        "activation": "·".join(node.op_type for node in site.activation),
        "same_shape": site.same_shape,
    }
    for letter in AXIS_NAMES:
        names |= {f"k{letter}": 1, f"s{letter}": 1, f"d{letter}": 1}
    for letter, axis in zip(AXIS_NAMES[-len(site.axes) :], site.axes, strict=True):
        names |= {
            f"k{letter}": axis.kernel,
            f"s{letter}": axis.stride,
            f"d{letter}": axis.dilation,
        }
        names["kernel_size"] = int(names["kernel_size"]) * axis.kernel
    return names


# -- reading ------------------------------------------------------------------------


def load(name: str) -> Rule:
    """A shipped block by name, or a user's own by path."""
    path = rules.find("blocks", name)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Fraction)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RuleError(f"{path}: not valid TOML: {error}") from error
    return _Reader(path).rule(table)


class _Reader:
    """Reads one file; every error names the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, key: str, problem: str) -> RuleError:
        return RuleError(f"{self.path}: {key}: {problem}")

    def keys(self, table: Any, known: tuple[str, ...], key: str) -> dict[str, Any]:
        if not isinstance(table, dict):
            raise self.fail(key, "must be a table")
        for name in table:
            if name not in known:
                where = f"{key}.{name}" if key else name
                raise self.fail(where, f"unknown key{nearest(name, known)}")
        return table

    def text(
        self, table: dict[str, Any], name: str, key: str, default: str = ""
    ) -> str:
        value = table.get(name, default)
        if not isinstance(value, str):
            raise self.fail(f"{key}.{name}".lstrip("."), "must be text in quotes")
        return value

    def expression(self, value: Any, key: str, known: frozenset[str]) -> Expression:
        where = f"{self.path}: {key}"
        tree = expressions.parse(value, where)
        expressions.check_names(tree, known, where)
        return Expression(str(value), where, tree)

    def rule(self, table: dict[str, Any]) -> Rule:
        self.keys(table, TOP_KEYS, "")
        for needed in ("summary", "layer"):
            if needed not in table:
                raise self.fail(needed, "missing")
        pool = self.text(table, "pool", "", "keep")
        if pool not in ("keep", "absorb"):
            raise self.fail("pool", f'must be "keep" or "absorb", not {pool!r}')
        keep_first = table.get("keep_first", True)
        if not isinstance(keep_first, bool):
            raise self.fail("keep_first", "must be true or false")
        params = self.params(table.get("params", {}))
        known, lets = self.lets(table.get("let", {}), SITE_NAMES | frozenset(params))
        return Rule(
            name=self.path.stem,
            path=self.path,
            summary=self.text(table, "summary", ""),
            source=self.text(table, "source", ""),
            pool=pool,
            keep_first=keep_first,
            params=params,
            lets=lets,
            accepts=self.accepts(table.get("accept", []), known),
            layers=self.layers(table["layer"], known),
        )

    def params(self, tables: Any) -> dict[str, Param]:
        if not isinstance(tables, dict):
            raise self.fail("params", "must be a table")
        found = {}
        for name, table in tables.items():
            key = f"params.{name}"
            self.keys(table, PARAM_KEYS, key)
            if name in SITE_NAMES:
                raise self.fail(
                    key, "is the name of something of the site; choose another"
                )
            if "default" not in table:
                raise self.fail(key, "has no default")
            if not isinstance(table["default"], (int, Fraction, str, bool)):
                raise self.fail(
                    f"{key}.default", "must be a number, text or truth value"
                )
            bounds = [table.get(k) for k in ("min", "max", "above")]
            for kind, bound in zip(("min", "max", "above"), bounds, strict=True):
                if bound is not None and not isinstance(bound, (int, Fraction)):
                    raise self.fail(f"{key}.{kind}", "must be a number")
            choices = table.get("choices", [])
            if not isinstance(choices, list) or any(
                not isinstance(c, str) for c in choices
            ):
                raise self.fail(f"{key}.choices", "must be a list of texts")
            text = self.text(table, "help", key)
            low, high, above = bounds
            found[name] = Param(
                name, table["default"], low, high, above, tuple(choices), text
            )
            found[name].check(table["default"], f"{self.path}: {key}.default")
        return found

    def lets(
        self, table: Any, known: frozenset[str]
    ) -> tuple[frozenset[str], dict[str, Expression]]:
        if not isinstance(table, dict):
            raise self.fail("let", "must be a table")
        lets: dict[str, Expression] = {}
        for name, value in table.items():
            if name in known:
                raise self.fail(
                    f"let.{name}", "is the name of something else; choose another"
                )
            lets[name] = self.expression(value, f"let.{name}", known)
            known |= {name}
        return known, lets

    def accepts(self, tables: Any, known: frozenset[str]) -> tuple[Accept, ...]:
        if not isinstance(tables, list):
            raise self.fail("accept", "must be written as [[accept]]")
        found = []
        for index, table in enumerate(tables, 1):
            key = f"accept {index}"
            self.keys(table, ("when", "because"), key)
            for needed in ("when", "because"):
                if needed not in table:
                    raise self.fail(f"{key}.{needed}", "missing")
            when = self.expression(table["when"], f"{key}.when", known)
            found.append(Accept(when, self.text(table, "because", key)))
        return tuple(found)

    def layers(self, tables: Any, known: frozenset[str]) -> tuple[Layer, ...]:
        if not isinstance(tables, list) or not tables:
            raise self.fail("layer", "must be written as [[layer]], at least one")
        layers: list[Layer] = []
        for index, table in enumerate(tables, 1):
            ids = [layer.id for layer in layers if layer.id]
            layers.append(self.layer(table, f"layer {index}", known, ids))
        return tuple(layers)

    def layer(
        self, table: Any, key: str, known: frozenset[str], ids: list[str]
    ) -> Layer:
        if not isinstance(table, dict) or not isinstance(table.get("op"), str):
            raise self.fail(f"{key}.op", "missing: name the layer's op")
        op = table["op"]
        if op not in LAYER_KEYS and op not in NAMED_ACTIVATIONS:
            known_ops = [*LAYER_KEYS, *sorted(NAMED_ACTIVATIONS)]
            raise self.fail(f"{key}.op", f"no op {op!r}{nearest(op, known_ops)}")
        own = LAYER_KEYS.get(op) or dict.fromkeys(_attributes(op), False)
        self.keys(table, ("op", "id", "from", "when", *own), key)
        for name, needed in own.items():
            if needed and name not in table:
                raise self.fail(f"{key}.{name}", f"missing: a {op} needs it")

        def expression(name: str) -> Expression:
            return self.expression(table[name], f"{key}.{name}", known)

        attributes = _attributes(op) if op in NAMED_ACTIVATIONS else {}
        return Layer(
            op=op,
            id=self.text(table, "id", key),
            sources=self.sources(table, key, op, ids),
            when=expression("when") if "when" in table else None,
            numbers={n: expression(n) for n in ("out", "group") if n in table},
            window=self.axes(table.get("window", []), f"{key}.window"),
            stride=self.axes(table.get("stride", []), f"{key}.stride"),
            kernel=self.kernel(table.get("kernel"), f"{key}.kernel", known),
            otherwise=self.otherwise(table, key),
            attributes={n: expression(n) for n in attributes if n in table},
        )

    def sources(
        self, table: dict[str, Any], key: str, op: str, ids: list[str]
    ) -> tuple[str, ...]:
        given = table.get("from", ["previous"])
        given = [given] if isinstance(given, str) else given
        valid = ["previous", "input", *ids]
        for name in given if isinstance(given, list) else [given]:
            if name not in valid:
                raise self.fail(
                    f"{key}.from", f"no layer {name!r}{nearest(str(name), valid)}"
                )
        if (op in SEVERAL_INPUTS) != (len(given) > 1):
            needs = "two or more sources" if op in SEVERAL_INPUTS else "one source"
            raise self.fail(f"{key}.from", f"{op} takes {needs}")
        return tuple(given)

    def axes(self, given: Any, key: str) -> tuple[str, ...] | str:
        if given == ALL_AXES:
            return ALL_AXES
        if not isinstance(given, list) or any(a not in AXIS_NAMES for a in given):
            raise self.fail(key, 'must be "all" or a list of "d", "h", "w"')
        return tuple(given)

    def kernel(
        self, given: Any, key: str, known: frozenset[str]
    ) -> tuple[Expression, ...]:
        if given is None:
            return ()
        if not isinstance(given, list):
            raise self.fail(key, "must be a list, one size per axis")
        return tuple(self.expression(g, key, known) for g in given)

    def otherwise(self, table: dict[str, Any], key: str) -> str:
        name = self.text(table, "else", key)
        if name and name not in NAMED_ACTIVATIONS:
            raise self.fail(
                f"{key}.else",
                f"no activation {name!r}{nearest(name, NAMED_ACTIVATIONS)}",
            )
        return name


def _attributes(op: str) -> tuple[str, ...]:
    """Names of the op's float and int attributes, from ONNX's own schema."""
    return tuple(sorted(onnx.defs.get_schema(op).attributes))
