"""Importance matrices: the mean square of what each weight's input carried over a text, measured inside libllama.

Follows tools/imatrix/imatrix.cpp: which nodes count, how names are cleaned, float32 sums row by row, and the file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import progress
from edgeft.errors import DataError, ToolError
from edgeft.llamacpp import header, runtime
from edgeft.llamacpp.decode import Decoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SHORTEST = 16
"""llama.cpp leaves batches of fewer tokens out."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Sums of squared inputs by tensor, as in the file."""

    sums: Mapping[str, NDArray[np.float32]]
    """[counts, values]: a row for each expert, one row for a dense tensor."""
    counts: Mapping[str, NDArray[np.float32]]
    """[counts]: input rows that went into each."""
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int

    def means(self) -> dict[str, NDArray[np.float32]]:
        """What llama_model_quantize takes: flat float32, 1 for an expert that no token reached."""
        import numpy as np

        result = {}
        for name, sums in self.sums.items():
            counts = self.counts[name].reshape(-1, 1)
            mean = np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)
            result[name] = np.ascontiguousarray(mean, np.float32).ravel()
        return result


def collect(
    model: Path,
    chunks: Sequence[Sequence[int]],
    out: Path,
    *,
    dataset: str = "",
    threads: int = 0,
    process_output: bool = False,
) -> Matrix:
    """Run `model` (F32, F16 or BF16 GGUF) over windows of token ids and write the importance matrix to `out`.

    `dataset` is noted in the file. `process_output` includes output.weight, which llama.cpp leaves out. Raises
    DataError when a window has fewer than 16 tokens, ToolError when the activations are not finite.
    """
    if not chunks or min(map(len, chunks)) < _SHORTEST:
        raise DataError(f"an importance matrix needs windows of at least {_SHORTEST} tokens")
    longest = max(map(len, chunks))
    collector = Collector(process_output=process_output)
    with Decoder(model, n_ctx=longest, threads=threads, cb_eval=collector.watch) as decoder:
        for number, chunk in enumerate(chunks):
            progress.report("importance matrix", number, len(chunks), unit="windows")
            decoder.logits(chunk)
            if collector.error:
                raise collector.error
    if not collector.sums:
        raise ToolError(f"llama.cpp evaluated {model} without a matrix product of a weight in it")
    most = max(int(counts.max()) for counts in collector.counts.values())
    matrix = Matrix(
        sums={name: s.reshape(len(collector.counts[name]), -1) for name, s in sorted(collector.sums.items())},
        counts=dict(sorted(collector.counts.items())),
        datasets=(dataset,) if dataset else (),
        chunks=most // longest,
        chunk_size=longest,
    )
    save(matrix, out)
    return matrix


def save(matrix: Matrix, path: Path) -> None:
    """Write the GGUF form that llama-imatrix writes and llama-quantize reads."""
    tensors: dict[str, tuple[tuple[int, ...], bytes]] = {}
    for name, sums in matrix.sums.items():
        n_counts, values = sums.shape
        tail = (n_counts,) if n_counts > 1 else ()
        tensors[f"{name}.in_sum2"] = ((values, *tail), sums.astype("<f4").tobytes())
        tensors[f"{name}.counts"] = ((1, *tail), matrix.counts[name].astype("<f4").tobytes())
    keys: dict[str, header.Value] = {
        "general.type": "imatrix",
        "imatrix.datasets": list(matrix.datasets),
        "imatrix.chunk_count": matrix.chunks,
        "imatrix.chunk_size": matrix.chunk_size,
    }
    header.write(path, keys, tensors)


def load(path: Path) -> Matrix:
    """Read an importance matrix in GGUF form. Raises DataError when the file is something else."""
    import numpy as np

    head = header.read(path)
    if head.keys.get("general.type") != "imatrix":
        raise DataError(f"{path} is no importance matrix: general.type is {head.keys.get('general.type')!r}")
    arrays: dict[str, Any] = {}
    data = np.memmap(path, np.uint8, "r")
    for tensor in head.tensors:
        start = head.data_offset + tensor.offset
        rows = tensor.shape[1] if len(tensor.shape) > 1 else 1
        flat = np.frombuffer(data[start : start + tensor.bytes].tobytes(), "<f4")
        arrays[tensor.name] = flat.reshape(rows, tensor.shape[0])
    names = [name.removesuffix(".in_sum2") for name in arrays if name.endswith(".in_sum2")]
    if missing := [name for name in names if f"{name}.counts" not in arrays]:
        raise DataError(f"{path} has sums without counts for {missing[0]}")
    datasets, chunks, size = (
        head.keys.get(f"imatrix.{key}") for key in ("datasets", "chunk_count", "chunk_size")
    )
    return Matrix(
        sums={name: arrays[f"{name}.in_sum2"] for name in names},
        counts={name: arrays[f"{name}.counts"].ravel() for name in names},
        datasets=tuple(str(entry) for entry in datasets) if isinstance(datasets, list) else (),
        chunks=chunks if isinstance(chunks, int) else 0,
        chunk_size=size if isinstance(size, int) else 0,
    )


class _Tensor(ctypes.Structure):
    """struct ggml_tensor of the pinned ggml.h."""


_Tensor._fields_ = [
    ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64), ("extra", ctypes.c_void_p), ("padding", ctypes.c_char * 8),
]  # fmt: skip


@dataclass(kw_only=True)
class Collector:
    """ggml's evaluation callback: asked before each node, called again after the nodes it wants."""

    process_output: bool
    sums: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    counts: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    error: Exception | None = None
    checked: bool = False

    def __post_init__(self) -> None:
        self.ggml = runtime.ggml()
        self.ggml.ggml_op_name.restype = ctypes.c_char_p
        self.ggml.ggml_nbytes.argtypes, self.ggml.ggml_nbytes.restype = [ctypes.c_void_p], ctypes.c_size_t
        self.ggml.ggml_get_name.argtypes, self.ggml.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
        self.ggml.ggml_get_data.argtypes, self.ggml.ggml_get_data.restype = [ctypes.c_void_p], ctypes.c_void_p
        self.ggml.ggml_backend_tensor_get.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_size_t] * 2]
        self.ggml.ggml_backend_tensor_get.restype = None
        names = {self.ggml.ggml_op_name(number): number for number in range(64)}
        self.dense, self.expert = names[b"MUL_MAT"], names[b"MUL_MAT_ID"]

    def watch(self, address: int, ask: bool) -> bool:
        try:
            node = _Tensor.from_address(address)
            if not self.checked:
                self._check_layout(address, node)
            if ask:
                return self._wanted(node)
            self._add(node)
            return True
        except Exception as error:  # noqa: BLE001  (none can cross C: it is kept, and the evaluation stops)
            self.error = self.error or error
            return False

    def _check_layout(self, address: int, node: _Tensor) -> None:
        ours = (node.name, node.data)
        theirs = (self.ggml.ggml_get_name(address), self.ggml.ggml_get_data(address))
        if ours != theirs:
            raise ToolError(
                f"struct ggml_tensor of the pinned llama.cpp is laid out differently: {ours}, {theirs}"
            )
        self.checked = True

    def _wanted(self, node: _Tensor) -> bool:
        if node.op == self.expert:
            return True
        if node.op != self.dense:
            return False
        inputs, name = node.src[1].contents, _clean(node.src[0].contents.name)
        of_interest = name.startswith("blk.") or (self.process_output and name == "output.weight")
        return of_interest and inputs.type == 0 and inputs.ne[1] >= _SHORTEST

    def _add(self, node: _Tensor) -> None:
        import numpy as np

        weight, name = node.src[0].contents, _clean(node.src[0].contents.name)
        inputs = self._copy(node.src[1], np.dtype("<f4"))  # [i3, i2, rows, row length]
        if node.op == self.expert:
            n_experts = weight.ne[2]
            ids = self._copy(node.src[2], np.dtype("<i4"))[0, 0]  # [tokens, experts used]
            slots = np.arange(ids.shape[1]) % inputs.shape[2]
            counts = self._counts(name, n_experts)
            for expert in range(n_experts):
                # Slot by slot, and the tokens of each in order: so the C++ sums run.
                used = [inputs[0, :, slots[k]][ids[:, k] == expert] for k in range(ids.shape[1])]
                rows = np.concatenate(used)
                self._sum(name, expert, n_experts, rows)
                counts[expert] += len(rows)
            return
        n_matrices = weight.ne[2] * weight.ne[3]
        for i3 in range(inputs.shape[0]):
            for i2 in range(inputs.shape[1]):
                matrix = (i3 % weight.ne[3]) * weight.ne[2] + i2 % weight.ne[2]
                self._sum(name, matrix, n_matrices, inputs[i3, i2])
        # One count for a dense tensor, however many matrices are stacked in it.
        self._counts(name, 1)[0] += inputs.size // inputs.shape[-1] // n_matrices

    def _counts(self, name: str, size: int) -> NDArray[np.float32]:
        import numpy as np

        counts = self.counts.setdefault(name, np.zeros(size, np.float32))
        if len(counts) != size:
            raise ToolError(f"{name} is used both as a dense weight and as a stack of experts")
        return counts

    def _sum(self, name: str, matrix: int, n_matrices: int, rows: NDArray[np.float32]) -> None:
        import numpy as np

        width = rows.shape[-1]
        sums = self.sums.setdefault(name, np.zeros(n_matrices * width, np.float32))
        if not len(rows):
            return
        here = sums[matrix * width : (matrix + 1) * width]
        squares = rows * rows
        squares[0] += here  # so that the reduction adds row after row, in float32, to what is there
        np.add.reduce(squares, axis=0, out=here)
        if not np.isfinite(here).all():
            raise ToolError(f"the inputs of {name} are not finite, so there is no importance matrix")

    def _copy(self, pointer: Any, dtype: Any) -> Any:
        """A tensor's values [ne3, ne2, ne1, ne0], from wherever its memory is."""
        import numpy as np

        tensor = pointer.contents
        size = self.ggml.ggml_nbytes(ctypes.addressof(tensor))
        raw = np.empty(size, np.uint8)
        self.ggml.ggml_backend_tensor_get(ctypes.addressof(tensor), raw.ctypes.data, 0, size)
        return np.lib.stride_tricks.as_strided(
            raw.view(dtype), shape=tuple(tensor.ne)[::-1], strides=tuple(tensor.nb)[::-1]
        )


def _clean(name: bytes) -> str:
    """CUDA0#blk.0.attn_k.weight#0 is blk.0.attn_k.weight."""
    parts = name.decode().split("#")
    return parts[1] if len(parts) > 1 else parts[0]
