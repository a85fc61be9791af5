# SPDX-License-Identifier: Apache-2.0
"""compress, decompress and ZipTensor."""

from __future__ import annotations

import copy
import io
import pickle
import tracemalloc

import pytest
import torch

import zipserv
from helpers import DTYPES, assert_same_bits, bits, compressed, flipped, weights
from zipserv import ZipTensor, _zipserv
from zipserv.format import HEADER_BYTES, parse_header, storage_shape

SHAPES = [
    (1,),
    (63,),
    (4096,),
    (100_000,),
    (1, 1),
    (1, 300),
    (300, 1),
    (64, 64),
    (65, 127),
    (190, 250),
    (3, 4, 5),
    (2, 3, 80),
    (2, 1, 2, 1, 2, 1, 2, 64),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, z = compressed(*shape, dtype=dtype)
    assert_same_bits(z.decompress(), weight)
    assert_same_bits(zipserv.decompress(z), weight)
    assert z.shape == weight.shape and z.dtype == dtype and z.ndim == weight.dim() and z.numel() == weight.numel()
    assert z.m * z.k == weight.numel()
    assert z.nbytes <= z.original_nbytes + HEADER_BYTES
    z.verify()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for tensor in (every, every.view(256, 256), every[torch.randperm(2**16)].view(128, 512)):
        assert_same_bits(zipserv.compress(tensor).decompress(), tensor)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 1e-40])
def test_constant_tensors(value: float) -> None:
    tensor = torch.full((130, 70), value, dtype=torch.bfloat16)
    z = zipserv.compress(tensor)
    assert_same_bits(z.decompress(), tensor)


def test_size_of_gaussian_weights_and_what_a_tensor_tells() -> None:
    _, z = compressed(512, 1024)
    assert z.bits_per_weight < 11.3
    assert z.bits_per_weight == pytest.approx(8 * z.nbytes / z.numel())
    assert z.ratio == pytest.approx(z.original_nbytes / z.nbytes) and z.ratio > 1.4
    assert z.device == torch.device("cpu") and not z.is_raw and len(z) == 512
    text = repr(z)
    for part in ("(512, 1024)", "bfloat16", "cpu", str(z.nbytes), f"{z.bits_per_weight:.2f}", f"{z.ratio:.3f}"):
        assert part in text


def test_random_bits_are_kept_raw() -> None:
    tensor = torch.randint(-(2**15), 2**15, (256, 256), dtype=torch.int16).view(torch.bfloat16)
    z = zipserv.compress(tensor)
    assert z.is_raw and z.nbytes == z.original_nbytes + HEADER_BYTES and "raw" in repr(z)
    assert_same_bits(z.decompress(), tensor)


def test_header_and_stats_agree_with_the_native_library() -> None:
    weight, z = compressed(190, 250)
    stats = z.stats()
    assert stats["shape"] == z.shape and (stats["m"], stats["k"]) == (z.m, z.k) == (190, 250)
    assert stats["nbytes"] == z.nbytes and stats["checksum"] == z.checksum and stats["tiles"] == 12
    assert z.checksum == _zipserv.checksum(weight.data_ptr(), 190, 250)


def test_decompress_into_out() -> None:
    weight, z = compressed(190, 250)
    out = torch.full_like(weight, 7)
    assert z.decompress(out) is out
    assert_same_bits(out, weight)
    # Rows that lie apart, in a larger tensor; what is between them stays.
    large = torch.full((190, 300), 7, dtype=torch.bfloat16)
    zipserv.decompress(z, out=large[:, 30:280])
    assert_same_bits(large[:, 30:280], weight)
    assert bool((large[:, :30] == 7).all()) and bool((large[:, 280:] == 7).all())


def test_decompress_into_out_of_more_dimensions() -> None:
    weight, z = compressed(3, 5, 70)
    out = torch.empty_like(weight)
    assert_same_bits(z.decompress(out), weight)


def test_decompress_checks_out() -> None:
    weight, z = compressed(64, 96)
    with pytest.raises(ValueError, match=r"shape \(96, 64\).*should be \(64, 96\)"):
        z.decompress(torch.empty(96, 64, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="float16"):
        z.decompress(torch.empty(64, 96, dtype=torch.float16))
    with pytest.raises(TypeError, match="list"):
        z.decompress([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="contiguous"):
        z.decompress(torch.empty(96, 64, dtype=torch.bfloat16).t())
    with pytest.raises(ValueError, match="overlap"):
        z.decompress(torch.empty(1, 96, dtype=torch.bfloat16).expand(64, 96))
    with pytest.raises(ValueError, match="meta"):
        z.decompress(torch.empty(64, 96, dtype=torch.bfloat16, device="meta"))


def test_decompress_rows() -> None:
    weight, z = compressed(200, 250)
    assert not z.is_raw
    for start, stop in [(0, 200), (0, 1), (63, 65), (199, 200), (70, 70), (1, 190)]:
        assert_same_bits(z.decompress_rows(start, stop), weight[start:stop])
    out = torch.empty(10, 250, dtype=torch.bfloat16)
    assert z.decompress_rows(5, 15, out) is out
    assert_same_bits(out, weight[5:15])
    for start, stop in [(-1, 5), (5, 201), (6, 5)]:
        with pytest.raises(ValueError, match="of a matrix of 200 rows"):
            z.decompress_rows(start, stop)


def test_a_tensor_that_is_not_contiguous() -> None:
    weight = weights(250, 190)
    assert_same_bits(zipserv.compress(weight.t()).decompress(), weight.t().contiguous())
    assert_same_bits(zipserv.compress(weight[::2, 3:]).decompress(), weight[::2, 3:].contiguous())
    assert_same_bits(zipserv.compress(weight[0].expand(5, 190)).decompress(), weight[0].expand(5, 190).contiguous())


def test_a_parameter() -> None:
    parameter = torch.nn.Parameter(weights(64, 64))
    z = zipserv.compress(parameter)
    assert not z.blob.requires_grad and not z.decompress().requires_grad


def test_compress_copies_a_contiguous_tensor_not_at_all() -> None:
    # The blob is all that is allocated in Python or torch for a contiguous tensor: bounded by the original's size.
    weight = weights(512, 512)
    tracemalloc.start()
    z = zipserv.compress(weight)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    assert z.blob.untyped_storage().nbytes() == z.nbytes


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (torch.zeros(4, 4), TypeError, r"tensor\.to\(torch\.bfloat16\) first"),
        (torch.zeros(4, 4, dtype=torch.float64), TypeError, r"tensor\.to\(torch\.bfloat16\) first"),
        (torch.zeros(4, 4, dtype=torch.int16), TypeError, "only 16-bit floats"),
        (torch.zeros(4, 4, dtype=torch.uint8), TypeError, "only 16-bit floats"),
        (torch.zeros(4, 4, dtype=torch.float8_e4m3fn), TypeError, "only 16-bit floats"),
        (torch.zeros(4, 4, dtype=torch.complex64), TypeError, "view_as_real"),
        (torch.eye(4).to_sparse(), TypeError, r"to_dense\(\) first"),
        (torch.zeros(0, 4, dtype=torch.bfloat16), ValueError, "no element"),
        (torch.zeros(4, 0, dtype=torch.bfloat16), ValueError, "no element"),
        (torch.tensor(1.0, dtype=torch.bfloat16), ValueError, r"reshape\(1\) first"),
        (torch.zeros([1] * 9, dtype=torch.bfloat16), ValueError, "at most 8"),
        (torch.zeros(4, 4, dtype=torch.bfloat16, device="meta"), ValueError, "meta"),
        ([[1.0]], TypeError, "expected a torch.Tensor, not list"),
        (None, TypeError, "NoneType"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_compress_refuses_with_a_cure(tensor: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        zipserv.compress(tensor)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_compress_refuses_quantized_and_compressed_tensors() -> None:
    with pytest.raises(TypeError, match="dequantize"):
        zipserv.compress(torch.quantize_per_tensor(torch.zeros(4, 4), 0.1, 0, torch.qint8))
    _, z = compressed(4, 4)
    with pytest.raises(TypeError, match="compressed already"):
        zipserv.compress(z)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"zipserv\.compress\(tensor\)"):
        zipserv.decompress(torch.zeros(4, 4))  # type: ignore[arg-type]


def test_pickle_deepcopy_and_torch_save() -> None:
    weight, z = compressed(128, 128)
    assert not z.is_raw
    buffer = io.BytesIO()
    torch.save({"z": z}, buffer)
    buffer.seek(0)
    for other in (pickle.loads(pickle.dumps(z)), copy.deepcopy(z), torch.load(buffer, weights_only=True)["z"]):
        assert_same_bits(other.decompress(), weight)
        assert other.blob.data_ptr() != z.blob.data_ptr()
    assert copy.copy(z).blob.data_ptr() == z.blob.data_ptr()
    first, second = copy.deepcopy([z, ZipTensor(z.blob)])
    assert first.blob is second.blob


def test_to() -> None:
    _, z = compressed(64, 64)
    assert z.to("cpu") is z and z.cpu() is z
    with pytest.raises(TypeError, match=r"decompress\(\)\.to"):
        z.to(torch.float32)  # type: ignore[arg-type]
    moved = z.to("meta")
    assert moved.device.type == "meta" and moved.shape == z.shape and moved.bits_per_weight == z.bits_per_weight
    with pytest.raises(ValueError, match="'meta' is not supported"):
        moved.decompress()


def test_a_blob_is_checked_before_use() -> None:
    _, z = compressed(190, 250)
    assert not z.is_raw
    with pytest.raises(zipserv.Error):
        ZipTensor(flipped(z.blob, 3))
    with pytest.raises(zipserv.Error):
        ZipTensor(flipped(z.blob, 60))
    for blob in (z.blob[:-1], z.blob[:100], z.blob[:0], torch.cat([z.blob, z.blob[:16]])):
        with pytest.raises(zipserv.Error):
            ZipTensor(blob)
    with pytest.raises(zipserv.Error):
        ZipTensor.from_blob(flipped(z.blob, 128 + 3))  # the offset of the first tile's escapes
    damaged = flipped(z.blob, 128 + 128 + 50, 6)  # a sign or mantissa: only the checksum can tell
    assert ZipTensor.from_blob(damaged).shape == z.shape
    with pytest.raises(zipserv.Error):
        ZipTensor.from_blob(damaged, verify="full")
    with pytest.raises(zipserv.Error):
        ZipTensor(damaged).verify()
    with pytest.raises(TypeError, match="uint8"):
        ZipTensor(z.blob.to(torch.int32))
    with pytest.raises(TypeError, match="contiguous"):
        ZipTensor(z.blob.repeat_interleave(2)[::2])
    with pytest.raises(TypeError, match="bytes"):
        ZipTensor(b"ZIPSERV")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="verify"):
        ZipTensor.from_blob(z.blob, verify="yes")


def test_a_blob_at_an_odd_address() -> None:
    weight, z = compressed(190, 250)
    moved = torch.empty(z.nbytes + 1, dtype=torch.uint8)[1:]
    moved.copy_(z.blob)
    assert_same_bits(ZipTensor.from_blob(moved, verify="full").decompress(), weight)
    x = weights(2, 250)
    assert torch.equal(bits(zipserv.linear(x, ZipTensor(moved))), bits(zipserv.linear(x, z)))


def test_a_damaged_pickle_is_refused() -> None:
    _, z = compressed(64, 64)
    damaged = ZipTensor.from_blob(z.blob.clone())
    damaged.blob[130] ^= 255
    with pytest.raises(zipserv.Error):
        pickle.loads(pickle.dumps(damaged))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((7, 9), (7, 9)),
        ((1,), (1, 1)),
        ((63,), (1, 63)),
        ((128,), (2, 64)),
        ((4096,), (64, 64)),
        ((1 << 20,), (256, 4096)),
        ((64 * 3 * 64,), (96, 128)),
        ((8, 16, 128), (128, 128)),
        ((8, 3, 3), (8, 9)),
        ((8, 16, 3, 3), (8, 144)),
        ((1 << 31, 1), None),
    ],
    ids=str,
)
def test_storage_shape(shape: tuple[int, ...], expected: tuple[int, int] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="too large"):
            storage_shape(shape)
    else:
        assert storage_shape(shape) == expected


def test_a_header_alone() -> None:
    _, z = compressed(190, 250)
    header = parse_header(z.blob[:HEADER_BYTES])
    assert header == z.header and header.nbytes == z.nbytes
    with pytest.raises(zipserv.Error, match="100 bytes"):
        parse_header(z.blob[:100])


def test_out_that_autograd_has_kept_is_not_overwritten_unnoticed() -> None:
    z, factor = zipserv.compress(weights(70, 90)), torch.randn(70, 90).bfloat16().requires_grad_()
    for rows in (False, True):
        out = torch.ones(70, 90).bfloat16()
        y = (factor * out).sum()
        z.decompress_rows(0, 70, out=out) if rows else z.decompress(out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()
    with torch.inference_mode():
        kept = torch.empty(70, 90).bfloat16()
        z.decompress(out=kept)
    assert_same_bits(z.decompress(out=kept), z.decompress())
