"""A delta gives the new file or an error, whatever the two files look like and whatever happens to it on its way."""

from __future__ import annotations

import hashlib
import io
import lzma
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from edgeft.agent import delta as device
from edgeft.errors import DataError
from edgeft.llamacpp import header, quantize
from edgeft.updates import delta
from tests.updates.conftest import TYPES, write_gguf


def blocks(kind: str, n: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, n * TYPES[kind][2], np.uint8).tobytes()


def nudged(data: bytes, share: float = 0.1, seed: int = 1) -> bytes:
    """The same with some bytes one higher or lower, as after another training."""
    random = np.random.default_rng(seed)
    change = random.integers(0, 2, len(data), np.uint8) * 2 - 1
    return (
        np.frombuffer(data, np.uint8) + change * (random.random(len(data)) < share).astype(np.uint8)
    ).tobytes()


def round_trip(old: Path, new: Path, folder: Path) -> delta.Size:
    size = delta.make(old, new, folder / "d")
    device.apply(old, folder / "d", folder / "out")
    assert (folder / "out").read_bytes() == new.read_bytes()
    return size


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two files that differ a little, and their delta."""
    folder = tmp_path_factory.mktemp("pair")
    weights = blocks("Q4_K", 400)
    old = write_gguf(
        folder / "old", {"a": "b"}, {"w": ("Q4_K", 256, weights), "n": ("F32", 8, blocks("F32", 64))}
    )
    new = write_gguf(
        folder / "new", {"a": "c"}, {"w": ("Q4_K", 256, nudged(weights)), "n": ("F32", 8, blocks("F32", 64))}
    )
    delta.make(old, new, folder / "d")
    return old, new, folder / "d"


def test_every_type_of_tensor_goes_through(tmp_path):
    tensors = {kind: (kind, TYPES[kind][1], blocks(kind, 12)) for kind in sorted(TYPES)}
    old = write_gguf(tmp_path / "old", {}, tensors)
    after = {name: (kind, row, nudged(data)) for name, (kind, row, data) in tensors.items()}
    size = round_trip(old, write_gguf(tmp_path / "new", {}, after), tmp_path)
    assert size.aligned > 0.9 * size.whole
    assert all(sum(fields) == TYPES[kind][2] for kind, fields in delta.FIELDS.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(TYPES))
def test_small_changes_make_a_small_delta_in_every_type(kind, tmp_path):
    n = 16000 // TYPES[kind][2]
    old = write_gguf(tmp_path / "old", {}, {"w": (kind, TYPES[kind][1], blocks(kind, n))})
    new = write_gguf(tmp_path / "new", {}, {"w": (kind, TYPES[kind][1], nudged(blocks(kind, n)))})
    # A tenth of the bytes changed by one: 0.47 bits a byte say where, and a tenth of a bit which way.
    assert 0.07 < round_trip(old, new, tmp_path).share < 0.2


def test_tensors_are_found_by_name_whatever_the_layout(tmp_path):
    a, b, c = (blocks("Q5_K", 200, seed) for seed in range(3))
    old = write_gguf(
        tmp_path / "old", {"x": "1"}, {"a": ("Q5_K", 256, a), "b": ("Q5_K", 256, b), "gone": ("Q5_K", 256, c)}
    )
    new = write_gguf(
        tmp_path / "new", {"longer": "y" * 999, "x": "1"},
        {"added": ("F32", 4, blocks("F32", 64, 9)), "b": ("Q5_K", 256, nudged(b, 0.01)), "a": ("Q5_K", 256, a)},
    )  # fmt: skip
    size = round_trip(old, new, tmp_path)
    assert size.bytes < len(b) * 0.15 + 3000 and size.same >= len(a)


def test_a_tensor_of_another_type_or_width_goes_along_whole(tmp_path):
    data = blocks("Q8_0", 256)
    old = write_gguf(tmp_path / "old", {}, {"w": ("Q8_0", 32, data), "v": ("Q8_0", 64, data)})
    new = write_gguf(tmp_path / "new", {}, {"w": ("Q4_0", 32, blocks("Q4_0", 256)), "v": ("Q8_0", 32, data)})
    assert round_trip(old, new, tmp_path).aligned < 300


def test_rows_added_to_a_vocabulary_leave_the_others_aligned(tmp_path):
    data = blocks("Q8_0", 4000)
    old = write_gguf(tmp_path / "old", {}, {"token_embd.weight": ("Q8_0", 32, data)})
    new = write_gguf(tmp_path / "new", {}, {"token_embd.weight": ("Q8_0", 32, data + blocks("Q8_0", 8, 5))})
    assert round_trip(old, new, tmp_path).bytes < 1000
    assert round_trip(new, old, tmp_path).bytes < 1000


@pytest.mark.slow
def test_the_same_file_is_a_few_bytes_and_a_larger_one_takes_several_frames(tmp_path):
    old = write_gguf(tmp_path / "old", {}, {"w": ("Q6_K", 256, blocks("Q6_K", 20000))})
    assert round_trip(old, old, tmp_path).bytes < 300
    new = write_gguf(tmp_path / "new", {}, {"w": ("Q6_K", 256, nudged(blocks("Q6_K", 20000), 0.5))})
    assert new.stat().st_size > 4 << 20
    assert 0.1 < round_trip(old, new, tmp_path).share < 0.4


def test_the_same_files_give_the_same_delta(pair, tmp_path):
    old, new, made = pair
    delta.make(old, new, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == made.read_bytes()


@pytest.mark.parametrize(
    ("a", "b"), [(b"", b"x"), (b"x", b""), (b"GG", b"GG" * 70000), (b"a" * 99, b"a" * 98 + b"b")]
)
def test_files_that_are_no_gguf_go_through_too(a, b, tmp_path):
    (tmp_path / "old").write_bytes(a)
    (tmp_path / "new").write_bytes(b)
    if a and b:
        round_trip(tmp_path / "old", tmp_path / "new", tmp_path)
    else:
        with pytest.raises(DataError, match="is empty"):
            delta.make(tmp_path / "old", tmp_path / "new", tmp_path / "d")


def test_a_gguf_file_that_is_cut_off_is_refused_by_the_maker(pair, tmp_path):
    old, new, _ = pair
    (tmp_path / "cut").write_bytes(new.read_bytes()[:-5000])
    with pytest.raises(DataError, match="not a complete GGUF"):
        delta.make(old, tmp_path / "cut", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_delta_cut_off_anywhere_gives_an_error_and_no_file(pair, tmp_path):
    old, _, made = pair
    whole = made.read_bytes()
    random = np.random.default_rng(0)
    for end in [0, 1, 7, 8, 87, 88, 89, len(whole) - 1, *random.integers(88, len(whole), 60).tolist()]:
        with pytest.raises(device.DeltaError):
            device.apply(old, io.BytesIO(whole[:end]), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(device.DeltaError, match="something follows"):
        device.apply(old, io.BytesIO(whole + b"\0"), tmp_path / "out")


def test_a_flipped_bit_gives_an_error_or_the_promised_file_never_another(pair, tmp_path):
    old, new, made = pair
    whole, random = made.read_bytes(), np.random.default_rng(1)
    refused = 0
    for at in [*range(0, 130, 3), *random.integers(130, len(whole), 60).tolist()]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(random.integers(8))
        try:
            device.apply(old, io.BytesIO(bytes(damaged)), tmp_path / "out")
        except device.DeltaError:
            assert not (tmp_path / "out").exists()
            refused += 1
        else:  # a bit that is not used, such as the ones deflate pads its last byte with
            assert (tmp_path / "out").read_bytes() == new.read_bytes()
    assert refused > 95


def test_another_base_is_refused_before_anything_is_written(pair, tmp_path):
    old, new, made = pair
    other = tmp_path / "other"
    other.write_bytes(nudged(old.read_bytes(), 0.001))
    for base, said in ((other, "for the base with sha256"), (new, "bytes|sha256"), (made, "bytes")):
        with pytest.raises(device.DeltaError, match=said):
            device.apply(base, made, tmp_path / "missing folder" / "out")


def frames(promise: tuple[bytes, bytes], *parts: bytes) -> io.BytesIO:
    base, result = promise
    head = device.HEAD.pack(
        device.MAGIC, len(base), hashlib.sha256(base).digest(), len(result), hashlib.sha256(result).digest()
    )
    return io.BytesIO(head + b"".join(parts))


END = device.OP.pack(device.END)


def new_frame(records: int, *planes: tuple[int, int, bytes], op: int = device.NEW, offset: int = 0) -> bytes:
    head = device.OP.pack(op) + device.RECORDS.pack(offset, records, len(planes))
    return (
        head
        + b"".join(device.PLANE.pack(w, m, len(p)) for w, m, p in planes)
        + b"".join(p for _, _, p in planes)
    )


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (device.OP.pack(device.COPY) + device.RANGE.pack(0, 1 << 62), "reads up to byte"),
        (device.OP.pack(device.COPY) + device.RANGE.pack(90, 11), "reads up to byte 101 of a base of 100"),
        (new_frame(10, (1, device.STORED, bytes(10)), op=device.ADD, offset=(1 << 64) - 1), "reads up to byte"),
        (new_frame(1 << 30, (60000, device.ZEROS, b"")), "a frame of"),
        (new_frame(5, (0, device.ZEROS, b"")), "a frame of 5 records of 0 bytes"),
        (new_frame(0, (1, device.ZEROS, b"")), "a frame of 0 records"),
        (new_frame(10, (1, device.STORED, bytes(9))), "packed in the unknown way|another length"),
        (new_frame(10, (1, 9, bytes(9))), "unknown way 9"),
        (new_frame(10, (1, device.DEFLATE, b"not deflate")), "damaged"),
        (new_frame(10, (1, device.LZMA2, b"not lzma at all")), "damaged"),
        (new_frame(10, (1, device.LZMA2, b"")), "damaged"),
        (b"\x07", "unknown kind 7"),
        (new_frame(101, (1, device.ZEROS, b"")), "more than the 100 bytes"),
        (END, "100 bytes less"),
        (new_frame(100, (1, device.ZEROS, b"")) + END, "it is damaged"),
        (device.OP.pack(device.COPY) + device.RANGE.pack(0, 100), "cut off"),
    ],
)  # fmt: skip
def test_a_delta_made_to_hurt_is_refused(part, said, tmp_path):
    base = bytes(range(100))
    (tmp_path / "base").write_bytes(base)
    with pytest.raises(device.DeltaError, match=said):
        device.apply(tmp_path / "base", frames((base, base[::-1]), part), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_packed_plane_that_swells_takes_no_memory(tmp_path):
    base = bytes(100)
    (tmp_path / "base").write_bytes(base)
    squeezed = zlib.compressobj(9, zlib.DEFLATED, -15)
    deflated = squeezed.compress(bytes(60 << 20)) + squeezed.flush()
    lzmaed = lzma.compress(bytes(30 << 20), lzma.FORMAT_RAW, filters=[{**device.FILTERS[0], "preset": 0}])
    tracemalloc.start()
    for method, packed in ((device.DEFLATE, deflated), (device.LZMA2, lzmaed)):
        with pytest.raises(device.DeltaError, match="another length"):
            device.apply(
                tmp_path / "base", frames((base, base), new_frame(100, (1, method, packed))), tmp_path / "out"
            )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_stream_that_gives_little_at_a_time_is_enough(pair, tmp_path):
    old, new, made = pair

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 0, 1000))

    device.apply(old, Slow(made.read_bytes()), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == new.read_bytes()


@pytest.mark.slow
def test_the_device_needs_nothing_but_the_standard_library_and_little_memory(tmp_path):
    """64 MiB in frames as large as they may be."""
    base, result = bytes(64 << 20), b"\1" * (64 << 20)
    (tmp_path / "old").write_bytes(base)
    packed = zlib.compressobj(1, zlib.DEFLATED, -15)
    plane = packed.compress(result[: device.FRAME_BYTES]) + packed.flush()
    part = [
        new_frame(device.FRAME_BYTES, (1, device.DEFLATE, plane), op=device.ADD, offset=offset)
        for offset in range(0, len(base), device.FRAME_BYTES)
    ]
    (tmp_path / "d").write_bytes(frames((base, result), *part, END).read())
    code = (
        "import sys, resource, runpy, pathlib\n"
        f"d = runpy.run_path({str(Path(device.__file__))!r})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"d['apply'](*map(pathlib.Path, {[str(tmp_path / n) for n in ('old', 'd', 'out')]!r}))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, sorted(m for m in sys.modules if 'numpy' in m))"
    )
    said = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert (tmp_path / "out").read_bytes() == result
    assert said[1] == "[]" and int(said[0]) < 24 << 10, said  # KiB


@pytest.mark.slow
@pytest.mark.parametrize(
    "label", ["Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q3_K_S", "IQ4_XS", "Q2_K", "BF16"]
)
def test_models_that_llama_cpp_quantized_go_through(label, library, tmp_path):
    """The same random weights before and after a change of low rank, as training makes it."""
    import torch

    random = torch.Generator().manual_seed(0)
    files = []
    shapes = {
        "blk.0.ffn_gate.weight": (512, 1024),
        "blk.0.ffn_down.weight": (1024, 512),
        "token_embd.weight": (512, 4096),
    }
    weights = {name: 0.02 * torch.randn(shape[::-1], generator=random) for name, shape in shapes.items()}
    for trained in (False, True):
        if trained:
            for weight in weights.values():
                a = torch.randn(weight.shape[0], 4, generator=random)
                weight += 1e-4 * a @ torch.randn(4, weight.shape[1], generator=random)
        source = tmp_path / f"{trained}.gguf"
        keys = {
            "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 128, "general.file_type": 0,
            "llama.embedding_length": 512, "llama.feed_forward_length": 1024, "llama.attention.head_count": 4,
            "llama.attention.layer_norm_rms_epsilon": 1e-5, "general.name": f"trained {trained}",
        }  # fmt: skip
        header.write(
            source, keys, {n: (shapes[n], w.numpy().astype("<f4").tobytes()) for n, w in weights.items()}
        )
        files.append(tmp_path / f"{trained}-{label}.gguf")
        quantize.quantize(source, files[-1], label)
    size = round_trip(*files, tmp_path)
    assert size.share < 0.6 and size.aligned > 0.99 * size.whole
