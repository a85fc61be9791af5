# SPDX-License-Identifier: Apache-2.0
"""Makes hostile files: bytes by a name that says what is wrong with them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from functools import cache

import torch

import zipserv
from zipserv.container import header_digest


def crc32c(data: bytes) -> int:
    """CRC-32C, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


NAME = "layer.weight_zipserv"


def container(header: bytes | dict[str, object], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, as it is; the checksum of one that names zipserv is right."""
    if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
        metadata = header["__metadata__"]
        header = {**header, "__metadata__": {**metadata, "zipserv.header": header_digest(header)}}  # type: ignore[dict-item]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def holding(blob: bytes) -> bytes:
    """A flawless container around a blob."""
    return container({NAME: entry("U8", [len(blob)], 0, len(blob))}, blob)


@cache
def blob() -> bytes:
    """A valid blob of 2 x 2 tiles, with escapes, literals and (the last tile) dense mode."""
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(1)).mul(0.02).bfloat16()
    weight[3, 5], weight[100, 7], weight[70, 70] = 1e30, 1e-30, float("nan")
    weight[64:, 64:] = (torch.rand(64, 64, generator=torch.Generator().manual_seed(2)) * 40 - 20).exp2().bfloat16()
    packed = zipserv.compress(weight)
    stats = packed.stats()
    assert stats["dense_tiles"] == 1 and stats["literals"] > 0 and not packed.is_raw
    return packed.blob.numpy().tobytes()


def with_header(**fields: tuple[int, str, int]) -> bytes:
    """The blob with header fields replaced: ``name=(offset, struct format, value)``; the header's CRC is right again."""
    data = bytearray(blob())
    for offset, kind, value in fields.values():
        struct.pack_into("<" + kind, data, offset, value)
    struct.pack_into("<I", data, 124, crc32c(bytes(data[:124])))
    return bytes(data)


def with_bytes(offset: int, new: bytes) -> bytes:
    data = bytearray(blob())
    data[offset : offset + len(new)] = new
    return bytes(data)


TILE_HEADERS, FIXED = 128, 256
ESCAPES = FIXED + 4 * 5632


def containers() -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "seven_bytes", b"1234567"
    yield "text", b"these are no tensors, but 42 characters...."
    yield "header_of_2_to_the_63", container(b"{}", length=1 << 63)
    yield "header_of_all_ones", container(b"{}", length=(1 << 64) - 1)
    yield "header_longer_than_file", container(b"{}", length=1000)
    yield "header_just_over_the_limit", container(b"{}", length=100_000_001)
    yield "no_header", container(b"")
    yield "header_is_no_json", container(b"{'a': 1}")
    yield "header_is_a_list", container(b"[]")
    yield "header_is_cut", container(b'{"a":{"dtype":"U8"')
    yield "header_is_no_utf8", container(b'{"\xff\xfe":{}}')
    yield "deep_list", container(b"[" * 200_000)
    yield "deep_object", container(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
    yield "deep_metadata", container(b'{"__metadata__":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001)
    yield "deep_checksums", container({"__metadata__": {"zipserv": "1", "zipserv.checksums": "[" * 100_000}})
    yield "checksums_are_numbers", container({"__metadata__": {"zipserv": "1", "zipserv.checksums": '{"a":1}'}})
    yield "newer_version", container({"__metadata__": {"zipserv": "2"}, "a": entry("U8", [1], 0, 1)}, b"x")
    yield "wrong_checksum", container({"__metadata__": {"zipserv": "1", "zipserv.checksums": '{"a":"00000001"}'}, "a": entry("U8", [2], 0, 2)}, b"xy")
    yield "number_too_large", container(b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,1]}}', b"x")
    yield "negative_offset", container({"a": entry("U8", [2], -1, 1)}, b"xy")
    yield "offsets_reversed", container({"a": entry("U8", [2], 2, 0)}, b"xy")
    yield "offset_beyond_file", container({"a": entry("U8", [2000], 0, 2000)}, b"xy")
    yield "offset_of_2_to_the_63", container({"a": entry("U8", [2**63], 0, 2**63)}, b"xy")
    yield "overlapping", container({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, b"xyxyxy")
    yield "many_on_the_same_bytes", container({f"t{i}": entry("U8", [4], 0, 4) for i in range(5000)}, b"xyxy")
    yield "hole", container({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"xyz")
    yield "bytes_after_the_end", container({"a": entry("U8", [1], 0, 1)}, b"x" * 100)
    yield "shape_larger_than_data", container({"a": entry("F32", [64, 64], 0, 4)}, b"xyxy")
    yield "shape_overflows", container({"a": entry("F32", [2**33, 2**33], 0, 4)}, b"xyxy")
    yield "unknown_dtype", container({"a": entry("Q3", [1], 0, 1)}, b"x")
    yield "dtype_missing", container({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"x")
    good = blob()
    yield "blob_in_two_dimensions", container({NAME: entry("U8", [2, len(good) // 2], 0, len(good))}, good)
    yield (
        "blob_stored_twice",
        container({NAME: entry("U8", [len(good)], 0, len(good)), "layer.weight": entry("U8", [1], len(good), len(good) + 1)}, good + b"x"),
    )


def blobs() -> Iterator[tuple[str, bytes]]:
    good = blob()
    size, escape_bytes = len(good), len(good) - ESCAPES
    yield "blob_empty", b""
    yield "blob_is_text", b"x" * 500
    for cut in (1, 8, 127, 128, 129, 200, 256, 5000, ESCAPES - 1, ESCAPES, ESCAPES + 1, size - 16, size - 1):
        yield f"blob_cut_at_{cut}", good[:cut]
    yield "blob_one_byte_longer", good + b"\0"
    yield "blob_16_bytes_longer", good + bytes(16)
    yield "blob_twice", good + good

    yield "magic", with_header(x=(0, "B", 0))
    yield "version_0", with_header(x=(8, "I", 0))
    yield "version_2", with_header(x=(8, "I", 2))
    yield "dtype_0", with_header(x=(12, "B", 0))
    yield "dtype_fp16", with_header(x=(12, "B", 2))
    yield "dtype_3", with_header(x=(12, "B", 3))
    yield "mode_raw", with_header(x=(13, "B", 0))
    yield "mode_raw_without_escapes", with_header(x=(13, "B", 0), y=(96, "Q", 0))
    yield "mode_2", with_header(x=(13, "B", 2))
    yield "no_dimensions", with_header(x=(14, "B", 0))
    yield "nine_dimensions", with_header(x=(14, "B", 9))
    yield "reserved_byte", with_header(x=(15, "B", 1))
    yield "reserved_end", with_header(x=(116, "B", 1))
    yield "m_0", with_header(x=(16, "Q", 0), y=(32, "Q", 0))
    yield "m_larger", with_header(x=(16, "Q", 192), y=(32, "Q", 192))
    yield "m_smaller", with_header(x=(16, "Q", 64), y=(32, "Q", 64))
    yield "m_within_the_tile", with_header(x=(16, "Q", 127), y=(32, "Q", 127))
    yield "k_within_the_tile", with_header(x=(24, "Q", 127), y=(40, "Q", 127))
    yield "m_huge", with_header(x=(16, "Q", 2**31 - 1), y=(32, "Q", 2**31 - 1))
    yield "both_huge", with_header(a=(16, "Q", 2**31 - 1), b=(32, "Q", 2**31 - 1), c=(24, "Q", 2**31 - 1), d=(40, "Q", 2**31 - 1))
    yield "m_2_to_the_63", with_header(x=(16, "Q", 2**63), y=(32, "Q", 2**63))
    yield "product_wraps_to_0", with_header(a=(16, "Q", 2**32), b=(32, "Q", 2**32), c=(24, "Q", 2**32), d=(40, "Q", 2**32))
    yield "shape_is_not_the_matrix", with_header(x=(32, "Q", 64))
    yield "shape_wraps", with_header(a=(14, "B", 4), b=(32, "Q", 2**32), c=(40, "Q", 2**32), d=(48, "Q", 2**14), e=(56, "Q", 1))
    yield "unused_shape_entry", with_header(x=(48, "Q", 5))
    yield "escape_bytes_0", with_header(x=(96, "Q", 0))
    yield "escape_bytes_odd", with_header(x=(96, "Q", escape_bytes + 1))
    yield "escape_bytes_more", with_header(x=(96, "Q", escape_bytes + 16))
    yield "escape_bytes_huge", with_header(x=(96, "Q", 2**64 - 16))
    yield "checksum", with_header(x=(104, "I", 12345))
    yield "header_crc", with_bytes(124, b"\1\2\3\4")

    yield "tile_offset_beyond", with_bytes(TILE_HEADERS + 8, struct.pack("<I", 0xFFFFFFFF))
    yield "tile_offset_of_another", with_bytes(TILE_HEADERS + 8, struct.pack("<I", 0))
    yield "tile_count_0", with_bytes(TILE_HEADERS + 4, struct.pack("<H", 0))
    yield "tile_count_65535", with_bytes(TILE_HEADERS + 4, struct.pack("<H", 65535))
    yield "tile_count_one_more", with_bytes(TILE_HEADERS + 4, struct.pack("<H", struct.unpack_from("<H", good, TILE_HEADERS + 4)[0] + 1))
    yield "tile_base_249", with_bytes(TILE_HEADERS + 6, b"\xf9")
    yield "tile_base_255", with_bytes(TILE_HEADERS + 6, b"\xff")
    yield "tile_unknown_flag", with_bytes(TILE_HEADERS + 7, b"\x80")
    yield "tile_dense_flag", with_bytes(TILE_HEADERS + 7, b"\1")
    yield "dense_tile_without_flag", with_bytes(TILE_HEADERS + 3 * 8 + 7, b"\0")
    yield "dense_tile_with_a_count", with_bytes(TILE_HEADERS + 3 * 8 + 4, b"\1\0")
    yield "tile_header_padding", with_bytes(TILE_HEADERS + 4 * 8 + 20, b"\1")

    first = struct.unpack_from("<H", good, ESCAPES)[0]
    yield "escape_twice", with_bytes(ESCAPES + 4, good[ESCAPES + 2 : ESCAPES + 4])
    yield "escapes_fall", with_bytes(ESCAPES + 2, good[ESCAPES + 4 : ESCAPES + 6] + good[ESCAPES + 2 : ESCAPES + 4])
    yield "literal_after_the_others", with_bytes(ESCAPES + 8, struct.pack("<H", first))
    yield "symbol_below_exponent_0", with_bytes(TILE_HEADERS + 6, b"\0")
    yield "sign_flipped", with_bytes(FIXED, bytes([good[FIXED] ^ 0x80]))
    yield "bitmap_flipped", with_bytes(FIXED + 4096, bytes([good[FIXED + 4096] ^ 1]))


@cache
def files() -> dict[str, bytes]:
    """All of them, by name."""
    cases = dict(containers())
    cases.update((name, holding(data)) for name, data in blobs())
    return cases


def flipped(seed: int) -> Callable[[bytes], bytes]:
    """One to four random bits of a file flipped."""

    def flip(data: bytes) -> bytes:
        generator = torch.Generator().manual_seed(seed)
        count = int(torch.randint(1, 5, (1,), generator=generator))
        changed = bytearray(data)
        for position in torch.randint(0, 8 * len(data), (count,), generator=generator).tolist():
            changed[position // 8] ^= 1 << position % 8
        return bytes(changed)

    return flip
