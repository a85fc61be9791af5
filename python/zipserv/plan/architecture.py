# SPDX-License-Identifier: Apache-2.0
"""From a model's configuration to the matrices that one tensor-parallel rank holds, cut and stacked as vLLM does it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Config = Mapping[str, Any]

_TILE = 64
_VOCAB_PADDING = 64

#: What a size may be at most; more than any model has, and little enough that nothing takes forever.
_MOST, _MOST_LAYERS = 1 << 31, 1 << 14

#: What a kind of model does: ``attention_bias`` "qkv" always has these biases; ``tie_word_embeddings`` where its configuration is silent;
#: ``norms`` a layer, 2 where nothing is said; ``qk_norm``: one for queries and one for keys; ``latent``: attention as in DeepSeek (MLA).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": "qkv"},
    "qwen3": {"qk_norm": True},
    "phi3": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "norms": 4},
    "gemma3_text": {"tie_word_embeddings": True, "norms": 4, "qk_norm": True},
    "mixtral": {},
    "qwen2_moe": {"attention_bias": "qkv"},
    "qwen3_moe": {"qk_norm": True},
    "deepseek_v3": {"latent": True},
}

SUPPORTED = tuple(_DEFAULTS)


@dataclass(frozen=True)
class Matrix:
    """One kind of weight ``(m, k)`` of a rank, ``count`` times over.

    ``plain``: why it stays uncompressed, or None. ``experts``: how many of them are alternatives of each other (a routed
    expert's matrix), 1 otherwise. ``read``: whether a decode step reads all of it; tables are only looked up. ``names``: the
    checkpoint's modules that it is made of. ``original``: elements of the weights in the checkpoint, all ranks together, for one.
    """

    layer: str
    m: int
    k: int
    count: int
    original: int
    names: tuple[str, ...]
    plain: str | None = None
    experts: int = 1
    read: bool = True

    @property
    def elements(self) -> int:
        return self.m * self.k

    @property
    def tiles(self) -> int:
        return -(-self.m // _TILE) * -(-self.k // _TILE)


@dataclass(frozen=True)
class Layout:
    """What one rank holds. ``vectors``: elements of norms and biases; ``kv_per_token``: elements of the KV cache for one token."""

    model_type: str
    tp: int
    matrices: tuple[Matrix, ...]
    vectors: int
    original_vectors: int
    kv_per_token: int
    top_k: int
    longest: int | None
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Of the whole model, all ranks together."""
        return sum(x.count * x.original for x in self.matrices) + self.original_vectors


@dataclass
class _Builder:
    config: Config
    tp: int
    kind: dict[str, Any]
    matrices: list[Matrix] = field(default_factory=list)
    vectors: int = 0
    original_vectors: int = 0

    def size(self, key: str, default: int | None = None, most: int = _MOST) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"the configuration ({self.config['model_type']}) needs {key}, a positive number; it says {value!r:.80}")
        if value > most:
            raise ValueError(f"the configuration ({self.config['model_type']}) says {key} {value!r:.40}, {most} is the most that is believed")
        return value

    def optional(self, *keys: str) -> int:
        """The first of these sizes that is not null, missing or 0; 0 where there is none."""
        for key in keys:
            if (value := self.config.get(key)) is not None and (value != 0 or value is False):
                return self.size(key)
        return 0

    def layers(self, key: str) -> list[int]:
        """Numbers of layers."""
        value = self.config.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(number, int) for number in value):
            raise ValueError(f"the configuration ({self.config['model_type']}) has {key}, a list of layers' numbers; it says {value!r:.80}")
        return value

    def cut(self, what: str, size: int) -> int:
        if size % self.tp:
            raise ValueError(f"{what} ({size}) cannot be cut into {self.tp} equal parts: take another --tp")
        return size // self.tp

    def vector(self, whole: int, cut: bool = False) -> None:
        self.original_vectors += whole
        self.vectors += whole // self.tp if cut else whole

    def matrix(self, layer: str, m: int, k: int, original: int, *names: str, **more: Any) -> None:
        self.matrices.append(Matrix(layer, m, k, more.pop("count", 1), original, names, **more))


def layout(config: Config, tp: int = 1) -> Layout:
    """The matrices of one rank.

    Args:
        config: the values of a config.json.
        tp: tensor-parallel ranks.

    Raises:
        ValueError: a kind of model that is not known here, weights that are quantized or not BF16, sizes that are missing or can't
            be cut into ``tp`` parts.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"model_type is a name, not {kind!r:.80}; known are {', '.join(SUPPORTED)}")
    if kind not in _DEFAULTS:
        inside = "text_config" in config or "llm_config" in config
        more = " (a language model inside a larger one: plan it with a config.json of its text_config alone)" if inside else ""
        raise ValueError(f"model_type {kind!r} is not known here{more}; known are {', '.join(SUPPORTED)}")
    if tp < 1:
        raise ValueError(f"tensor parallel needs at least one rank, not {tp}")
    ignored = _check_weights(config)
    build = _Builder(config, tp, _DEFAULTS[kind])
    notes: list[str] = []
    kv = _decoder(build, notes)
    matrices = tuple(_ignore(matrix, ignored) for matrix in build.matrices)
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        notes.append("layers with a sliding window keep fewer tokens than counted here: the KV cache is an upper bound")
    longest = build.optional("max_position_embeddings") or None
    top_k = build.optional("num_experts_per_tok") or 1
    experts = max(matrix.experts for matrix in matrices)
    if top_k > experts > 1:
        raise ValueError(f"num_experts_per_tok is {top_k}: there are {experts} experts")
    return Layout(kind, tp, matrices, build.vectors, build.original_vectors, kv, top_k, longest, tuple(notes))


def _check_weights(config: Config) -> list[str]:
    """Refuses what is not BF16; gives the modules that a compressed folder keeps as they are."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype not in (None, "bfloat16"):
        raise ValueError(f"the weights are {dtype}: what is served compressed is bfloat16, so there is nothing to plan")
    quantization = config.get("quantization_config")
    if not quantization:
        return []
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "zipserv":
        raise ValueError(f"the weights are quantized already ({method}): ZipServ compresses BF16 weights")
    ignored = quantization.get("modules_to_not_convert") if isinstance(quantization, dict) else None
    if ignored is not None and not (isinstance(ignored, list) and all(isinstance(name, str) for name in ignored)):
        raise ValueError(f"modules_to_not_convert is a list of names, not {ignored!r:.80}")
    return ignored or []


def _ignore(matrix: Matrix, patterns: list[str]) -> Matrix:
    if matrix.plain:
        return matrix
    for name in matrix.names:
        for pattern in patterns:
            if name == pattern or name.startswith(pattern + ".") or fnmatch.fnmatchcase(name, pattern):
                return replace(matrix, plain="listed in modules_to_not_convert")
    return matrix


def _decoder(build: _Builder, notes: list[str]) -> int:
    kind, tp = build.kind, build.tp
    hidden, layers = build.size("hidden_size"), build.size("num_hidden_layers", most=_MOST_LAYERS)
    attention: Callable[[_Builder, str], int] = _latent if kind.get("latent") else _grouped
    kv = 0
    for number in range(layers):
        prefix = f"model.layers.{number}"
        kv += attention(build, f"{prefix}.self_attn")
        for _ in range(kind.get("norms", 2)):
            build.vector(hidden)
        _feed_forward(build, f"{prefix}.mlp", number)
    build.vector(hidden)
    _tables(build, hidden)
    if kind.get("latent"):
        notes.append("latent attention: vLLM keeps an uncompressed copy of kv_b_proj beside it (W_UK, W_UV), counted here")
        if tp > 1:
            notes.append("latent attention: every rank keeps the whole KV cache")
    if build.optional("num_experts_per_tok"):
        notes.append("experts: today's kernels run them one after the other; the roofline says what a grouped kernel could reach")
    return kv


def _tables(build: _Builder, hidden: int) -> None:
    config, tp = build.config, build.tp
    vocabulary = build.size("vocab_size")
    rows = -(-vocabulary // _VOCAB_PADDING) * _VOCAB_PADDING
    if rows % tp:
        raise ValueError(f"the vocabulary ({rows} rows with padding) cannot be cut into {tp} equal parts: take another --tp")
    tied = config.get("tie_word_embeddings")
    tied = build.kind.get("tie_word_embeddings", False) if tied is None else bool(tied)
    original = vocabulary * hidden
    if not tied:
        why = "an embedding of its own is only looked up"
        build.matrix("embed_tokens", rows // tp, hidden, original, "model.embed_tokens", plain=why, read=False)
    build.matrix("lm_head", rows // tp, hidden, original, "lm_head", *(["model.embed_tokens"] if tied else []))


def _grouped(build: _Builder, prefix: str) -> int:
    """Attention with grouped keys and values: qkv stacked, heads dealt to the ranks."""
    config, tp = build.config, build.tp
    hidden, heads = build.size("hidden_size"), build.size("num_attention_heads")
    kv_heads = build.size("num_key_value_heads", heads)
    head = build.size("head_dim", hidden // heads or None)
    mine = build.cut("the attention heads", heads)
    if kv_heads % tp and tp % kv_heads:
        raise ValueError(f"{kv_heads} heads of keys and values can be neither dealt nor copied to {tp} ranks: take another --tp")
    kv_mine = max(1, kv_heads // tp)
    rows = (heads + 2 * kv_heads) * head
    build.matrix("qkv", (mine + 2 * kv_mine) * head, hidden, rows * hidden, *(f"{prefix}.{x}" for x in ("q_proj", "k_proj", "v_proj", "qkv_proj")))
    build.matrix("o", hidden, mine * head, hidden * heads * head, f"{prefix}.o_proj")
    bias = build.kind.get("attention_bias") or config.get("attention_bias")
    if bias:
        build.original_vectors += rows
        build.vectors += (mine + 2 * kv_mine) * head
    if bias is True:
        build.vector(hidden)
    if build.kind.get("qk_norm"):
        build.vector(head)
        build.vector(head)
    return 2 * kv_mine * head


def _latent(build: _Builder, prefix: str) -> int:
    """Latent attention (MLA): the two down projections stacked on every rank, the up projections dealt by heads."""
    hidden, heads = build.size("hidden_size"), build.size("num_attention_heads")
    mine = build.cut("the attention heads", heads)
    rank, nope = build.size("kv_lora_rank"), build.size("qk_nope_head_dim")
    rope, value = build.size("qk_rope_head_dim"), build.size("v_head_dim")
    query, down = nope + rope, rank + rope
    if low := build.optional("q_lora_rank"):
        parts = (f"{prefix}.q_a_proj", f"{prefix}.kv_a_proj_with_mqa")
        build.matrix("qkv", low + down, hidden, (low + down) * hidden, *parts)
        build.matrix("q_b", mine * query, low, heads * query * low, f"{prefix}.q_b_proj")
        build.vector(low)
    else:
        build.matrix("q", mine * query, hidden, heads * query * hidden, f"{prefix}.q_proj")
        build.matrix("kv_a", down, hidden, down * hidden, f"{prefix}.kv_a_proj_with_mqa")
    build.vector(rank)
    up = nope + value
    build.matrix("kv_b", mine * up, rank, heads * up * rank, f"{prefix}.kv_b_proj", read=False)
    build.matrix("w_uk, w_uv", mine * up, rank, 0, f"{prefix}.kv_b_proj", plain="made by vLLM from kv_b_proj")
    build.matrix("o", hidden, mine * value, hidden * heads * value, f"{prefix}.o_proj")
    return down


def _feed_forward(build: _Builder, prefix: str, layer: int) -> None:
    config = build.config
    hidden = build.size("hidden_size")
    count = build.optional("num_local_experts", "num_experts", "n_routed_experts")
    dense = layer < build.optional("first_k_dense_replace") or layer in build.layers("mlp_only_layers")
    dense = dense or (layer + 1) % (build.optional("decoder_sparse_step") or 1) != 0
    if not count or dense:
        _gated(build, prefix, build.size("intermediate_size"), "")
        if config.get("mlp_bias"):
            build.vector(2 * build.size("intermediate_size"), cut=True)
            build.vector(hidden)
        return
    inner = build.optional("moe_intermediate_size") or build.size("intermediate_size")
    mine = build.cut("an expert's inner size", inner)
    experts = f"{prefix}.experts"
    build.matrix("experts gate_up", 2 * mine, hidden, 2 * inner * hidden, experts, count=count, experts=count)
    build.matrix("experts down", hidden, mine, hidden * inner, experts, count=count, experts=count)
    build.matrix("router", count, hidden, count * hidden, f"{prefix}.gate", plain="a router")
    if config["model_type"].startswith("deepseek"):
        build.vector(count)  # e_score_correction_bias
        if shared := build.optional("n_shared_experts"):
            _gated(build, f"{prefix}.shared_experts", inner * shared, "shared ")
    elif shared := build.optional("shared_expert_intermediate_size"):
        _gated(build, f"{prefix}.shared_expert", shared, "shared ")
        build.matrix("router", 1, hidden, hidden, f"{prefix}.shared_expert_gate", plain="a router")


def _gated(build: _Builder, prefix: str, inner: int, what: str) -> None:
    hidden = build.size("hidden_size")
    mine = build.cut("the inner size of the feed-forward layers", inner)
    names = (f"{prefix}.{x}" for x in ("gate_proj", "up_proj", "gate_up_proj"))
    build.matrix(f"{what}gate_up", 2 * mine, hidden, 2 * inner * hidden, *names)
    build.matrix(f"{what}down", hidden, mine, hidden * inner, f"{prefix}.down_proj")
