"""What `squeeze check` writes, each held to its format."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import pytest

from squeeze.cli import run
from tests.builders import SAMPLES

CIFAR = SAMPLES / "cifar10_cnn.onnx"
NASTY = "a]]>\n::error::x\x1b[31m <b>&\"'@me|`%##[error]"

BUDGET = """
[[check]]
name = "sizes, all: of <them>"
model = ["cifar10_cnn.onnx", "nasty.onnx"]
baseline = "base.json"
macs = { max = "1M", max_increase = "0%" }
params = { max = "1k", level = "warn" }
file_size = { max = "20MB" }
[[check]]
name = "outputs"
model = "cifar10_cnn.onnx"
accuracy = { min = "90%", data = "none.npz" }
agreement = { min = "90%", data = "none.npz", reference = "x.onnx", level = "warn" }
[[check.layer]]
op = "Conv"
macs = { max = "10M" }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a budget that fails in every way, and a model with a bad name."""
    (tmp_path / "cifar10_cnn.onnx").symlink_to(CIFAR)
    model = onnx.load(CIFAR)
    model.graph.node[0].name = NASTY
    onnx.save(model, tmp_path / "nasty.onnx")
    (tmp_path / "squeeze.toml").write_text(BUDGET)
    monkeypatch.chdir(tmp_path)
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def with_baseline(folder: Path) -> Path:
    """The same with a baseline, from which one layer differs."""
    assert run(["check", "--update-baseline"]) == 0
    document = json.loads((folder / "base.json").read_text())
    entry = document["models"]["cifar10_cnn.onnx"]
    entry["layers"]["conv2"]["macs"] -= 10
    entry["macs"] -= 10
    (folder / "base.json").write_text(json.dumps(document))
    return folder


def _schema(name: str) -> Any:
    file = resources("squeeze") / "schemas" / f"{name}.schema.json"
    schema = json.loads(file.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


def _json(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    run(["check", *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_json_keeps_its_schema(
    with_baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every kind of result and change, held to the schema that is shipped."""
    document = _json([], capsys)
    jsonschema.validate(document, _schema("check"))
    results = document["results"]
    assert {r["status"] for r in results} == {"within", "over", "unmeasured"}
    assert {r["level"] for r in results} == {"error", "warn"}
    required = "name model metric level limit value baseline passed reason".split()
    assert all(key in r for r in results for key in required)
    assert document["passed"] is False
    broken = {**document, "results": [{**results[0], "passed": "yes"}]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, _schema("check"))


def test_baseline_keeps_its_schema(with_baseline: Path) -> None:
    """What --update-baseline writes is held to its schema."""
    baseline = json.loads((with_baseline / "base.json").read_text())
    jsonschema.validate(baseline, _schema("baseline"))


def test_junit_is_what_ci_systems_read(
    with_baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Structure, counts and attributes of the JUnit schema; one case per limit."""
    results = _json(["--junit", "j.xml"], capsys)["results"]
    root = ElementTree.parse(with_baseline / "j.xml").getroot()
    assert root.tag == "testsuites"
    suites = list(root)
    assert [s.get("name") for s in suites] == ["sizes, all: of <them>", "outputs"]
    total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        assert suite.tag == "testsuite"
        cases = list(suite)
        found = {
            "tests": len(cases),
            "failures": sum(c.find("failure") is not None for c in cases),
            "errors": sum(c.find("error") is not None for c in cases),
            "skipped": sum(c.find("skipped") is not None for c in cases),
        }
        assert {k: int(suite.get(k, "-1")) for k in found} == found
        total = {k: total[k] + found[k] for k in total}
        names = [(c.get("classname"), c.get("name")) for c in cases]
        assert len({*names}) == len(names)
        for case in cases:
            assert case.tag == "testcase"
            assert len(case) <= 1
            for child in case:
                assert child.get("message")
    assert total["tests"] == len(results)
    failing = [r for r in results if not r["passed"]]
    errors = [r for r in failing if r["level"] == "error"]
    assert total["skipped"] == len(failing) - len(errors)
    assert total["failures"] == sum(r["status"] == "over" for r in errors)
    assert total["errors"] == sum(r["status"] == "unmeasured" for r in errors)
    assert "\x1b" not in (with_baseline / "j.xml").read_text("utf-8")


# https://docs.github.com/actions/reference/workflow-commands-for-github-actions
PROPERTY = r"(file|title)=[^\r\n:,]*"
COMMAND = re.compile(rf"::(error|warning) ({PROPERTY})(,{PROPERTY})*::[^\r\n]+")


def test_github_annotations_and_summary(
    with_baseline: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On Actions: one valid command per failure on stderr, a summary, JSON alone."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    summary = with_baseline / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    capsys.readouterr()
    assert run(["check", "--json"]) == 3
    out, err = capsys.readouterr()
    failing = [r for r in json.loads(out)["results"] if not r["passed"]]
    lines = err.splitlines()
    assert len(lines) == len(failing)
    assert all(COMMAND.fullmatch(line) for line in lines), lines
    kinds = [line.split()[0] for line in lines]
    assert kinds.count("::warning") == sum(r["level"] == "warn" for r in failing)
    assert "%25" in err
    assert summary.read_text("utf-8").startswith("before\n<!-- squeeze-check -->\n")


def test_names_from_models_are_no_workflow_commands(
    with_baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layer's name can start no line, no colour, no command and no HTML."""
    for arguments in (["--markdown"], []):
        capsys.readouterr()
        run(["check", *arguments])
        out = capsys.readouterr().out
        assert "\x1b[31m" not in out
        assert "##[error]" not in out
        assert not re.search(r"^\s*::", out, re.MULTILINE)
        if arguments:
            assert "<b>" not in re.sub("`[^`]*`", "", out)
            assert " @me" not in out


def test_gitlab_code_quality(
    with_baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list of issues with the keys GitLab asks for and fingerprints of their own."""
    results = _json(["--gitlab", "g.json"], capsys)["results"]
    issues = json.loads((with_baseline / "g.json").read_text("utf-8"))
    assert len(issues) == sum(not r["passed"] for r in results)
    prints = [i["fingerprint"] for i in issues]
    assert len({*prints}) == len(prints)
    severities = {"info", "minor", "major", "critical", "blocker"}
    for issue in issues:
        assert issue["severity"] in severities
        assert issue["description"]
        assert issue["check_name"].startswith("squeeze/")
        assert issue["location"]["path"] == "squeeze.toml"
        assert issue["location"]["lines"]["begin"] >= 1
    run(["check", "--gitlab", "again.json"])
    assert json.loads((with_baseline / "again.json").read_text("utf-8")) == issues


def test_markdown_can_be_replaced_in_a_pull_request(
    with_baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It starts with a hidden marker; its tables have as many cells as headings."""
    capsys.readouterr()
    assert run(["check", "--markdown", "--markdown-file", "m.md"]) == 3
    out = capsys.readouterr().out
    assert out == (with_baseline / "m.md").read_text("utf-8")
    assert out.startswith("<!-- squeeze-check -->\n### squeeze check: failed\n")
    tables = re.findall(r"(?:^\|.*\|$\n)+", out, re.MULTILINE)
    assert len(tables) == 3  # results, models, layers
    for table in tables:
        cells = {len(re.split(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(cells) == 1, table
    assert "conv2" in tables[-1]
    assert "squeeze shrink cifar10_cnn.onnx --macs" in out


@pytest.mark.parametrize("option", ["--junit", "--gitlab", "--markdown-file"])
def test_a_report_that_cannot_be_written_is_status_2(
    option: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unwritable report is said before anything is measured."""
    capsys.readouterr()
    assert run(["check", option, "no/such/folder.x"]) == 2
    assert "no such folder" in capsys.readouterr().err
