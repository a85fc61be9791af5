# SPDX-License-Identifier: Apache-2.0
"""``zipserv inspect``."""

from __future__ import annotations

import math
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from ..progress import Bar
from ..survey import LayerSurvey, Total, survey, total
from . import folder as folders
from . import shards
from .output import Code, Failure, emit, existing, json_option, size
from .rules import DTYPES, SMALLEST


def _files(path: Path) -> list[Path]:
    return [path / shard for shard in folders.scan(path).shards] if path.is_dir() else [path]


def _read_all(files: list[Path], quiet: bool) -> tuple[list[LayerSurvey], list[dict[str, object]]]:
    """Surveys every 16-bit matrix that is worth compressing; the other tensors are only named."""
    layers: list[LayerSurvey] = []
    others: list[dict[str, object]] = []
    with Bar(sum(file.stat().st_size for file in files), "inspect", quiet=quiet) as bar:
        for path in files:
            with shards.opened(path) as file:
                for name in file.keys():
                    bar.say(name)
                    info = file.info(name)
                    if info.compressed or (info.dtype in DTYPES and len(info.shape) > 1 and math.prod(list(info.shape)) >= SMALLEST):
                        layers.append(survey(name, file.get(name)))
                    else:
                        dtype = str(info.dtype).removeprefix("torch.")
                        others.append({"name": name, "shape": list(info.shape), "dtype": dtype, "bytes": info.nbytes})
                    bar.step(info.nbytes)
    return layers, others


def _read_headers(files: list[Path]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for path in files:
        with shards.opened(path) as file:
            for name in file.keys():
                info = file.info(name)
                count = math.prod(info.shape)
                rows.append(
                    {
                        "name": name,
                        "shape": list(info.shape),
                        "dtype": str(info.dtype).removeprefix("torch."),
                        "stored": "zipserv" if info.compressed else "plain",
                        "bytes": info.nbytes,
                        "bits": 8 * info.nbytes / count if count else 0.0,
                    }
                )
    return rows


def _console() -> Console:
    """Never cuts a name short where the output is not a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def _shape(shape: object) -> str:
    assert isinstance(shape, (list, tuple))
    return "x".join(map(str, shape)) or "scalar"


def _header_table(rows: list[dict[str, object]]) -> Table:
    table = Table(box=None, header_style="bold")
    for title, justify in (("tensor", "left"), ("shape", "right"), ("dtype", "left"), ("stored", "left"), ("bytes", "right"), ("bits", "right")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(
            str(row["name"]), _shape(row["shape"]), str(row["dtype"]), str(row["stored"]),
            f"{row['bytes']:,}", f"{row['bits']:.2f}",
        )  # fmt: skip
    return table


def _survey_table(layers: list[LayerSurvey], everything: Total) -> Table:
    table = Table(box=None, header_style="bold", show_footer=True)
    columns = (
        ("tensor", "all"),
        ("shape", f"{everything.weights:,}"),
        ("stored", ""),
        ("bits", f"{everything.bits:.3f}"),
        ("bound", f"{everything.bound:.3f}"),
        ("7 codes", f"{everything.paper_bits:.3f}"),
        ("escapes", f"{everything.escapes / everything.weights:.2%}"),
        ("window", f"{everything.window}..{everything.window + 7}"),
    )
    for i, (title, footer) in enumerate(columns):
        table.add_column(title, footer=footer, justify="left" if i in (0, 2) else "right", overflow="fold")
    for x in layers:
        table.add_row(
            x.name, _shape(x.shape), x.stored, f"{x.bits:.3f}", f"{x.bound:.3f}", f"{x.paper_bits:.3f}",
            f"{x.escapes / x.weights:.2%}", f"{x.window}..{x.window + 7}",
        )  # fmt: skip
    return table


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--plot", metavar="PNG", type=click.Path(path_type=Path), help="Write the picture here as well.")
@click.option("--fast", is_flag=True, help="Read headers only: sizes, no exponents.")
@json_option
def inspect(path: Path, plot: Path | None, fast: bool, as_json: bool) -> None:
    """Show how small the weights of a file or folder are, or would be.

    For each 16-bit matrix: bits per weight in this format (of a plain tensor: what compressing would give), the entropy
    bound, the size of the ZipServ paper's seven-code layout for the same weights, the share of escapes, and the window
    of eight exponents that holds most of the matrix.
    """
    if fast and plot is not None:
        raise click.UsageError("--plot needs the exponents, which --fast does not read")
    files = _files(existing(path))
    if fast:
        rows = _read_headers(files)
        if as_json:
            emit({"command": "inspect", "tensors": rows})
        else:
            _console().print(_header_table(rows))
        return
    layers, others = _read_all(files, as_json)
    everything = total(layers)
    if plot is not None:
        from .. import plots

        if everything is None:
            raise Failure(Code.INPUT, f"{path}: nothing to plot: no BF16 or FP16 matrix")
        plots.model(layers, plot, path.resolve().name)
    if as_json:
        emit(
            {
                "command": "inspect",
                "layers": [layer.as_dict() for layer in layers],
                "others": others,
                "total": everything.as_dict() if everything else None,
                "plot": str(plot) if plot else None,
            }
        )
        return
    if everything is not None:
        _console().print(_survey_table(layers, everything))
    if others:
        nbytes = sum(int(str(other["bytes"])) for other in others)
        dtypes = ", ".join(sorted({str(other["dtype"]) for other in others}))
        click.echo(f"{len(others)} other tensors ({dtypes}), {size(nbytes)}: too small or of another dtype, they stay as they are")
    if plot is not None:
        click.echo(f"plot: {plot}")
