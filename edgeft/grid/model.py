"""A transformers model whose every number is that of a GGUF file, and the file with some of its rows replaced.

The linear layers of the decoder blocks stay in the file's blocks (`linear.GridLinear`), rows in the checkpoint's order. Embeddings,
output layer, norms and biases become plain numbers. What the file holds and no parameter does (rotary factors) is
left to transformers, which computes it from the config.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeft import progress
from edgeft.errors import StageError
from edgeft.grid import formats
from edgeft.grid import placement as places
from edgeft.grid.activations import install
from edgeft.grid.linear import widen
from edgeft.llamacpp.header import Header, Tensor, read

if TYPE_CHECKING:
    import torch

    from edgeft.grid.placement import Placed, Placement

log = logging.getLogger(__name__)


def load(
    checkpoint: Path,
    file: Path,
    plain: Path,
    *,
    device: str = "cpu",
    compute_dtype: Literal["float32", "bfloat16"] = "float32",
    placement: Placement | None = None,
    hold: bool = True,
    activations: bool = False,
) -> Any:
    """The causal language model in `checkpoint`, frozen, in eval mode, with the weights of the GGUF `file`.

    `plain` is the 16- or 32-bit GGUF file that the converter made of the checkpoint, and `file` what the quantizer made
    of it or of another of the same model; `placement` is what `placement.placement` says of the first two, where it is
    known already. With `float32` every number is exactly the file's. With `bfloat16` each is rounded to it once, and
    the model's `forward` runs under autocast, as `training.model.load_base` has it. On a CPU the dense weights are held
    beside the blocks where memory allows, unless `hold` is false: same numbers, less time. With `activations` the model
    rounds them in each product as llama.cpp does with this file (`activations.install`, again once an adapter is on it).

    Raises StageError when a parameter cannot be led back to the file, or the file is of another model; DataError when a
    file cannot be read.
    """
    import torch
    from transformers.utils import logging as chatter

    chatter.disable_progress_bar()
    dtype = torch.float32 if compute_dtype == "float32" else torch.bfloat16
    known = placement or places.placement(checkpoint, plain)
    source = _File(file, like=plain)
    model = _empty(checkpoint, dtype)
    head = model.get_output_embeddings()
    modules = [
        (name, m) for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None
    ]
    for i, (name, module) in enumerate(modules):
        progress.report("load the model", i, len(modules), unit="layers")
        if _is_linear(module) and module is not head:
            _replace(model, name, _linear(module, name, known, source, device=device, dtype=dtype))
            continue
        for own, empty in list(module.named_parameters(recurse=False)):
            found = _find(f"{name}.{own}" if name else own, known) or (
                _head(known) if module is head else None
            )
            if found is not None:
                numbers = source.numbers(found, dtype).reshape(empty.shape).to(device)
                module.register_parameter(own, torch.nn.Parameter(numbers, requires_grad=False))
    model.tie_weights()
    if head is not None:  # dense here, but not in the file
        head.kind = source.head.type
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            known.of(name)  # raises with the reason, or it had the wrong shape
            raise StageError(f"{name} of the checkpoint was not filled from {file.name}")
    model.to(device)
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    if hold and device == "cpu":
        _hold(model, dtype)
    if activations:
        install(model)
    if dtype is torch.bfloat16:
        model.forward = torch.autocast(device.split(":")[0], dtype=dtype)(model.forward)
    return model


def matrices(
    file: Path, names: Iterable[str], placement: Placement, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """The weights of these linear layers as `file` holds them, [out, in] each, rows in the checkpoint's order.

    `names` are the layers' own in the model. Raises StageError for a layer that the file has no matrix for.
    """
    source = _File(file)
    for name in names:
        placed = _where(f"{name}.weight", placement)
        yield widen(source.packed(placed), source.tensor(placed).type, dtype)


def write_rows(file: Path, out: Path, tensors: Mapping[str, torch.Tensor], placement: Placement) -> None:
    """Write `out`, the GGUF `file` with other data for some tensors; every other byte, the header among them, is the same.

    `tensors`, by the parameter's name in the checkpoint or model: a matrix as uint8 [out, row bytes], blocks of the
    type that the file has, rows in the checkpoint's order; a vector as float32 [n], in the checkpoint's terms. `out`
    appears by rename and may be `file` itself. Raises StageError when a tensor has another size or type than the file's.
    """
    source = _File(file)
    data = {name: source.encoded(_where(name, placement), tensor) for name, tensor in tensors.items()}
    aside = out.with_name(out.name + ".part")
    try:
        shutil.copyfile(file, aside)
        with aside.open("r+b") as stream:
            for name, raw in data.items():
                stream.seek(source.header.data_offset + source.tensor(_where(name, placement)).offset)
                stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)


class _File:
    """A GGUF file's tensors in the checkpoint's order, and back."""

    def __init__(self, path: Path, *, like: Path | None = None) -> None:
        self.path, self.header = path, read(path)
        self._tensors = {t.name: t for t in self.header.tensors}
        if like is not None:
            _same_model(path, self.header, like, read(like))

    def tensor(self, placed: Placed) -> Tensor:
        if placed.tensor not in self._tensors:
            raise StageError(f"{self.path.name} has no tensor {placed.tensor}")
        return self._tensors[placed.tensor]

    @property
    def head(self) -> Tensor:
        """What the output layer multiplies with: the embeddings, in a file that has no tensor of its own for it."""
        return self._tensors.get("output.weight") or self._tensors["token_embd.weight"]

    def packed(self, placed: Placed) -> torch.Tensor:
        """uint8 [rows, row bytes], in the checkpoint's order."""
        import numpy as np
        import torch

        rows = places.raw(self.path, self.header, self.tensor(placed))
        return torch.from_numpy(np.array(rows) if placed.rows is None else rows[placed.rows])

    def numbers(self, placed: Placed, dtype: torch.dtype) -> torch.Tensor:
        """The parameter itself, in the checkpoint's shape and terms."""
        import torch

        tensor = self.tensor(placed)
        if len(tensor.shape) > 1:
            wide = widen(self.packed(placed), tensor.type, dtype)
            return wide.T.contiguous() if placed.transposed else wide
        vector = widen(
            torch.from_numpy(places.raw(self.path, self.header, tensor).copy()), tensor.type, torch.float32
        )
        vector = vector[0] if placed.rows is None else vector[0][torch.from_numpy(placed.rows)]
        if placed.added:
            less = vector - placed.added
            if not torch.equal(less + placed.added, vector):
                raise StageError(
                    f"{tensor.name} of {self.path.name} holds numbers that no {placed.added:g} + w gives"
                )
            vector = less
        return vector.to(dtype)

    def encoded(self, placed: Placed, ours: torch.Tensor) -> bytes:
        """The bytes of a tensor that replaces one of the file's."""
        import torch

        tensor = self.tensor(placed)
        ours = ours.detach().cpu()
        if vector := len(tensor.shape) == 1:
            wanted, fits, shape = torch.float32, tensor.type == "F32", [tensor.weights]
        else:
            height = tensor.weights // tensor.shape[0]
            wanted, fits, shape = torch.uint8, True, [height, tensor.bytes // height]
        if ours.dtype is not wanted or list(ours.shape) != shape or not fits:
            raise StageError(
                f"{tensor.name} is {tensor.type} and takes {wanted} {shape}, not {ours.dtype} {list(ours.shape)}"
            )
        if vector and placed.added:
            ours = ours + placed.added
        theirs = ours.clone()
        if placed.rows is not None:
            theirs[torch.from_numpy(placed.rows)] = ours
        return theirs.numpy().tobytes()


def _same_model(path: Path, header: Header, like: Path, other: Header) -> None:
    ours, theirs = ({t.name: t.shape for t in h.tensors} for h in (header, other))
    if differing := [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]:
        name = differing[0]
        raise StageError(
            f"{path.name} is not of the model in {like.name}: {name} is {ours.get(name, 'absent')} in the one and "
            f"{theirs.get(name, 'absent')} in the other"
        )  # fmt: skip
    for tensor in header.tensors:
        formats.of(tensor.type)  # raises for a type without a format, before anything is loaded


def _empty(checkpoint: Path, dtype: torch.dtype) -> Any:
    """The model without its parameters, but with its buffers: rotary frequencies are in no file."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, OSError) as error:
        raise StageError(f"{checkpoint} cannot be read as a causal language model: {error}") from error
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint, local_files_only=True)
    return model


def _is_linear(module: Any) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _linear(
    module: Any, name: str, placement: Placement, source: _File, *, device: str, dtype: torch.dtype
) -> Any:
    from torch import nn

    from edgeft.grid.linear import GridLinear

    placed = _where(f"{name}.weight", placement)
    if placed.transposed is isinstance(module, nn.Linear):
        raise StageError(
            f"{name}.weight and {placed.tensor} are each other's transposes, which the layer's kind is not"
        )
    bias = None
    if module.bias is not None:
        bias = source.numbers(_where(f"{name}.bias", placement), dtype).to(device)
    packed = source.packed(placed).to(device)
    return GridLinear(packed, source.tensor(placed).type, bias, compute_dtype=dtype)


def _where(name: str, placement: Placement) -> Placed:
    return _find(name, placement) or placement.of(name)


def _find(name: str, placement: Placement) -> Placed | None:
    """By the model's own name; a checkpoint of the model without its head has one part less, or one more."""
    if name in placement.placed:
        return placement.placed[name]
    if (shorter := name.partition(".")[2]) in placement.placed:
        return placement.placed[shorter]
    longer = [n for n in placement.placed if n.partition(".")[2] == name]
    return placement.placed[longer[0]] if len(longer) == 1 else None


def _head(placement: Placement) -> Placed | None:
    """The output layer is called otherwise in some checkpoints than in the model (GPT-NeoX: `embed_out`)."""
    return next((p for p in placement.placed.values() if p.tensor == "output.weight"), None)


def _replace(model: Any, name: str, layer: Any) -> None:
    above, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(above), leaf, layer)


def _hold(model: Any, dtype: torch.dtype) -> None:
    """Keep the dense weights where the machine has twice the memory that they take."""
    import psutil

    from edgeft.grid.linear import GridLinear

    layers = [m for m in model.modules() if isinstance(m, GridLinear)]
    needed = sum(m.in_features * m.out_features for m in layers) * dtype.itemsize
    fits = bool(2 * needed < psutil.virtual_memory().available)
    log.info(
        "the file's blocks are %s (%d MB)", "held dequantized" if fits else "dequantized at each use", needed >> 20
    )  # fmt: skip
    for layer in layers if fits else []:
        layer.hold(dtype)
