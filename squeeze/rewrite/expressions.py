"""The small arithmetic of rules: parsed with `ast`, checked, never run as Python.

Numbers are exact (int or Fraction): floor(0.29 * 100) is 29.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

from squeeze.errors import RuleError, nearest

Value = int | Fraction | bool | str

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: Fraction(a) / Fraction(b),
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "floor": math.floor,
    "ceil": math.ceil,
}
_ALLOWED = (
    ast.BinOp,
    ast.BoolOp,
    ast.UnaryOp,
    ast.Compare,
    ast.IfExp,
    ast.Call,
    ast.Name,
    ast.Constant,
    ast.Load,
    ast.And,
    ast.Or,
    ast.Not,
    ast.USub,
    *_BINARY,
    *_COMPARE,
)
MAX_LENGTH = 500


def parse(text: object, where: str) -> ast.expr:
    """Parse an expression, or take a number or truth value as it is.

    Raises RuleError, with `where` in front, for anything outside the small language.
    """
    if isinstance(text, (bool, int, Fraction)):
        return ast.Constant(text)  # type: ignore[arg-type]
    if not isinstance(text, str) or len(text) > MAX_LENGTH:
        raise RuleError(f"{where}: must be an expression in quotes, or a number")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RuleError(f"{where}: {text!r} is not an expression") from error
    for node in ast.walk(tree):
        known = isinstance(node, _ALLOWED)
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else "?"
            known = called in _FUNCTIONS and not node.keywords
        if isinstance(node, ast.Constant):
            known = isinstance(node.value, (bool, int, float, str))
        if not known:
            kind = type(node).__name__
            raise RuleError(
                f"{where}: {text!r} uses what rules don't have ({kind}); use + - * / "
                "// %, comparisons, and/or/not, `a if c else b`, min, max, floor, ceil"
            )
    return tree


def names_in(tree: ast.expr) -> set[str]:
    """Names that the expression reads, functions left out."""
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - set(_FUNCTIONS)


def check_names(tree: ast.expr, known: Iterable[str], where: str) -> None:
    """Raise RuleError for a name that isn't known, naming the nearest."""
    known = sorted(known)
    for name in sorted(names_in(tree)):
        if name not in known:
            raise RuleError(
                f"{where}: no name {name!r}{nearest(name, known)} "
                f"(valid: {', '.join(known)})"
            )


def evaluate(tree: ast.expr, names: Mapping[str, Value], where: str) -> Value:
    """The expression's value; RuleError where the operands don't fit."""
    try:
        value: Value = _value(tree, names)
        return value
    except ZeroDivisionError as error:
        raise RuleError(f"{where}: divides by zero") from error
    except (TypeError, OverflowError) as error:
        raise RuleError(f"{where}: {error}") from error


def _value(node: ast.expr, names: Mapping[str, Value]) -> Any:
    match node:
        case ast.Constant(value=float() as number):
            return Fraction(repr(number))
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return names[name]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, names)
        case ast.UnaryOp(operand=operand):
            return -_value(operand, names)
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](_value(left, names), _value(right, names))
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_value(v, names) for v in values)
        case ast.BoolOp(values=values):
            return any(_value(v, names) for v in values)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test, names) else orelse, names)
        case ast.Call(func=ast.Name(id=name), args=args):
            return _FUNCTIONS[name](*(_value(a, names) for a in args))
        case ast.Compare(left=left, ops=compared, comparators=right):
            operands = [left, *right]
            values = [_value(v, names) for v in operands]
            pairs = zip(compared, values, values[1:], strict=False)
            return all(_COMPARE[type(op)](a, b) for op, a, b in pairs)
    raise TypeError(f"unexpected {type(node).__name__}")
