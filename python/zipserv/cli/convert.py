# SPDX-License-Identifier: Apache-2.0
"""``zipserv compress`` and ``zipserv decompress``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from ..format import SUFFIX
from ..progress import Bar
from . import folder as folders
from . import shards
from .output import Code, Failure, WriteFailure, emit, existing, json_option, rate, size
from .rules import Rules, plain_modules
from .shards import ShardReport

Convert = Callable[[Path, Path, Bar], ShardReport]


@dataclass(frozen=True)
class Job:
    """A conversion of a file or folder. ``rules`` None: decompress."""

    source: Path
    target: Path
    rules: Rules | None
    force: bool
    quiet: bool

    @property
    def word(self) -> str:
        return "decompress" if self.rules is None else "compress"

    def convert(self, source: Path, target: Path, bar: Bar) -> ShardReport:
        if self.rules is None:
            return shards.decompress_shard(source, target, bar)
        return shards.compress_shard(source, target, self.rules, bar)


def _run_file(job: Job) -> list[ShardReport]:
    if job.target.is_dir():
        raise WriteFailure(f"{job.target}: is a folder; name the file to write")
    if job.target.exists() and not job.force:
        raise WriteFailure(f"{job.target}: exists already; --force replaces it")
    if job.target.exists() and job.source.samefile(job.target):
        raise Failure(Code.USAGE, "IN and OUT are the same file")
    if not job.target.parent.is_dir():
        raise WriteFailure(f"{job.target.parent}: no such folder")
    with Bar(job.source.stat().st_size, job.word, quiet=job.quiet) as bar:
        report = job.convert(job.source, job.target, bar)
    report.path = str(job.target)
    return [report]


def _prepare_target(job: Job) -> Path:
    """Makes the target folder, or finds out that an unfinished run of the same job may go on in it; returns its marker."""
    source, target = job.source.resolve(), job.target.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise Failure(Code.USAGE, "IN and OUT must be different folders, and neither inside the other")
    marker = target / folders.UNFINISHED
    mine: dict[str, object] = {
        "job": job.word,
        "source": str(source),
        "rules": job.rules.as_dict() if job.rules else None,
    }
    if target.exists() and not target.is_dir():
        raise WriteFailure(f"{job.target}: exists already and is not a folder")
    if target.is_dir() and any(target.iterdir()) and not job.force:
        if not marker.is_file():
            raise WriteFailure(f"{job.target}: exists already and is not an unfinished run; choose another folder, or --force to write into it")
        if folders.read_json(marker) != mine:
            raise WriteFailure(f"{job.target}: holds an unfinished run with another input or other options; --force starts over")
    folders.make_directory(target)
    if not marker.is_file() or folders.read_json(marker) != mine:
        folders.write_json(marker, mine)
    return marker


def _check_configs(job: Job, folder: folders.Folder) -> dict[Path, dict[str, object]]:
    """Reads every config.json and index before hours of work are spent, and refuses what cannot be right."""
    documents = {path: folders.read_json(folder.root / path) for path in folder.configs + folder.indexes}
    for path in folder.configs:
        quantization = documents[path].get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if job.rules is not None and quantization is not None:
            raise Failure(
                Code.INPUT,
                f"{folder.root / path}: this model is already quantized or compressed ({method or 'unknown method'})",
            )
        if job.rules is None and method != folders.METHOD:
            raise Failure(Code.INPUT, f"{folder.root / path}: not compressed by zipserv")
    for path in folder.indexes:
        index = folders.rewrite_index(documents[path], str, 0, folder.root / path)
        weight_map = index["weight_map"]
        assert isinstance(weight_map, dict)
        missing = {s for s in weight_map.values() if path.parent / s not in folder.shards}
        if missing:
            raise Failure(Code.INPUT, f"{folder.root / path}: names missing files: {', '.join(sorted(missing)[:3])}")
    return documents


def _check_work(job: Job, folder: folders.Folder) -> None:
    """Reads the headers of all shards before hours of work are spent.

    Refuses a damaged one, and a model that the rules select nothing of: a copy that is called compressed is of no use.
    """
    entries = [entry for shard in folder.shards for entry in shards.entries(job.source / shard)]
    if job.rules is None or any(job.rules.wants(*entry) for entry in entries):
        return
    dtypes = sorted({str(dtype).removeprefix("torch.") for _, _, dtype in entries})
    raise Failure(
        Code.INPUT,
        f"{job.source}: nothing to compress: no matrix in bfloat16 or float16 that the options select (found: "
        f"{', '.join(dtypes) or 'no tensors'}). zipserv casts nothing: save an FP32 model in BF16 first",
    )


def _run_folder(job: Job) -> list[ShardReport]:
    folder = folders.scan(job.source)
    documents = _check_configs(job, folder)
    _check_work(job, folder)
    marker = _prepare_target(job)
    with folders.locked(marker):
        folders.remove_leftovers(job.target)
        reports = _convert_folder(job, folder, documents)
        marker.unlink()
    return reports


def _convert_folder(job: Job, folder: folders.Folder, documents: dict[Path, dict[str, object]]) -> list[ShardReport]:
    reports: dict[Path, ShardReport] = {}
    with Bar(sum(map(folder.shard_bytes, folder.shards)), job.word, quiet=job.quiet) as bar:
        for shard in folder.shards:
            source, target = job.source / shard, job.target / shard
            folders.make_directory(target.parent)
            with Bar(1, "check", quiet=True) as silent:
                report = shards.finished(source, target, job.rules, silent)
            if report is not None:
                bar.step(folder.shard_bytes(shard))
            reports[shard] = report or job.convert(source, target, bar)
            reports[shard].path = str(shard)
    for path in folder.others:
        folders.copy(job.source / path, job.target / path)
    for path in folder.indexes:
        folders.write_json(job.target / path, _index(documents[path], path, reports))
    for path in folder.configs:  # last: a folder without its config.json is not taken for a complete model
        folders.write_json(job.target / path, _config(job, documents[path], path, reports))
    return list(reports.values())


def _index(index: dict[str, object], path: Path, reports: dict[Path, ShardReport]) -> dict[str, object]:
    near = [report for shard, report in reports.items() if shard.parent == path.parent]
    compressed = {name for report in near for name, _, _ in report.compressed}
    known = compressed | {name for report in near for name, _, _ in report.plain}

    def rename(name: str) -> str:
        plain = name if name in known else name.removesuffix(SUFFIX)
        return shards.stored_name(plain, compressed=plain in compressed)

    return folders.rewrite_index(index, rename, sum(report.after for report in near), path)


def _config(job: Job, config: dict[str, object], path: Path, reports: dict[Path, ShardReport]) -> dict[str, object]:
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    near = [report for shard, report in reports.items() if shard.parent == path.parent]
    if job.rules is not None and any(report.compressed for report in near):
        config["quantization_config"] = {
            "quant_method": folders.METHOD,
            "version": 1,
            "modules_to_not_convert": plain_modules([entry for report in near for entry in report.plain]),
        }
    return config


def _run(job: Job, as_json: bool) -> None:
    existing(job.source)
    start = time.perf_counter()
    reports = _run_folder(job) if job.source.is_dir() else _run_file(job)
    seconds = time.perf_counter() - start
    before, after = sum(r.before for r in reports), sum(r.after for r in reports)
    if as_json:
        emit(
            {
                "command": job.word,
                "output": str(job.target),
                "bytes_before": before,
                "bytes_after": after,
                "seconds": seconds,
                "files": [report.as_dict() for report in reports],
            }
        )
        return
    if job.quiet:
        return
    kept = sum(report.kept for report in reports)
    resumed = f", {kept} of them done by an earlier run and verified" if kept else ""
    click.echo(f"{job.target}: {len(reports)} weight file{'s' * (len(reports) != 1)}{resumed}")
    if job.rules is not None:
        packed, plain = (sum(len(getattr(r, what)) for r in reports) for what in ("compressed", "plain"))
        click.echo(f"  {packed} tensors compressed, {plain} left as they are")
    click.echo(
        f"  {size(before)} -> {size(after)} ({after / max(before, 1):.1%}) in {seconds:.1f} s, {rate(max(before, after) / max(seconds, 1e-9))}"
    )


_IN = click.Path(path_type=Path)
_OUT = click.Path(path_type=Path)


@click.command()
@click.argument("source", metavar="IN", type=_IN)
@click.argument("target", metavar="OUT", type=_OUT)
@click.option("--include", multiple=True, metavar="PATTERN", help="Compress only tensors with such names (* and ? are wildcards).")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave tensors with such names as they are.")
@click.option("--force", is_flag=True, help="Write to an OUT that exists.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@json_option
def compress(source: Path, target: Path, include: tuple[str, ...], exclude: tuple[str, ...], force: bool, quiet: bool, as_json: bool) -> None:
    """Compress a safetensors file or a Hugging Face model folder, losing no bit.

    From a file, every 16-bit tensor of two or more dimensions is compressed. From a folder, the weights of linear layers
    and embeddings are (not positions, norms, routers: --include changes that), all other files are copied, and config.json
    says that the model is compressed. A folder is written shard by shard: run the same command again to go on after an
    interruption; what is finished is verified and kept.
    """
    rules = Rules(include, exclude, folder=source.is_dir())
    _run(Job(source, target, rules, force, quiet or as_json), as_json)


@click.command()
@click.argument("source", metavar="IN", type=_IN)
@click.argument("target", metavar="OUT", type=_OUT)
@click.option("--force", is_flag=True, help="Write to an OUT that exists.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@json_option
def decompress(source: Path, target: Path, force: bool, quiet: bool, as_json: bool) -> None:
    """Restore what `zipserv compress` was given, bit by bit; checksums are checked on the way."""
    _run(Job(source, target, None, force, quiet or as_json), as_json)
