"""The README is complete and true: every command, block and option, and they run."""

from __future__ import annotations

import importlib.util
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


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the sample models, as a user's checkout has them."""
    shutil.copytree(ROOT / "sample_models", tmp_path / "sample_models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_examples_of_the_readme_run(checkout: Path) -> None:
    """The `$ squeeze …` lines work as they stand, one after the other."""
    torch = importlib.util.find_spec("torch") is not None
    for example in EXAMPLES:
        words = shlex.split(example)[1:]
        if torch or not any("distill" in word for word in words):
            assert squeeze_cli(words) == 0, example


def test_python_example_runs(checkout: Path) -> None:
    """The library's example works as it stands."""
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        if "assert_within" not in code and "torch" not in code:
            exec(compile(code, "README.md", "exec"), {})


def test_no_machine_paths_in_the_project() -> None:
    """Nothing that ships names a path of one machine."""
    for path in [ROOT / "README.md", *(ROOT / "squeeze").rglob("*.py")]:
        assert not re.search(r"/(work|root|home)/", path.read_text(encoding="utf-8"))
