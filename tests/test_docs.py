"""The README is complete and true: every command, block and option, and they run."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from squeeze import rules
from squeeze.cli import cli
from squeeze.cli import run as squeeze_cli
from squeeze.rewrite import blocks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = cli.list_commands(None)  # type: ignore[arg-type]
EXAMPLES = re.findall(r"^\$ (squeeze .*)$", README, re.M)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented_with_an_example(name: str) -> None:
    """A heading, and an example with its output."""
    assert re.search(rf"^### `squeeze {name}`", README, re.M)
    assert any(example.split()[1] == name for example in EXAMPLES)


@pytest.mark.parametrize("name", rules.names("blocks"))
def test_every_block_is_documented_with_its_parameters(name: str) -> None:
    """A row of the table with every parameter's default."""
    (row,) = re.findall(rf"^\| `{name}` \|.*$", README, re.M)
    for parameter in blocks.load(name).params.values():
        assert f"{parameter.name}={blocks.number(parameter.default)}" in row


def test_every_op_of_rules_is_taught() -> None:
    """rules/README.md has every layer op, key and name of the language."""
    text = (ROOT / "rules/README.md").read_text(encoding="utf-8")
    for op, keys in blocks.LAYER_KEYS.items():
        assert f"`{op}`" in text
        assert all(key in text for key in keys)
    for name in blocks.SITE_NAMES | set(blocks.PARAM_KEYS):
        assert re.search(rf"\b{name}\b", text), name


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_of_the_readme_run(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each `$ squeeze …` line works as it stands, in a checkout."""
    shutil.copytree(ROOT / "sample_models", tmp_path / "sample_models")
    for name in ("squeeze.toml", "squeeze-baseline.json"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert squeeze_cli(shlex.split(example)[1:]) == 0


def test_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's example works as it stands."""
    shutil.copytree(ROOT / "sample_models", tmp_path / "sample_models")
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        if "import pytest" not in code and "torch" not in code:
            exec(compile(code, "README.md", "exec"), {})


def test_no_machine_paths_in_the_project() -> None:
    """Nothing that ships names a path of one machine."""
    for path in [ROOT / "README.md", *(ROOT / "squeeze").rglob("*.py")]:
        assert not re.search(r"/(work|root|home)/", path.read_text(encoding="utf-8"))
