"""The files of an AWQ folder: block by block while it is made, then as a server wants them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.awq import folding
from edgeft.awq.layouts import Codes, Layout

if TYPE_CHECKING:
    import torch

    from edgeft.awq.stream import Checkpoint

SHARD = 4 << 30
"""Bytes of one weight file of a large model."""
PROOF = ("proof.plain", "proof.scaled")
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


def write_part(
    part: Path, name: str, block: Any, codes: Mapping[str, Codes], layout: Layout, dtypes: Mapping[str, torch.dtype],
    record: Mapping[str, Any], proof: Sequence[torch.Tensor],
) -> None:  # fmt: skip
    """Write a finished block called `name`: its layers packed, its other parameters in `dtypes`, and what the next block is
    proven with. The file is there whole or not at all."""
    from safetensors.torch import save_file

    tensors = dict(zip(PROOF, (p.cpu().clone() for p in proof), strict=True))
    for inner, found in codes.items():
        packed = layout.pack(
            Codes(codes=found.codes.cpu(), zeros=found.zeros.cpu(), scales=found.scales.cpu())
        )
        tensors |= {f"{name}.{inner}.{suffix}": tensor for suffix, tensor in packed.items()}
    for key, p in block.named_parameters():
        if key.removesuffix(".weight") not in codes:
            tensors[f"{name}.{key}"] = p.data.to(dtypes[f"{name}.{key}"]).cpu().contiguous()
    aside = part.with_suffix(".part")
    save_file(tensors, aside, metadata={"record": json.dumps(dict(record))})
    aside.replace(part)


def read_part(part: Path, name: str, block: Any, layout: Layout) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Put what `write_part` wrote back into the block, rounded as it is now; returns record and proof."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(part, framework="pt") as f:
        record: dict[str, Any] = json.loads(f.metadata()["record"])
    tensors = load_file(part)
    linears = folding.linears(block)
    for key, p in block.named_parameters():
        inner = key.removesuffix(".weight")
        if inner in linears and key.endswith(".weight"):
            packed = {suffix: tensors[f"{name}.{inner}.{suffix}"] for suffix in layout.suffixes}
            value = layout.unpack(packed).weight()
        else:
            value = tensors[f"{name}.{key}"]
        p.data = value.to(device=p.device, dtype=p.dtype)
    return record, [tensors[key] for key in PROOF]


def assemble(found: Checkpoint, parts: Path, out: Path, quantization: Mapping[str, Any]) -> None:
    """Join the blocks' files and what belongs to no block into the folder `out`, with config and tokenizer beside them, and
    remove the former. One weight file is in memory at a time."""
    from safetensors.torch import save_file

    where = _where(found, parts)
    shards = _shards(where)
    index: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = (
            "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        tensors = _read(where, names)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        save_file(tensors, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)  # safetensors writes 0600
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        _write_json(out / "model.safetensors.index.json", content)
    for file_ in sorted(found.folder.iterdir()):
        if file_.is_file() and file_.name != "config.json" and not file_.name.endswith(_WEIGHTS):
            shutil.copyfile(file_, out / file_.name)
    _write_json(out / "config.json", {**found.config, "quantization_config": dict(quantization)})
    shutil.rmtree(parts)


def _where(found: Checkpoint, parts: Path) -> dict[str, tuple[Path, int]]:
    """File and size in bytes of every tensor of the result."""
    from safetensors import safe_open

    where: dict[str, tuple[Path, int]] = {}
    mine = dict.fromkeys(sorted(parts.glob("*.safetensors")))
    outside = {name: found.entries[name].file for name in found.outside()}
    for file in (*dict.fromkeys(outside.values()), *mine):
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118 - safe_open is no mapping
                if name not in PROOF and (file in mine or name in outside):
                    part = f.get_slice(name)
                    where[name] = file, math.prod(part.get_shape()) * _BYTES.get(part.get_dtype(), 4)
    return where


def _shards(where: Mapping[str, tuple[Path, int]]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, (_, more) in where.items():
        if shards[-1] and size + more > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    return shards


def _read(where: Mapping[str, tuple[Path, int]], names: Sequence[str]) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(where[name][0] for name in names):
        with safe_open(file, framework="pt") as f:
            tensors |= {name: f.get_tensor(name) for name in names if where[name][0] == file}
    return tensors


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
