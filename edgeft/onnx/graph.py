"""An ONNX graph with its weights in one file beside it, one tensor in memory at a time.

Models over 2 GB have no other form, and the builder writes every model so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from edgeft.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MODEL, DATA = "model.onnx", "model.onnx.data"
_PAGE, _LARGE, _LINE = 4096, 1 << 20, 64
"""Large tensors start on a page, so that a runtime can map them; small ones on a cache line."""


class Weights:
    """The initializers of a graph that was loaded without them, read from its folder by name."""

    def __init__(self, folder: Path, graph: Any) -> None:
        self.folder = folder
        self.by_name = {t.name: t for t in graph.initializer}

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    def shape(self, name: str) -> tuple[int, ...]:
        """Its dimensions."""
        return tuple(self.by_name[name].dims)

    def stored_bytes(self, name: str) -> int:
        """What it takes in the file, or in the graph itself."""
        tensor = self.by_name[name]
        if _is_external(tensor):
            return _place(tensor)[2]
        return len(tensor.raw_data) or int(tensor.ByteSize())

    def read(self, name: str) -> NDArray[Any]:
        """The numbers. A view of the mapped file where they are in one. Raises DataError for a place outside it."""
        import numpy as np
        import onnx

        tensor = self.by_name[name]
        if not _is_external(tensor):
            return np.asarray(onnx.numpy_helper.to_array(tensor))
        location, offset, length = _place(tensor)
        kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        path = self.folder / location
        inside = path.parent == self.folder and path.is_file() and offset + length <= path.stat().st_size
        if not inside or length != kind.itemsize * math.prod(tensor.dims):
            raise DataError(
                f"{name}: {length} bytes at {offset} of {location} are not its {math.prod(tensor.dims)} numbers"
            )
        if not length:
            return np.zeros(tuple(tensor.dims), kind)
        return np.memmap(path, kind, "r", offset, tuple(tensor.dims))


def load(folder: Path) -> Any:
    """The ModelProto of `folder`/model.onnx without the weights beside it. Raises DataError for a file that is none."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(str(folder / MODEL), load_external_data=False)
    except (OSError, DecodeError) as e:
        raise DataError(f"{folder.name}/{MODEL} is no ONNX graph: {e}") from e


class Writer:
    """Writes the file of weights, tensor after tensor, and gives the TensorProto that points at each."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / DATA).open("wb")

    def add(self, name: str, numbers: NDArray[Any]) -> Any:
        """Append a tensor of any type that NumPy has."""
        import numpy as np
        import onnx

        at = self._file.tell()
        grain = _PAGE if numbers.nbytes >= _LARGE else _LINE
        start = -(-at // grain) * grain
        self._file.write(b"\0" * (start - at))
        np.ascontiguousarray(numbers).tofile(self._file)
        tensor = onnx.TensorProto(
            name=name,
            dims=numbers.shape,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(numbers.dtype),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (("location", DATA), ("offset", start), ("length", numbers.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._file.close()


def save(model: Any, folder: Path) -> None:
    """Write `folder`/model.onnx, the same bytes for the same graph."""
    (folder / MODEL).write_bytes(model.SerializeToString(deterministic=True))


def attribute(node: Any, name: str, otherwise: Any = None) -> Any:
    """An attribute's value, or `otherwise` where the node does not give it."""
    import onnx

    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), otherwise)


def files(model: Any) -> set[str]:
    """The names of the files that the initializers point at."""
    return {_place(t)[0] for t in model.graph.initializer if _is_external(t)}


def used(nodes: Iterable[Any]) -> set[str]:
    """Every name that a node reads."""
    return {name for node in nodes for name in node.input if name}


def _is_external(tensor: Any) -> bool:
    import onnx

    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _place(tensor: Any) -> tuple[str, int, int]:
    said = {entry.key: entry.value for entry in tensor.external_data}
    return said["location"], int(said.get("offset", 0)), int(said.get("length", 0))
