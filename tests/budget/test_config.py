"""Configurations: what is accepted, and the message for what isn't."""

from __future__ import annotations

import json
from fractions import Fraction
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from squeeze.budget import config, files, units
from squeeze.budget.metrics import LAYER_METRICS, METRICS
from squeeze.errors import RuleError, UsageError

SCHEMA = json.loads(
    (resources("squeeze") / "schemas" / "config.schema.json").read_text("utf-8")
)

FULL = """
[[check]]
name = "classifier"
model = "build/*.onnx"
baseline = "squeeze-baseline.json"
macs      = { max = "600M", max_increase = "0%" }
params    = { max = "5M" }
file_size = { max = "20MB" }
peak_memory = { max = "8MB" }
latency   = { max_increase = "10%", reference = "main/classifier.onnx", level = "warn" }
accuracy  = { min = "90%", max_drop = "0.5pp", data = "val.npz" }
agreement = { min = "99%", data = "calib.npz", reference = "float.onnx" }
predicted_latency = { max = "20ms", device = "cortex-m7" }
[[check.layer]]
match = "head.*"
macs = { max = "50M" }
"""


def _load(folder: Path, text: str) -> config.Budget:
    file = folder / "squeeze.toml"
    file.write_text(text)
    return config.load(file)


def test_the_whole_configuration(tmp_path: Path) -> None:
    """Every metric, its default level and its limit in base units."""
    (check,) = _load(tmp_path, FULL).checks
    levels = {limit.metric.name: limit.level for limit in check.limits}
    assert levels == dict.fromkeys(levels, "error") | {"latency": "warn"}
    bounds = {
        (limit.metric.name, key): quantity.amount
        for limit in check.limits
        for key, quantity in limit.bounds.items()
    }
    assert bounds["macs", "max"] == 600_000_000
    assert bounds["file_size", "max"] == 20_000_000
    assert bounds["accuracy", "max_drop"] == Fraction(5, 1000)
    assert bounds["predicted_latency", "max"] == 20
    assert check.layers[0].match == "head.*"
    jsonschema.validate(files.read_toml(tmp_path / "squeeze.toml"), SCHEMA)


def test_the_schema_knows_what_the_reader_knows() -> None:
    """Metrics, their limits and options are the same in the schema and the reader."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    defined = SCHEMA["$defs"]
    check = {*defined["check"]["properties"]}
    assert check == {*config.KEYS, *METRICS}
    assert {*defined["layer"]["properties"]} == {*config.LAYER_KEYS, *LAYER_METRICS}
    for name, metric in METRICS.items():
        keys = {*defined[name]["properties"]}
        assert keys == {*metric.limits, *metric.options, "level"}


# each: the check, what the message must hold, whether the schema refuses it as well
WRONG: list[tuple[str, str, bool]] = [
    ('macss={max="1M"}', "did you mean 'macs'", True),
    ('macs={maxi="1M"}', "did you mean 'max'", True),
    ('macs={max="1m"}', "did you mean 'M'", True),
    ('macs={max="1MB"}', "unknown unit 'MB'", True),
    ('file_size={max="1mb"}', "did you mean 'MB'", True),
    ('macs={max="-1M"}', "negative", True),
    ("macs={max=-1}", "negative", True),
    ("macs={max=nan}", "not a limit", False),
    ("macs={max=inf}", "not a limit", False),
    ('macs={max="nan"}', "is not a count", True),
    ('macs={max="1e99"}', "too large", False),
    (f"macs={{max={10**40}}}", "too large", False),
    ("macs={max=true}", "is not a count", True),
    ('macs={max=""}', "is not a count", True),
    ("macs={max=[1]}", "is not a count", True),
    ("macs={}", "no limit", True),
    ('macs="1M"', "write macs = {", True),
    ('macs={max="1M",level="fatal"}', "unknown level 'fatal'", True),
    ('accuracy={min=0.9,data="d"}', "has no unit", True),
    ('accuracy={min="90pp",data="d"}', "unknown unit 'pp'", True),
    ('accuracy={max_drop="1%",data="d"}', "did you mean 'pp'", True),
    ('latency={max="3ms",reference="r"}', "one machine only", True),
    ('latency={max_increase="10%"}', "compare with something", False),
    ('macs={max_increase="10%"}', "compare with something", False),
    ('agreement={min="9%",data="d"}', "with which model", False),
    ('baseline="b.json"\nlatency={max_increase="9%"}', "a stored time", False),
    ("name=1\nmacs={max=1}", "name must be a text", True),
    ("input_shape=[1,-3]\nmacs={max=1}", "write a shape", True),
    ('input_shape="1,2,x"\nmacs={max=1}', "write a shape", False),
    ("layer=1\nmacs={max=1}", "two brackets", True),
    ("[[check.layer]]\nmacs={max=1}", "which layers", True),
    ('[[check.layer]]\nmatch="a"', "no limit", True),
    ('[[check.layer]]\nmatch="a"\nfile_size={max=1}', "unknown key", True),
]


@pytest.mark.parametrize(("check", "message", "schema_too"), WRONG)
def test_what_is_wrong_is_named(
    check: str, message: str, schema_too: bool, tmp_path: Path
) -> None:
    """A wrong key, unit or value is a RuleError that says what to write."""
    text = f'[[check]]\nmodel="m.onnx"\n{check}\n'
    with pytest.raises(RuleError) as caught:
        _load(tmp_path, text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400
    if schema_too:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(files.read_toml(tmp_path / "squeeze.toml"), SCHEMA)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("check:\n  - model: m.onnx\n    macs: 600M\n", "looks like YAML"),
        ("x = " + "[" * 100_000, "nested too deeply"),
        (f"x = {'9' * 5000}", "not valid TOML"),
        ("[check]\nmacs = 1\n", "two brackets"),
        ("x = 1\n", "no [[check]]"),
        ("\x00", "not valid TOML"),
        ('[[check]]\nmodel="a"\nmacs={max=1}\n' * 2, "two checks are named"),
    ],
)
def test_a_file_that_is_no_configuration(
    text: str, message: str, tmp_path: Path
) -> None:
    """YAML, nesting without end, huge numbers: one message, at once."""
    with pytest.raises(RuleError) as caught:
        _load(tmp_path, text)
    assert message in str(caught.value)


def test_a_configuration_beyond_its_size_is_not_read(tmp_path: Path) -> None:
    """A file of many megabytes, or no regular file, is refused unread."""
    large = tmp_path / "squeeze.toml"
    with large.open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(UsageError, match="more than"):
        config.load(large)
    with pytest.raises(UsageError, match="not a regular file"):
        config.load(Path("/dev/zero"))


@given(st.fractions(min_value=0, max_value=10**12), st.sampled_from(["count", "bytes"]))
def test_written_limits_read_back_at_or_above(amount: Fraction, family: str) -> None:
    """What --init writes is never below the amount, and at most 1 % (or 1) above."""
    text = units.written(amount, family)
    back = units.parse(text, (family,), "x").amount
    assert amount <= back <= max(amount * Fraction(101, 100), amount + 1)


@given(st.text(max_size=20) | st.floats() | st.integers() | st.none())
def test_any_value_is_read_or_refused(value: Any) -> None:
    """A limit of any text or number is a quantity from 0 on, or a RuleError."""
    try:
        found = units.parse(value, ("count",), "x")
    except RuleError:
        return
    assert 0 <= found.amount <= units.LARGEST


# -- patterns -----------------------------------------------------------------------


def test_patterns_cross_folders_and_no_links(tmp_path: Path) -> None:
    """`**` finds files at any depth once, however folders link to each other."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    for place in ("a/one.onnx", "a/b/two.onnx", "top.onnx", "a/b/note.txt"):
        (tmp_path / place).write_text("x")
    for index in range(20):
        (tmp_path / "a" / f"loop{index}").symlink_to(tmp_path)
    found = [str(p) for p in files.expand("**/*.onnx", tmp_path)]
    assert found == ["a/b/two.onnx", "a/one.onnx", "top.onnx"]
    assert [str(p) for p in files.expand("*.onnx", tmp_path)] == ["top.onnx"]
    assert [str(p) for p in files.expand("a/*/t?o.onnx", tmp_path)] == ["a/b/two.onnx"]


def test_a_pattern_made_to_be_slow_is_not(tmp_path: Path) -> None:
    """Many stars over a long name take no time."""
    (tmp_path / ("a" * 200)).write_text("x")
    with pytest.raises(UsageError, match="matches no file"):
        files.expand("*a" * 60 + "b", tmp_path)
    with pytest.raises(UsageError, match="matches no file"):
        files.expand("**/" * 200 + "b*", tmp_path)


@pytest.mark.parametrize("pattern", ["self.onnx", "*.onnx", "gone.onnx"])
def test_broken_links_are_named(pattern: str, tmp_path: Path) -> None:
    """A link to itself or to nothing is an error, in a pattern as well."""
    (tmp_path / "self.onnx").symlink_to("self.onnx")
    (tmp_path / "gone.onnx").symlink_to("nowhere")
    with pytest.raises(UsageError, match="symbolic link to nothing"):
        files.expand(pattern, tmp_path)


def test_baselines_that_are_none(tmp_path: Path) -> None:
    """A merge conflict, a key twice, NaN or deep nesting in a baseline is refused."""
    from squeeze.budget import baseline

    good = '{"schema": 1, "models": {"m": {"macs": 1}}}'
    for text in (
        f"<<<<<<< ours\n{good}",
        good.replace('"macs": 1', '"macs": 1, "macs": 2'),
        good.replace('"macs": 1', '"macs": NaN'),
        good.replace('"macs": 1', '"macs": -1'),
        good.replace('"macs": 1', '"macs": 1.5'),
        good.replace('"schema": 1', '"schema": 9'),
        "[" * 100_000,
        "[]",
    ):
        file = tmp_path / "b.json"
        file.write_text(text)
        with pytest.raises(RuleError):
            baseline.read(file)
