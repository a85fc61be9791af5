# SPDX-License-Identifier: Apache-2.0
"""The command ``zipserv``."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click

from . import output
from .output import Code

# Module, name and what it does, in the order of --help.
_COMMANDS = {
    "compress": ("convert", "compress", "Compress a safetensors file or a model folder, losing no bit."),
    "decompress": ("convert", "decompress", "Restore what was compressed, bit by bit."),
    "verify": ("verify", "verify", "Check weights against the original or by their checksums."),
    "inspect": ("inspecting", "inspect", "Show how small weights are, or would be; draw a picture."),
    "doctor": ("health", "doctor", "Tell what was found on this machine, and what to do."),
    "plan": ("planning", "plan", "Plan serving: what fits on a GPU before and after, what speed to expect."),
    "bench": ("benchmark", "bench", "Measure this machine: compressed against plain weights."),
    "tune": ("tuning", "tune_command", "Choose the fastest kernels for a model's weight shapes on this GPU, by measuring."),
}


class _Commands(click.Group):
    """A group that imports a command's module (and with it torch) when the command is called, not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, name, _ = _COMMANDS[cmd_name]
        command = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, _, summary) in _COMMANDS.items()])


def _version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        import zipserv

        click.echo(f"zipserv {zipserv.__version__}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def cli() -> None:
    """Lossless compression of BF16 model weights, about 30 % smaller, usable without decompressing.

    \b
    Exit codes, the same for every command:
      0    done, all well
      1    a check failed: weights differ, a checksum is wrong, a benchmark's result is wrong
      2    wrong usage: an unknown option, a missing argument
      3    the input cannot be read or is not what it should be
      4    the output cannot be written: disk full, read-only, exists already
      5    something is missing on this machine: a GPU, a package
      130  interrupted (Ctrl-C); no half-written file is left
    """


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds like Ctrl-C, so that temporary files are removed."""
    raise KeyboardInterrupt


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; prints no traceback unless ZIPSERV_DEBUG is set."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    try:
        result = cli.main(arguments, prog_name="zipserv", standalone_mode=False)
        return result if isinstance(result, int) else Code.OK
    except click.UsageError as error:
        hint = f"\n{error.ctx.get_usage()}" if error.ctx is not None else ""
        return _report(Code.USAGE, error.format_message() + ("" if as_json else hint), as_json)
    except click.ClickException as error:
        return _report(Code.INPUT, error.format_message(), as_json)
    except (KeyboardInterrupt, click.Abort):
        return _report(Code.INTERRUPTED, "interrupted", as_json)
    except output.Failure as failure:
        return _report(failure.code, str(failure), as_json)
    except BrokenPipeError:  # `zipserv inspect ... | head`
        sys.stderr.close()
        return Code.OK
    except Exception as error:
        if os.environ.get("ZIPSERV_DEBUG"):
            raise
        code, message = output.explain(error)
        return _report(code, message, as_json)


def _report(code: Code, message: str, as_json: bool) -> int:
    if as_json:
        document = {"ok": False, "error": {"code": int(code), "kind": code.name.lower(), "message": message}}
        click.echo(json.dumps(document))
    click.echo(f"zipserv: {message}", err=True)
    return int(code)


def main() -> NoReturn:
    """The console script."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run())
