"""The command line: output, exit statuses, and what a new user types wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from squeeze.cli import run as squeeze_cli
from tests.builders import SAMPLES, Net

DIGITS = str(SAMPLES / "digits_cnn.onnx")


def _squeeze(
    *arguments: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "squeeze", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def test_help_names_every_command() -> None:
    """`squeeze --help` lists every command and imports nothing heavy."""
    done = _squeeze("--help")
    assert done.returncode == 0
    for name in ("profile", "convert", "rules"):
        assert f"  {name} " in done.stdout
    code = "import sys, squeeze.cli; squeeze.cli.run(['--help']); "
    code += "print(sorted(sys.modules))"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    ).stdout
    for heavy in ("'numpy'", "'onnx'", "'onnxruntime'", "'rich'", "'onnxsim'"):
        assert heavy not in modules


def test_json_is_one_document_and_nothing_else(tmp_path: Path) -> None:
    """Warnings go to stderr; stdout parses."""
    out = tmp_path / "out.onnx"
    done = _squeeze("convert", DIGITS, "--to", "bottleneck", "-o", str(out), "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert "fitted to the old weights" in done.stderr
    assert report["schema"] == 1
    assert set(report) >= {"input", "output", "before", "after", "changes", "latency"}
    assert {"macs", "flops", "params", "weight_bytes", "file_bytes"} <= set(
        report["before"]
    )
    assert report["after"]["file_bytes"] == out.stat().st_size
    change = report["changes"][0]
    assert set(change) >= {"site", "action", "applied", "reason", "before", "after"}
    assert set(report["latency"]) == {
        "before_ms",
        "after_ms",
        "ratio",
        "ratio_low",
        "ratio_high",
    }


def test_profile_json_contract(capsys: pytest.CaptureFixture[str]) -> None:
    """The contract's keys, and layers that sum to the totals."""
    assert squeeze_cli(["profile", DIGITS, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    for key in ("macs", "flops", "params"):
        assert report[key] == sum(layer[key] for layer in report["layers"])
    assert set(report) >= {
        "schema",
        "model",
        "weight_bytes",
        "file_bytes",
        "peak_activation_bytes",
        "uncounted_ops",
    }
    assert report["file_bytes"] == Path(DIGITS).stat().st_size
    assert report["layers"][0]["output_shape"] == [1, 16, 8, 8]


@pytest.mark.parametrize(
    "option", ["--by=op", "--by=kind", "--csv", "--markdown", "--top=2"]
)
def test_profile_views(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every view names the convolutions or their kind."""
    assert squeeze_cli(["profile", DIGITS, option]) == 0
    out = capsys.readouterr().out
    assert "3×3" in out or "Conv" in out


def test_profile_sorts(capsys: pytest.CaptureFixture[str]) -> None:
    """--sort params puts the layer with most parameters first."""
    assert squeeze_cli(["profile", DIGITS, "--csv", "--sort", "params"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("name,op,kind,macs")
    assert rows[1].startswith("conv3,")


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    """--dry-run reports and leaves the folder as it was."""
    model = tmp_path / "m.onnx"
    model.write_bytes(Path(DIGITS).read_bytes())
    done = _squeeze("convert", str(model), "--to", "effnet", "--dry-run", "--json")
    assert json.loads(done.stdout)["output"] is None
    assert [f.name for f in tmp_path.iterdir()] == ["m.onnx"]


def test_default_output_is_beside_the_input(tmp_path: Path) -> None:
    """<stem>.<block>.onnx, and the input stays as it was."""
    model = tmp_path / "m.onnx"
    model.write_bytes(Path(DIGITS).read_bytes())
    assert squeeze_cli(["convert", str(model), "--to", "effnet", "--no-bench"]) == 0
    assert (tmp_path / "m.effnet.onnx").exists()
    assert model.read_bytes() == Path(DIGITS).read_bytes()


def test_nothing_applied_is_a_warning_and_status_0(tmp_path: Path) -> None:
    """The output is written all the same."""
    out = tmp_path / "out.onnx"
    done = _squeeze(
        "convert", DIGITS, "--to", "effnet", "--only", "none", "-o", str(out)
    )
    assert done.returncode == 0
    assert "nothing could be applied: not in --only" in done.stderr
    onnx.checker.check_model(str(out), full_check=True)


def test_defaults_from_squeeze_toml(tmp_path: Path) -> None:
    """`model` and a table per command stand in for what isn't typed."""
    (tmp_path / "squeeze.toml").write_text(
        f'model = "{DIGITS}"\n[convert]\nto = "bottleneck"\ndry-run = true\n'
        "json = true\n"
    )
    done = _squeeze("convert", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["changes"][1]["details"]["block"] == "bottleneck"
    (tmp_path / "squeeze.toml").write_text('[convert]\nblock = "effnet"\n')
    done = _squeeze("convert", cwd=tmp_path)
    assert done.returncode == 2
    assert "[convert] block: unknown key" in done.stderr
    (tmp_path / "squeeze.toml").write_text("[convert\n")
    done = _squeeze("convert", cwd=tmp_path)
    assert done.returncode == 2
    assert "squeeze.toml: not valid TOML" in done.stderr


WRONG = {
    "missing file": (["profile", "none.onnx"], 2, "no such file"),
    "folder": (["profile", "."], 2, "is a folder"),
    "empty": (["profile", "empty.onnx"], 3, "empty"),
    "text": (["convert", "text.onnx", "--to", "effnet"], 3, "text file"),
    "truncated": (["convert", "cut.onnx", "--to", "effnet"], 3, "truncated"),
    "unknown block": (
        ["convert", "m.onnx", "--to", "efnet"],
        2,
        "did you mean 'effnet'",
    ),
    "unknown command": (["profle", "m.onnx"], 2, "did you mean 'profile'"),
    "no such option": (["profile", "m.onnx", "--srot"], 2, "--sort"),
    "bad shape": (["profile", "m.onnx", "--input-shape", "1,x"], 2, "is not a shape"),
    "dynamic size": (
        ["profile", "dynamic.onnx"],
        3,
        "pass --input-shape x:1,3,224,224",
    ),
    "bad --set": (
        ["convert", "m.onnx", "--to", "effnet", "--set", "x"],
        2,
        "NAME=VALUE",
    ),
    "bad regex": (
        ["convert", "m.onnx", "--to", "effnet", "--only", "re:("],
        2,
        "regular",
    ),
    "no folder": (
        ["convert", "m.onnx", "--to", "effnet", "-o", "no/x.onnx"],
        2,
        "no such",
    ),
    "output is a folder": (
        ["convert", "m.onnx", "--to", "effnet", "-o", "."],
        2,
        "a folder",
    ),
    "unknown rule": (["rules", "efnet"], 2, "did you mean 'effnet'"),
    "missing rule file": (["rules", "--check", "none.toml"], 2, "no such file"),
    "custom op": (["convert", "custom.onnx", "--to", "effnet"], 0, "not verified"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good model and every kind of bad one."""
    folder = tmp_path_factory.mktemp("bad")
    whole = Path(DIGITS).read_bytes()
    (folder / "m.onnx").write_bytes(whole)
    (folder / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "text.onnx").write_text("not a model")
    net = Net(["N", 3, "H", "W"])
    net.conv(3, 8)
    net.save(folder / "dynamic.onnx")
    model = onnx.load(folder / "m.onnx")
    node = model.graph.node.add(op_type="Magic", domain="my.ops", name="magic")
    node.input.append("logits")
    node.output.append("magic")
    model.opset_import.add(domain="my.ops", version=1)
    model.graph.output[0].name = "magic"
    onnx.save(model, folder / "custom.onnx")
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_has_its_message_and_status(case: str, bad_files: Path) -> None:
    """No traceback for what a user can cause, and the status that the README gives."""
    arguments, status, message = WRONG[case]
    before = sorted(bad_files.iterdir())
    done = _squeeze(*arguments, cwd=bad_files)
    text = done.stdout + done.stderr
    assert done.returncode == status, text
    assert message in text
    assert "Traceback" not in text
    if status:
        assert sorted(bad_files.iterdir()) == before


def test_an_own_bug_is_status_70(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash is told apart from what a user can cause."""

    def crash(*_: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(sys.modules["squeeze.cost.layers"], "_layers", crash)
    assert squeeze_cli(["profile", DIGITS]) == 70


def test_version() -> None:
    """--version prints the package's."""
    from squeeze import __version__

    assert _squeeze("--version").stdout.split()[-1] == __version__


def test_rules_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    """The list names every block; one block shows its cost formula."""
    assert squeeze_cli(["rules"]) == 0
    listed = capsys.readouterr().out
    for name in ("effnet", "xception", "shufflenet", "bottleneck"):
        assert name in listed
    assert squeeze_cli(["rules", "effnet", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    steps = shown["example"]["steps"]
    assert sum(step["macs"] for step in steps) == shown["example"]["macs"]
    for step in steps:
        if step["formula"]:
            product = 1
            for factor in step["formula"].split(" · "):
                product *= int(factor)
            assert product == step["macs"]
