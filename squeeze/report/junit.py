"""JUnit XML: a suite per check, a case per limit.

A limit exceeded is a failure, one that could not be measured an error; at level
`warn` either is a skipped case with its reason, so that it is shown and doesn't fail.
"""

from __future__ import annotations

from xml.etree import ElementTree

from squeeze.budget.verdict import Report, Result
from squeeze.report import checks
from squeeze.report.checks import clean


def document(report: Report) -> str:
    """The whole file, with its XML declaration."""
    root = ElementTree.Element("testsuites", name="squeeze check")
    for name in dict.fromkeys(r.name for r in report.results):
        root.append(_suite(name, [r for r in report.results if r.name == name]))
    _count(root, report.results)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _suite(name: str, results: list[Result]) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", name=_text(name))
    _count(suite, results)
    suite.set("skipped", str(sum(not r.passed and not r.fails for r in results)))
    suite.set("time", "0")
    suite.extend(_case(r) for r in results)
    return suite


def _count(
    element: ElementTree.Element, results: list[Result] | tuple[Result, ...]
) -> None:
    failing = [r for r in results if r.fails]
    over = sum(r.status == "over" for r in failing)
    element.set("tests", str(len(results)))
    element.set("failures", str(over))
    element.set("errors", str(len(failing) - over))


def _case(result: Result) -> ElementTree.Element:
    case = ElementTree.Element(
        "testcase",
        name=_text(f"{result.metric} {result.bound} {result.layer or ''}".strip()),
        classname=_text(result.model),
        time="0",
    )
    if not result.passed:
        kind = "skipped"
        if result.fails:
            kind = "failure" if result.status == "over" else "error"
        child = ElementTree.SubElement(
            case, kind, message=_text(checks.headline(result))
        )
        if result.fails:
            child.set("type", result.status)
        child.text = _text(checks.explanation(result))
    return case


def _text(text: str) -> str:
    """XML 1.0 holds no lone surrogates and no non-characters."""
    kept = (
        c if c < "\ud800" or "\ue000" <= c < "\ufffe" or c > "\uffff" else "�"
        for c in text
    )
    return clean("".join(kept))
