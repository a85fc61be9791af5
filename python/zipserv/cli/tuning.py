# SPDX-License-Identifier: Apache-2.0
"""``zipserv tune``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click
import torch
from tqdm import tqdm

from .. import choices, tune
from ..plan import architecture, models
from .output import Code, Failure, emit, json_option


def _numbers(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[int]:
    parts = [part.strip() for part in value.split(",")] if value else []
    wrong = [part for part in parts if not part.isdecimal() or int(part) < 1]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is not a positive number")
    return [int(part) for part in parts]


def shapes_of(what: Sequence[str], tp: int) -> list[tuple[int, int]]:
    """The weight shapes that the arguments name: pairs of numbers, or one model.

    A model is what ``zipserv plan`` takes: its stacked matrices (q, k and v; gate and up) as one rank holds them, and where there is a
    compressed checkpoint of it, the matrices of that.

    Raises click.UsageError where the arguments are no shapes and no single model, ValueError where the model is none that can be read.
    """
    if what[0].isdecimal():
        if len(what) % 2 or not all(part.isdecimal() and int(part) for part in what):
            raise click.UsageError(f"weight shapes are pairs of numbers, rows and columns: {' '.join(what)!r}")
        numbers = [int(part) for part in what]
        return list(zip(numbers[::2], numbers[1::2], strict=True))
    if len(what) > 1:
        raise click.UsageError("give one model, or pairs of rows and columns")
    source = models.find(what[0])
    found = [(x.m, x.k) for x in architecture.layout(source.config, tp).matrices if x.plain is None and x.read]
    if source.folder is not None and tp == 1:
        found += _compressed(str(source.folder))
    return list(dict.fromkeys(found))


def _compressed(folder: str) -> list[tuple[int, int]]:
    """The BF16 matrices that a checkpoint holds compressed; none where it holds none."""
    import zipserv

    try:
        with zipserv.open_file(folder) as file:
            infos = [file.info(name) for name in file]
    except (OSError, ValueError, zipserv.Error):
        return []
    wanted = (info for info in infos if info.compressed and info.dtype is torch.bfloat16 and len(info.shape) == 2)
    return [(info.shape[0], info.shape[1]) for info in wanted]


def _device(name: str | None) -> torch.device:
    if not torch.cuda.is_available():
        raise Failure(Code.MISSING, "tuning measures a GPU, and torch sees none; `zipserv doctor` says more")
    try:
        device = torch.device(name or "cuda")
    except RuntimeError as error:
        raise click.BadParameter(f"{name!r} is no device; cuda and cuda:1 are", param_hint="--device") from error
    if device.type != "cuda":
        raise click.BadParameter(f"{name!r}: only GPUs are tuned", param_hint="--device")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.2f} us"


def _outcome(found: tune.Outcome) -> dict[str, Any]:
    return {
        **found.problem.request(),
        "choice": str(found.choice),
        "default": str(found.default),
        "seconds": found.seconds,
        "default_seconds": found.default_seconds,
        "measured": found.measured,
        "failed": found.failed,
    }


def _line(found: tune.Outcome) -> str:
    if found.choice == found.default:
        return f"{found.problem}: {found.choice} as without tuning, {_us(found.seconds)}"
    return f"{found.problem}: {found.choice}, {_us(found.seconds)}; without tuning {found.default}, {_us(found.default_seconds)} ({found.gain:.3f} x)"


def _list(as_json: bool) -> int:
    files = choices.files()
    if as_json:
        tables = [{**file, "entries": [entry.request() for entry in file.get("entries", ())]} for file in files]
        emit({"command": "tune", "files": tables})
        return Code.OK
    if not files:
        click.echo("nothing was tuned: `zipserv tune llama-3.1-8b` measures the shapes of a model")
    for file in files:
        click.echo(f"{file['path']}" + (f": not used: {file['error']}" if "error" in file else ""))
        if "error" in file:
            continue
        key = file["key"]
        software = f"driver for CUDA {key['driver']}, NVRTC {key['nvrtc']}, zipserv {key['zipserv']}, kernels {key['kernels']}"
        click.echo(f"  {key['gpu']}, {key['sms']} SMs, {software}")
        for entry in file["entries"]:
            gain = entry.default_seconds / entry.seconds
            click.echo(f"  {entry.problem}: {entry.choice}, {_us(entry.seconds)}, without tuning {_us(entry.default_seconds)} ({gain:.3f} x)")
    return Code.OK


@click.command("tune", epilog=f"Models that are known by name: {', '.join(models.KNOWN)}.")
@click.argument("what", nargs=-1, metavar="[MODEL | M K [M K]...]")
@click.option("--tokens", callback=_numbers, metavar="N,...", help="Only the classes of these numbers of tokens (up to 16, 32 ... 8192).")
@click.option("--batch-invariant/--no-batch-invariant", "invariant", default=True, help="Also choose the layout of the batch-invariant mode.")
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="With a model: the matrices of one of so many ranks.")
@click.option(
    "--budget", type=click.FloatRange(0, min_open=True), metavar="SECONDS", default=0.1, show_default=True, help="Measure each class closely so long."
)
@click.option("--device", metavar="NAME", help="cuda or cuda:1; default: the current GPU.")
@click.option("--list", "show", is_flag=True, help="Show what was chosen before, on this and on other machines, and measure nothing.")
@click.option("--clear", is_flag=True, help="Forget all of it.")
@json_option
def tune_command(
    what: tuple[str, ...], tokens: list[int], invariant: bool, tp: int, budget: float, device: str | None, show: bool, clear: bool, as_json: bool
) -> int:
    """Measure which layout of the kernels is the fastest for a model's weight shapes on this GPU, and from how many tokens on it is faster to
    decompress a weight for cuBLAS.

    MODEL is a folder with a config.json, such a file, a name from the local model cache or one known here; or give rows and columns of weights.
    Every way is checked before it is timed. The choices are kept in the cache directory (docs/benchmark.md) and used by all later processes with
    the same GPU, driver, NVRTC and version of zipserv; ZIPSERV_TUNED=off leaves them out. Ctrl-C keeps what has been measured until then.
    """
    if show or clear:
        if what or (show and clear):
            raise click.UsageError("--list and --clear stand alone")
        if show:
            return _list(as_json)
        removed = choices.clear()
        if as_json:
            emit({"command": "tune", "removed": removed})
        else:
            click.echo(f"{removed} {'file' if removed == 1 else 'files'} of choices removed")
        return Code.OK
    if not what:
        raise click.UsageError("name a model, or rows and columns of weights; --list shows what was chosen before")
    shapes = shapes_of(what, tp)
    target = _device(device)
    todo = tune.problems(shapes, tokens, invariant=invariant)
    found: list[tune.Outcome] = []
    skipped: list[str] = []
    stopped = False
    quiet = as_json or not sys.stderr.isatty()
    with tqdm(total=len(todo), desc="tune", unit="class", leave=False, dynamic_ncols=True, disable=quiet) as bar:
        try:
            for outcome in tune.run(todo, target, budget=budget):
                bar.update(1)
                if isinstance(outcome, str):
                    skipped.append(outcome)
                    continue
                found.append(outcome)
                bar.set_postfix_str(f"{outcome.problem} {outcome.gain:.2f} x")
                if not as_json:
                    bar.clear()
                    click.echo(_line(outcome))
                    bar.refresh()
        except tune.WrongResult as error:
            raise Failure(Code.FAILED_CHECK, f"{error}; what was measured before is kept") from error
        except KeyboardInterrupt:
            stopped = True
    if as_json:
        emit({"ok": not stopped, "command": "tune", "outcomes": [_outcome(x) for x in found], "skipped": skipped, "interrupted": stopped})
        return Code.INTERRUPTED if stopped else Code.OK
    for outcome in found:
        for way, reason in outcome.failed.items():
            click.echo(f"not usable here: {outcome.problem}, {way}: {reason.splitlines()[0]}")
    for text in skipped:
        click.echo(f"not measured: {text}")
    better = [x for x in found if x.choice != x.default]
    if better:
        click.echo(f"{len(better)} of {len(found)} classes are faster now, by up to {max(x.gain for x in better):.3f} x")
    elif found:
        click.echo(f"{len(found)} classes measured; what is done without tuning was never slower by {tune.MARGIN:.0%}")
    if stopped:
        click.echo(f"zipserv: interrupted; the choices for {len(found)} of {len(todo)} classes are kept", err=True)
        return Code.INTERRUPTED
    return Code.OK
