# SPDX-License-Identifier: Apache-2.0
"""``zipserv plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import plan as planner
from ..plan import speed
from ..plan.capacity import parse_size
from ..plan.models import KNOWN
from .folder import read_json
from .output import emit, existing, json_option
from .output import size as short

_GIB = 1 << 30


def _size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _machine(gpu: str | None, bandwidth: float | None, teraflops: float | None) -> speed.Machine | None:
    if (bandwidth is None) != (teraflops is None):
        raise click.UsageError("--bandwidth and --teraflops go together")
    if bandwidth is not None and teraflops is not None:
        return speed.Machine(gpu or "this GPU", bandwidth * 1e9, teraflops * 1e12, "given")
    return speed.GPUS[gpu] if gpu is not None else None


def _gib(nbytes: float) -> str:
    return f"{nbytes / _GIB:.2f} GiB"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f} ms"


def _print(plan: dict[str, Any]) -> None:
    model, room, rate = plan["model"], plan["capacity"], plan["speed"]
    before, after = room["before"], room["after"]
    what = f"{model['name']} ({model['type']}), {model['parameters'] / 1e9:.3f} G parameters"
    click.echo(f"{what}, tensor parallel {model['tp']}; all sizes are of one rank")
    click.echo(f"compression: {plan['compression']['detail']}")
    click.echo(f"\n{'matrices':20}{'M x K':>16}{'count':>8}{'before':>12}{'after':>12}  stays uncompressed because")
    for row in plan["matrices"]:
        shape = f"{row['m']}x{row['k']}"
        click.echo(f"{row['layer']:20}{shape:>16}{row['count']:>8}{short(row['before']):>12}{short(row['after']):>12}  {row['plain'] or ''}".rstrip())
    click.echo(f"{'norms, biases':20}{'':>16}{'':>8}{short(plan['vectors_bytes']):>12}{short(plan['vectors_bytes']):>12}  vectors")

    tokens = {"before": before["tokens"], "after": after["tokens"]}
    rows = (
        ("weights", _gib(before["weights"]), _gib(after["weights"])),
        ("  of these uncompressed", _gib(before["uncompressed"]), _gib(after["uncompressed"])),
        ("room for the KV cache", *(_gib(side["kv_bytes"]) if side["fits"] else "does not fit" for side in (before, after))),
        ("KV-cache tokens", *(f"{tokens[side]:,}" for side in ("before", "after"))),
        (f"sequences of {model['length']}", f"{before['sequences']:,}", f"{after['sequences']:,}"),
    )
    click.echo(f"\n{'':24}{'before':>16}{'after':>16}")
    for name, first, second in rows:
        click.echo(f"{name:24}{first:>16}{second:>16}")
    click.echo(
        f"gained: {_gib(before['weights'] - after['weights'])}, {room['tokens_gained']:,} KV-cache tokens. "
        f"Batch {model['batch']} x {model['length']} needs {room['tokens_wanted']:,}: "
        + ", ".join(f"{'fits' if tokens[side] >= room['tokens_wanted'] else 'does not fit'} {side}" for side in ("before", "after"))
    )
    click.echo(
        f"({room['utilization']:.0%} of {_gib(room['gpu_memory'])} may be used; {_gib(room['reserve'])} of it are reserved for activations, "
        f"CUDA graphs and communication, an assumption; a token takes {room['kv_bytes_per_token']:,} bytes)"
    )

    click.echo(f"\nspeed-up of a decode step, batch {model['batch']}, {model['length']} tokens of context:")
    line = rate["roofline"]
    times = f", {_ms(line['before_seconds'])} -> {_ms(line['after_seconds'])}" if line["before_seconds"] else ""
    click.echo(f"  roofline  {line['speedup']:.3f}{times}: what no kernel can beat ({line['detail']})")
    line = rate["measured"]
    if line is None:
        click.echo("  measured  nothing: give the bench.json of `zipserv bench --out` with --table")
        return
    if line["speedup"] is None:
        click.echo(f"  measured  nothing: the table ({line['detail']}) has none of these shapes at {model['batch']} tokens")
    else:
        click.echo(
            f"  measured  {line['speedup']:.3f}, {_ms(line['before_seconds'])} -> {_ms(line['after_seconds'])}: the linear layers alone, "
            f"{line['covered']:.0%} of the bytes they read ({line['detail']})"
        )
    if line["missing"]:
        click.echo(f"            not in the table: {', '.join(line['missing'])}")


@click.command(epilog=f"Models by name: {', '.join(KNOWN)}.")
@click.argument("model", metavar="MODEL_CONFIG")
@click.option("--gpu-memory", callback=_size, metavar="SIZE", help="Memory of each GPU: 24GiB, 80GB; default: that of --gpu.")
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="Tensor-parallel ranks.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences decoded together.")
@click.option("--length", type=click.IntRange(1), default=4096, show_default=True, help="Tokens of each sequence, prompt and answer.")
@click.option(
    "--utilization",
    type=click.FloatRange(0, 1, min_open=True),
    default=planner.UTILIZATION,
    show_default=True,
    help="vLLM's --gpu-memory-utilization.",
)
@click.option("--reserve", callback=_size, metavar="SIZE", default="2GiB", show_default=True, help="For activations, CUDA graphs, communication.")
@click.option("--kv-dtype", type=click.Choice(["bfloat16", "fp8"]), default="bfloat16", show_default=True, help="Of the KV cache.")
@click.option("--bits", type=float, metavar="B", help="Bits of a compressed weight; default: measured where the weights are, else assumed.")
@click.option("--gpu", type=click.Choice(sorted(speed.GPUS)), help="For the roofline, by its data sheet.")
@click.option("--bandwidth", type=click.FloatRange(0, min_open=True), metavar="GB/S", help="For the roofline, in place of --gpu's.")
@click.option("--teraflops", type=click.FloatRange(0, min_open=True), metavar="T", help="For the roofline: BF16 matmul rate.")
@click.option("--table", type=click.Path(path_type=Path, dir_okay=False), help="A bench.json of `zipserv bench --out`, measured on that GPU.")
@click.option("--plot", metavar="PNG", type=click.Path(path_type=Path), help="Write the picture here as well.")
@json_option
def plan(
    model: str, gpu_memory: int | None, tp: int, batch: int, length: int, utilization: float, reserve: int, kv_dtype: str, bits: float | None,
    gpu: str | None, bandwidth: float | None, teraflops: float | None, table: Path | None, plot: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Plan serving with vLLM: what fits on each GPU before and after compression, and what speed to expect.

    MODEL_CONFIG is a model folder, a config.json, a name from the list below, or a hub name (organisation/model) that is in
    the local cache; nothing is downloaded. Weights that lie there are sampled for their size. The speed-up is given by the
    roofline, and by measured figures where a table is given, each marked as what it is.
    """
    if gpu_memory is None:
        if gpu is None:
            raise click.UsageError("give --gpu-memory, or --gpu, which has one")
        gpu_memory = speed.GPUS[gpu].memory
    if plot is not None:
        from .. import plots

        plots.require()
    document = planner.make(
        model, gpu_memory=gpu_memory, tp=tp, batch=batch, length=length, utilization=utilization, reserve=reserve,
        kv_bytes=1 if kv_dtype == "fp8" else 2, bits=bits, machine=_machine(gpu, bandwidth, teraflops),
        table=None if table is None else read_json(existing(table)),
    )  # fmt: skip
    if plot is not None:
        from ..plan import picture

        picture.draw(document, plot)
    if as_json:
        emit({"command": "plan", **document, "plot": str(plot) if plot else None})
        return
    _print(document)
    for note in document["notes"]:
        click.echo(f"note: {note}")
    if plot is not None:
        click.echo(f"plot: {plot}")
