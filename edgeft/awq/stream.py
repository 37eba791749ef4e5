"""A checkpoint's model, of which one decoder block at a time is in memory: the rest of it stays on the disk.

The module tree comes from the config, with its buffers (rotary tables) and without weights. What goes into the first block
and what is handed to each beside it is recorded by running the model with blocks that only pass on what they get.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import StageError

if TYPE_CHECKING:
    import torch

_READ_OFF = ("attention_type", "layer_type", "is_sliding")
"""What some models read off a block before they call it."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a tensor lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: F16, BF16, F32 ..."""


class Checkpoint:
    """A folder as transformers saves it, opened block by block."""

    def __init__(self, folder: Path) -> None:
        """Raises StageError for a quantized checkpoint, for one that is not a causal language model whose blocks stand in
        one list, and for one whose tensors have other names than its modules."""
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "quantization_config" in self.config:
            raise StageError(f"{folder.name} is already quantized; AWQ starts from 16-bit weights")
        self.entries = _entries(folder)
        self.model = _empty(folder)
        self.prefix, self.blocks = _blocks(self.model)
        inside = [n for n in self.entries if n.startswith(f"{self.prefix}.")]
        if not inside:
            raise StageError(
                f"the checkpoint has no tensor called {self.prefix}...: transformers renames this family's tensors while "
                "loading, which AWQ does not follow here",
                hint='take [[quantize]] kind = "gguf"',
            )

    def tensor(self, name: str) -> torch.Tensor:
        """As it is stored."""
        from safetensors import safe_open

        with safe_open(self.entries[name].file, framework="pt") as f:
            found: torch.Tensor = f.get_tensor(name)
        return found

    def block(self, number: int, device: str) -> tuple[str, Any]:
        """A decoder block with its own weights in float32 on `device`, and its name. Raises StageError when the checkpoint
        lacks one of them."""
        name = f"{self.prefix}.{number}"
        block = self.blocks[number]
        self._fill(name, block, device)
        return name, block

    def release(self, number: int) -> None:
        """Give the memory of a block back."""
        import torch

        for module in self.blocks[number].modules():
            for key, value in module._parameters.items():
                if value is not None:
                    module._parameters[key] = torch.nn.Parameter(value.to("meta"), requires_grad=False)

    def head(self, hidden: torch.Tensor, device: str) -> torch.Tensor:
        """Logits [1, tokens, vocab] in float32 of what the last block gave for one window."""
        import torch

        kept = self._passing(lambda *_, **__: hidden.to(device))
        self._fill_outside(device)
        try:
            with torch.inference_mode():
                ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=device)
                logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        finally:
            self._restore(kept)
        return logits.float().cpu()

    def inputs(
        self, windows: Sequence[Sequence[int]], device: str
    ) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
        """What the first block gets for each window [1, tokens, hidden] in main memory, and what each block gets beside it.

        Raises StageError when that depends on the text, as in models whose blocks see the ids again.
        """
        import torch

        hidden: list[torch.Tensor] = []
        beside: list[list[dict[str, Any]]] = [[] for _ in self.blocks]

        def record(number: int, given: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if args:
                raise StageError(
                    "the decoder blocks take more than one value by position, which AWQ does not follow here"
                )
            if number == 0:
                hidden.append(given.float().cpu())
            if len(hidden) <= 2:
                beside[number].append(kwargs)
            return given

        kept = self._passing(record)
        self._fill_outside(device)
        try:
            with torch.inference_mode():
                for window in windows:
                    self.model.base_model(
                        input_ids=torch.tensor([list(window)], device=device), use_cache=False
                    )
        finally:
            self._restore(kept)
        for number, seen in enumerate(beside):
            if len(seen) == 2 and not _same(*seen):
                raise StageError(
                    f"decoder block {number} takes inputs that depend on the text, which AWQ does not follow here",
                    hint='take [[quantize]] kind = "gguf"',
                )
        return hidden, [seen[0] for seen in beside]

    def outside(self) -> Iterator[str]:
        """Names of the tensors that belong to no block."""
        return (name for name in self.entries if not name.startswith(f"{self.prefix}."))

    def _fill_outside(self, device: str) -> None:
        """Embedding, last norm and head: whatever belongs to no block."""
        for name, module in self.model.named_modules():
            own = [n for n, p in module.named_parameters(recurse=False) if p.is_meta]
            if own and not f"{name}.".startswith(f"{self.prefix}."):
                self._fill(name, module, device, recurse=False)
        for _, module in self.model.named_modules():
            for key, buffer in list(module.named_buffers(recurse=False)):
                if not buffer.is_meta:
                    module._buffers[key] = buffer.to(device)

    def _fill(self, name: str, module: Any, device: str, *, recurse: bool = True) -> None:
        import torch

        for key, _ in list(module.named_parameters(recurse=recurse)):
            found = self._find(f"{name}.{key}")
            inner, _, last = key.rpartition(".")
            owner = module.get_submodule(inner)
            value = self.tensor(found).to(device=device, dtype=torch.float32)
            if value.shape != owner._parameters[last].shape:
                raise StageError(
                    f"{found} has shape {tuple(value.shape)}, the model wants {tuple(owner._parameters[last].shape)}"
                )
            owner._parameters[last] = torch.nn.Parameter(value, requires_grad=False)
        if recurse:
            for key, buffer in list(module.named_buffers()):
                inner, _, last = key.rpartition(".")
                module.get_submodule(inner)._buffers[last] = buffer.to(device)

    def _find(self, name: str) -> str:
        """The tensor of a parameter; a tied head has the embedding's."""
        if name in self.entries:
            return name
        top, low = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        names = {module: key for key, module in self.model.named_modules() if module in (top, low)}
        if name == f"{names.get(top)}.weight" and self.tied and f"{names.get(low)}.weight" in self.entries:
            return f"{names[low]}.weight"
        raise StageError(f"the checkpoint has no {name}, which its own config asks for")

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(getattr(self.model.config.get_text_config(), "tie_word_embeddings", False))

    @property
    def head_name(self) -> str:
        """The head's module name, `lm_head` in most families."""
        top = self.model.get_output_embeddings()
        return next((str(name) for name, module in self.model.named_modules() if module is top), "")

    def _passing(self, then: Any) -> Any:
        """Put modules in the blocks' place that call `then(number, hidden, ...)`; returns the real ones."""
        import torch

        class Passing(torch.nn.Module):
            def __init__(self, number: int, real: Any) -> None:
                super().__init__()
                self.number = number
                for key in _READ_OFF:
                    if hasattr(real, key):
                        setattr(self, key, getattr(real, key))

            def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                return then(self.number, hidden, *args, **kwargs)

        kept = list(self.blocks)
        for number, real in enumerate(kept):
            self.blocks[number] = Passing(number, real)
        return kept

    def _restore(self, kept: Sequence[Any]) -> None:
        """Put the blocks back, and give the memory of all else back."""
        import torch

        for number, real in enumerate(kept):
            self.blocks[number] = real
        for name, module in self.model.named_modules():
            if not f"{name}.".startswith(f"{self.prefix}."):
                for key, value in module._parameters.items():
                    if value is not None:
                        module._parameters[key] = torch.nn.Parameter(value.to("meta"), requires_grad=False)


def run(block: Any, hidden: torch.Tensor, beside: Mapping[str, Any]) -> torch.Tensor:
    """A block's output [1, tokens, hidden] for its input."""
    out = block(hidden, **beside)
    result: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return result


def _same(a: Any, b: Any) -> bool:
    import torch

    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and (not isinstance(a, (str, int, float, bool)) or a == b)


def _entries(folder: Path) -> dict[str, Entry]:
    from safetensors import safe_open

    found: dict[str, Entry] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118 - safe_open is no mapping
                part = f.get_slice(name)
                found[name] = Entry(file=file, shape=tuple(part.get_shape()), dtype=part.get_dtype())
    if not found:
        raise StageError(f"{folder.name} holds no weights in safetensors files")
    return found


def _empty(folder: Path) -> Any:
    import torch
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except (ValueError, KeyError, OSError) as e:
        raise StageError(
            f"the checkpoint cannot be read as a causal language model: {e}",
            hint="edgeft runs no model code out of a checkpoint (trust_remote_code)",
        ) from e


def _blocks(model: Any) -> tuple[str, Any]:
    """The list of decoder blocks and its name."""
    import torch

    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == wanted:
            return name, module
    raise StageError(
        f"{type(model).__name__} has no list of {wanted} decoder blocks, which AWQ goes through one by one",
        hint='take [[quantize]] kind = "gguf"',
    )
