# SPDX-License-Identifier: Apache-2.0
"""``zipserv bench``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from ..bench import codec, gpu, machine, report, single, transfer
from ..bench.shapes import CPU_SHAPES, CPU_TOKENS, SHAPES, TOKENS, Shape, layers, models, select
from ..bench.weights import KINDS
from .folder import read_json
from .output import Code, Failure, emit, existing, json_option


def _names(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[str]:
    return [part.strip() for part in value.split(",")] if value else []


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int]:
    names = _names(ctx, param, value)
    wrong = [name for name in names if not name.isdecimal() or int(name) < 1]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is not a positive number")
    return [int(name) for name in names]


def _kinds(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str]:
    names = _names(ctx, param, value)
    wrong = [name for name in names if name not in KINDS]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is not one of {', '.join(KINDS)}")
    return names


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise click.BadParameter(f"{name!r} is no device; cpu, cuda or cuda:1 are", param_hint="--device") from error
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"{name!r}: zipserv runs on cpu and cuda", param_hint="--device")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Failure(Code.MISSING, "torch sees no GPU; `zipserv doctor` says more, --device cpu measures the CPU")
    return device


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=170)


def _print_machine(document: dict[str, Any]) -> None:
    for line in report.machine_lines(document["about"], document.get("limits")):
        click.echo(line)


def _one_shape(shape: Shape, tokens: int, kind: str, settings: gpu.Settings, split_k: int | None, as_json: bool) -> int:
    try:
        result: dict[str, Any] = single.run(shape, tokens, kind, settings, split_k)
    except gpu.WrongResult as error:
        raise Failure(Code.FAILED_CHECK, str(error)) from error
    except ValueError as error:
        if split_k is None:
            raise
        raise click.UsageError(str(error)) from error
    if as_json:
        emit({"command": "bench", **result})
        return Code.OK
    _print_machine(result)
    weight, point = result["weight"], result["point"]
    click.echo(
        f"\nW {shape.m} x {shape.k} ({kind}), {tokens} tokens: {weight['bits_per_weight']:.3f} bits a weight, decompressed "
        f"bit-exact, product right (RMS error {point['rms_error']:.2e} of its RMS; F.linear {point['blas_rms_error']:.2e})"
    )
    rows = [
        ("F.linear (BF16)", point["blas_seconds"], point["blas_spread"], "1.000"),
        ("ZipGEMM", point["zip_seconds"], point["zip_spread"], f"{point['speedup']:.3f}"),
        ("decompress", weight["decompress_seconds"], weight["decompress_spread"], ""),
        ("roofline", point["bound_seconds"], 0.0, f"{point['blas_seconds'] / point['bound_seconds']:.3f}"),
    ]
    if "invariant_seconds" in point:
        rows.insert(2, ("batch-invariant", point["invariant_seconds"], 0.0, f"{point['blas_seconds'] / point['invariant_seconds']:.3f}"))
    if result["solved_by"]:
        click.echo(f"solved by: {result['solved_by']}" + (f" (K in {split_k} equal shares, as asked)" if split_k else ""))
    click.echo(f"{'':18}{'time':>12}{'spread':>9}{'speed-up':>10}")
    for name, time, spread, ratio in rows:
        click.echo(f"{name:18}{report.seconds(time):>12}{spread:>9.1%}{ratio:>10}")
    return Code.OK


def _scoreboard(shapes: list[Shape], settings: gpu.Settings, out: Path | None, plots: bool, extra: dict[str, Any], as_json: bool) -> int:
    board = None
    done = 0
    try:
        for board in gpu.scoreboard(shapes, settings):
            if out is not None:
                report.write_json({**extra, **board.as_dict()}, out / "bench.json")
            if len(board.points) > done and not as_json and sys.stderr.isatty():
                p = board.points[-1]
                line = f"{p['model']} {p['layer']} {p['weights']} N={p['tokens']}: {p['speedup']:.3f}"
                click.echo(f"\r\033[K{line}", nl=False, err=True)
            done = len(board.points)
    except KeyboardInterrupt:
        if board is None or not board.points:
            raise
        board.skipped.append("interrupted: what follows was not measured")
    finally:
        if not as_json and sys.stderr.isatty():
            click.echo("\r\033[K", nl=False, err=True)
    assert board is not None
    return _show({**extra, **board.as_dict(), "summary": report.summary(board.points)}, out, plots, as_json)


def _show(document: dict[str, Any], out: Path | None, plots: bool, as_json: bool) -> int:
    """Prints what was measured, and writes it where it is wanted."""
    written: list[Path] = []
    if out is not None:
        written.append(report.write_json(document, out / "bench.json"))
        if plots and document["points"]:
            written += report.write_plots(document, out)
    if as_json:
        emit({"ok": not document["failed"], "command": "bench", **document})
    else:
        _print_machine(document)
        console = _console()
        if "codec" in document:
            console.print(report.codec_table(document["codec"]))
        console.print(report.weight_table(document["weights"]))
        console.print(report.point_table(document["points"]))
        console.print(report.summary_table(document["points"]))
        for text in document["skipped"]:
            click.echo(f"not measured: {text}")
        for path in written:
            click.echo(f"written: {path}")
    for text in document["failed"]:
        click.echo(f"zipserv: wrong result: {text}", err=True)
    return Code.FAILED_CHECK if document["failed"] else Code.OK


def _whole_model(
    config: str,
    device: torch.device,
    batch: list[int],
    prompt: int,
    new_tokens: int,
    offload: str | None,
    merge: bool,
    fuse: bool,
    out: Path | None,
    as_json: bool,
) -> int:
    from ..bench import model  # needs transformers, which nothing else here does

    try:
        result = model.run(config, device=device, batch=batch, prompt=prompt, new_tokens=new_tokens, offload=offload, merge=merge, fuse=fuse)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    result = {"about": machine.describe(device), **result}
    if out is not None:
        report.write_json(result, out / "model.json")
    if as_json:
        emit({"command": "bench", **result})
    else:
        _print_machine(result)
        click.echo(model.format_rows(result))
    return Code.OK


def _transfer(device: torch.device, load: float | None, out: Path | None, as_json: bool) -> int:
    """Weights on their way to the device: a file once (``load`` GB), or layers at each step."""
    name = "offload" if load is None else "load"
    try:
        if load is not None:
            result = transfer.loading(device, load)
        elif device.type == "cpu":
            result = transfer.streaming(device, layers=2, hidden=256, inner=512, rounds=2)
        else:
            result = transfer.streaming(device)
    except gpu.WrongResult as error:
        raise Failure(Code.FAILED_CHECK, str(error)) from error
    document = {"about": machine.describe(device), name: result}
    if out is not None:
        report.write_json(document, out / f"{name}.json")
    if as_json:
        emit({"command": "bench", **document})
    else:
        _print_machine(document)
        for line in transfer.loading_lines(result) if load is not None else transfer.streaming_lines(result):
            click.echo(line)
    return Code.OK


def _read(path: Path, out: Path | None, plots: bool, as_json: bool) -> int:
    document = read_json(existing(path))
    if not all(isinstance(document.get(key), kind) for key, kind in _PARTS):
        raise Failure(Code.INPUT, f"{path}: not a bench.json of `zipserv bench --out`")
    try:
        return _show({**document, "summary": report.summary(document["points"])}, out, plots, as_json)  # type: ignore[arg-type]
    except (KeyError, TypeError) as error:
        raise Failure(Code.INPUT, f"{path}: not a bench.json of this version: {error!r}") from error


_PARTS = (("about", dict), ("limits", dict), ("weights", list), ("points", list), ("skipped", list), ("failed", list))


@click.command(epilog=f"Models: {', '.join(models())}. Layers: {', '.join(layers())}.")
@click.argument("m", type=click.IntRange(1), required=False)
@click.argument("k", type=click.IntRange(1), required=False)
@click.argument("n", type=click.IntRange(1), required=False)
@click.option(
    "--split-k",
    type=int,
    metavar="S",
    help="With M K N on a GPU: S blocks share every row of W, with an equal part of K each. Default: blocks get equal runs of tiles.",
)
@click.option("--model", metavar="CONFIG", help="A whole language model end to end: tiny, llama-3.2-1b, llama-3.1-8b, a config.json or its folder.")
@click.option("--batch", callback=_numbers, default="1", metavar="B,...", help="With --model: numbers of sequences.")
@click.option("--prompt", type=click.IntRange(1), default=128, show_default=True, help="With --model: tokens of each prompt.")
@click.option("--new-tokens", type=click.IntRange(1), default=64, show_default=True, help="With --model: decode steps that are timed.")
@click.option("--offload", type=click.Choice(["cpu"]), help="Weights stream from host memory: of --model, or of a few layers.")
@click.option("--load", type=click.FloatRange(0, min_open=True), metavar="GB", help="Loading speed, with a file of that size.")
@click.option("--merge/--no-merge", default=True, show_default=True, help="With --model: layers that read the same input are one product.")
@click.option("--fuse", is_flag=True, help="With --model: compile what lies between the products of a decode step, in both phases.")
@click.option("--device", metavar="NAME", help="cpu, cuda or cuda:1; default: the GPU where there is one.")
@click.option(
    "--models",
    "model_patterns",
    callback=_names,
    metavar="NAMES",
    help="Only these models, with commas between them; wildcards.",
)
@click.option("--layers", "layer_patterns", callback=_names, metavar="NAMES", help="Only these layers.")
@click.option("--shapes", callback=_names, metavar="MxK,...", help="Such matrices instead of models'.")
@click.option("--tokens", callback=_numbers, metavar="N,...", help="Only these numbers of tokens.")
@click.option("--weights", "kinds", callback=_kinds, metavar="KINDS", help=f"Only these kinds of weights: {', '.join(KINDS)}.")
@click.option("--time-budget", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="Be done by then; say what is left out.")
@click.option(
    "--point-budget",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    default=0.3,
    show_default=True,
    help="Measure each number for about so long.",
)
@click.option("--codec-mib", type=click.IntRange(1), default=256, show_default=True, help="CPU: weights for the codec's speed, in MiB.")
@click.option(
    "--batch-invariant/--no-batch-invariant",
    "invariant",
    default=None,
    help="Also measure and check the batch-invariant mode; default: on a GPU.",
)
@click.option("--first-call/--no-first-call", default=True, help="GPU: also time the first products of fresh processes (some seconds).")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Write bench.json and plots here; JSON after every point.")
@click.option("--read", type=click.Path(path_type=Path, dir_okay=False), help="Measure nothing: tables and plots of a bench.json from elsewhere.")
@click.option("--plots/--no-plots", default=True, help="Plots with --out (needs matplotlib).")
@json_option
def bench(
    m: int | None, k: int | None, n: int | None, split_k: int | None,
    model: str | None, batch: list[int], prompt: int, new_tokens: int, offload: str | None, load: float | None, merge: bool, fuse: bool,
    device: str | None,
    model_patterns: Sequence[str], layer_patterns: Sequence[str], shapes: Sequence[str], tokens: Sequence[int],
    kinds: Sequence[str], time_budget: float | None, point_budget: float, codec_mib: int, invariant: bool | None, first_call: bool,
    out: Path | None,
    read: Path | None, plots: bool, as_json: bool,
) -> int:  # fmt: skip
    """Measure this machine: compressed against plain weights, and against the machine's limits.

    With M K N: check the product of N tokens with one M x K weight, then time F.linear, ZipGEMM and decompression side
    by side. Without: a scoreboard over models' weight shapes and numbers of tokens; on a CPU a short one, after the
    codec's speed against memcpy. On a GPU calls are captured in CUDA graphs, weights rotate through copies well past
    the L2 cache, and both ways are timed in turns in both orders. With --model: tokens per second, time to the first token
    and memory of a whole model. With --offload alone: layers that stream from host memory. With --load: a file to the device.
    """
    if read is not None:
        return _read(read, out, plots, as_json)
    target = _device(device)
    if model is not None:
        return _whole_model(model, target, batch, prompt, new_tokens, offload, merge, fuse, out, as_json)
    if offload is not None or load is not None:
        return _transfer(target, load, out, as_json)
    on_cpu = target.type == "cpu"
    settings = gpu.Settings(
        device=target,
        kinds=kinds or KINDS,
        tokens=tokens or (CPU_TOKENS if on_cpu else TOKENS),
        budget=point_budget,
        total=time_budget,
        min_copies=2 if on_cpu else 8,
        max_copies=32 if on_cpu else gpu.MOST_COPIES,
        min_rounds=3 if on_cpu else 10,
        invariant=not on_cpu if invariant is None else invariant,
        first_call=first_call,
    )
    if m is not None:
        if k is None or n is None:
            raise click.UsageError("give all of M K N, or none")
        kind = kinds[0] if kinds else "gaussian"
        return _one_shape(Shape("custom", "weight", m, k), n, kind, settings, split_k, as_json)
    if split_k is not None:
        raise click.UsageError("--split-k goes with M K N")
    try:
        chosen = _chosen(shapes, model_patterns, layer_patterns, on_cpu)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if plots and out is not None:
        from .. import plots as drawing

        drawing.require()
    extra: dict[str, Any] = {}
    if on_cpu:
        extra["codec"] = codec.run(mib=codec_mib, kinds=tuple(settings.kinds), budget=max(point_budget, 0.1))
    return _scoreboard(chosen, settings, out, plots, extra, as_json)


def _chosen(shapes: Sequence[str], model_patterns: Sequence[str], layer_patterns: Sequence[str], on_cpu: bool) -> list[Shape]:
    if not shapes:
        chosen_by_name = bool(model_patterns or layer_patterns)
        return select(model_patterns, layer_patterns, SHAPES if chosen_by_name or not on_cpu else CPU_SHAPES)
    found = []
    for text in shapes:
        m, _, k = text.lower().partition("x")
        if not (m.isdecimal() and k.isdecimal() and int(m) and int(k)):
            raise ValueError(f"--shapes {text!r}: give rows and columns like 4096x4096")
        found.append(Shape("custom", "weight", int(m), int(k)))
    return found
