"""The command line: one file per command, each with a click command `command`.

Nothing heavier than click is imported until a command runs.
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import click

import squeeze
from squeeze import _deferred
from squeeze.errors import SqueezeError, UsageError, nearest

INTERNAL_ERROR = 70


class Commands(click.Group):
    """Commands are the modules of this package; a misspelt one names its nearest."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        files = Path(__file__).parent.glob("[a-z]*.py")
        return sorted(f.stem for f in files)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        command = import_module(f"squeeze.cli.{name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if (
            args
            and not args[0].startswith("-")
            and self.get_command(ctx, args[0]) is None
        ):
            ctx.fail(
                f"no command {args[0]!r}{nearest(args[0], self.list_commands(ctx))}"
            )
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(squeeze.__version__, prog_name="squeeze")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Make trained ONNX models smaller and faster, and say what it cost."""
    from squeeze.cli._config import defaults

    name = ctx.invoked_subcommand
    command = cli.get_command(ctx, name) if name else None
    if name and command:
        ctx.default_map = {name: defaults(Path.cwd(), command)}


def main() -> None:
    """Run the command line and turn every failure into its message and status."""
    _deferred.install()  # here only: a library must not touch others' imports
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Exit status of one invocation: 0, 1 (check), 2, 3, 70, 130."""
    try:
        result: Any = cli.main(arguments, prog_name="squeeze", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return max(error.exit_code, UsageError.exit_status)  # 1 is the gate's alone
    except SqueezeError as error:
        _complain(str(error))
        return error.exit_status
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        _complain("out of memory; pass a smaller --input-shape or free some memory")
        return 3
    except Exception as error:
        return _bug(error)


def _bug(error: Exception) -> int:
    if os.environ.get("SQUEEZE_DEBUG"):
        traceback.print_exception(error)
        return INTERNAL_ERROR
    kind = type(error).__name__
    _complain(
        f"a bug in squeeze ({kind}: {error}); set SQUEEZE_DEBUG=1 for the traceback"
    )
    return INTERNAL_ERROR


def _complain(message: str) -> None:
    click.echo(f"squeeze: {message}", err=True)
