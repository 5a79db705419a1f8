"""The package itself: imports point one way, both kinds of install find the rules."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import squeeze
from squeeze.errors import nearest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "squeeze"

# a layer may import itself and those below it
LAYERS = [
    {"cli"},
    {"rewrite", "measure", "recover", "budget", "report", "testing"},
    {"calibrate", "cost"},
    {"shapes", "rules", "session"},
    {"model"},
    {"errors", "_deferred"},
]


def _imports(path: Path) -> set[str]:
    """Modules that a file imports, those inside functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _layer(part: str) -> int | None:
    return next((i for i, names in enumerate(LAYERS) if part in names), None)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    """cli → rewrite, measure, … → calibrate, cost → model → errors, never back."""
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    own = _layer(part)
    if own is None:  # squeeze/__init__.py and __main__.py may see everything
        assert part.startswith("__"), f"{path.name} has no layer: add it to LAYERS"
        return
    for name in _imports(path):
        pieces = name.split(".")
        if pieces[0] == "squeeze" and len(pieces) > 1:
            other = _layer(pieces[1])
            assert other is None or other >= own, f"{path.name} imports {name}"
        if part != "cli":
            assert pieces[0] != "click", f"{path.name}: the core never imports click"
        if part not in ("cli", "report"):
            assert pieces[0] != "rich", f"{path.name}: the core never imports rich"


def test_public_names_resolve() -> None:
    """Everything in squeeze.__all__ is there; a wrong name is an AttributeError."""
    for name in squeeze.__all__:
        assert getattr(squeeze, name) is not None
    with pytest.raises(AttributeError):
        squeeze.nothing  # noqa: B018


def test_nearest_names_one_or_lists_all() -> None:
    """The remedy for a misspelt name."""
    assert nearest("efnet", ["effnet", "xception"]) == "; did you mean 'effnet'?"
    assert nearest("zzz", ["effnet"]) == "; known: effnet"


def test_version_is_in_the_changelog() -> None:
    """Every released version says what it brought."""
    assert f"## {squeeze.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip("no package index to build with")
    assert done.returncode == 0, done.stderr


def test_wheel_carries_the_rules(tmp_path: Path) -> None:
    """Installed from a wheel, the rules are the wheel's; py.typed is there too."""
    _pip("wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {f"squeeze/rules/{p.relative_to(ROOT / 'rules')}" for p in _rules()}
    assert shipped <= set(names)
    assert "squeeze/py.typed" in names
    assert not any("rules" in name.split("/")[0] for name in names)
    folder = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(folder)
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); "
    code += "from squeeze import rules as r; "
    code += "print(r.folder('blocks'), r.names('blocks'))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert str(folder) in done.stdout
    assert "effnet" in done.stdout


def test_editable_install_reads_the_checkout(tmp_path: Path) -> None:
    """An editable install must not copy rules that then go stale."""
    site = tmp_path / "env/site"
    _pip("install", "-q", "--no-deps", "--target", str(site), "-e", str(ROOT))
    assert not (site / "squeeze").exists()
    paths = [line for f in site.glob("*.pth") for line in f.read_text().splitlines()]
    assert str(ROOT) in paths


def _rules() -> list[Path]:
    return [p for p in (ROOT / "rules").rglob("*") if p.suffix in (".toml", ".md")]


def test_dependencies_are_the_declared_ones() -> None:
    """Nothing heavy slips into what every user installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {d.split(">")[0].split("[")[0] for d in project["dependencies"]}
    assert names == {
        "click",
        "ml_dtypes",
        "numpy",
        "onnx",
        "onnx-ir",
        "onnxruntime",
        "onnxsim",
        "rich",
    }
