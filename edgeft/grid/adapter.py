"""A trained PEFT adapter as llama.cpp's adapter.gguf: what the format cannot hold, and the file with its base's hash.

llama.cpp adds `alpha / rank * B (A x)` to a product, with one alpha for the whole file and each pair's own rank
(llama-adapter.h, llama_adapter_lora_weight::get_scale). PEFT's other scales are brought to that form here: rsLoRA's
alpha / sqrt(rank) goes into the file's alpha, and where single layers have an alpha or a rank of their own, what still
differs goes into their B.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeft.errors import StageError
from edgeft.llamacpp import header
from edgeft.llamacpp.adapter import BASE_KEY, adapter_beside, base_hash, check_base
from edgeft.llamacpp.convert_lora import lora_to_gguf

if TYPE_CHECKING:
    import torch

__all__ = ["BASE_KEY", "Written", "adapter_beside", "base_hash", "check_base", "refuse", "write"]

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_MORE = (
    "use_dora", "use_qalora", "use_bdlora", "modules_to_save", "target_parameters", "trainable_token_indices", "lora_bias",
    "layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
"""PEFT's settings that make an adapter more than pairs of A and B."""
_EMBEDDINGS = {"embed_tokens", "wte", "wpe", "word_embeddings", "tok_embeddings", "embed_in", "tok_embd"}


@dataclass(frozen=True, kw_only=True)
class Written:
    """What went into an adapter.gguf."""

    layers: int
    """Pairs of A and B in the PEFT adapter."""
    alpha: float
    """The file's; llama.cpp scales each pair by alpha / its rank."""
    type: str
    """Of A and B in the file: F16 or F32."""
    bytes: int
    """Of the tensors, which is what llama.cpp keeps in memory for them."""
    max_abs_error: float
    """The largest difference that storing A and B as `type` made to one of their numbers."""
    vanished: int
    """Numbers that were not zero and are in the file."""
    relative_error: float
    """Frobenius norm of what storing them changed in all scaled products B A, by the norm of the products."""
    base_sha256: str
    """`base_hash` of the base it was written for."""

    def facts(self) -> dict[str, Any]:
        """Everything of it, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Pair:
    module: str
    a: torch.Tensor
    """[rank, in], float32."""
    b: torch.Tensor
    """[out, rank], float32, with what the file's alpha does not say multiplied in."""


def refuse(config: Mapping[str, Any], *, tied: bool = False) -> list[str]:
    """Why an adapter with this configuration does not fit llama.cpp's format, a sentence each; empty when it does.

    `config` has PEFT's names (`LoraConfig.to_dict()`, adapter_config.json); those that are missing count as PEFT's
    defaults. `tied`: the model's head is its input embedding, which llama.cpp keeps as one tensor.
    """
    reasons = []
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        reasons.append(f"an adapter of type {kind} is no LoRA")
    reasons += [
        f"{name} = {config[name]!r}: the file holds pairs of A and B for whole matrices only"
        for name in _MORE if config.get(name)
    ]  # fmt: skip
    if (bias := config.get("bias", "none")) != "none":
        reasons.append(f"bias = {bias!r}: the file holds no trained biases")
    start = config.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal"):
        reasons.append(
            f"init_lora_weights = {start!r} changes the base's weights, which stay as they are in its file"
        )
    alphas = {"lora_alpha": config.get("lora_alpha", 8), **(config.get("alpha_pattern") or {})}
    reasons += [
        f"{name} = 0: llama.cpp reads an alpha of 0 as a scale of 1"
        for name, alpha in alphas.items() if not alpha
    ]  # fmt: skip
    given = config.get("target_modules") or []
    targets = {given} if isinstance(given, str) else set(given)
    leaves = {name.rpartition(".")[2] for name in targets}
    if embeddings := sorted(leaves & _EMBEDDINGS):
        reasons.append(
            f"target_modules names {embeddings[0]}: adapters of an input embedding are not written"
        )
    if tied and leaves & {"lm_head", "embed_out"}:
        reasons.append("target_modules names the head, which in this model is the input embedding too")
    return reasons


def write(
    adapter: Path,
    checkpoint: Path,
    base: Path,
    out: Path,
    *,
    outtype: Literal["f16", "f32"] = "f16",
    name: str = "adapter",
) -> Written:
    """Write the PEFT folder `adapter` as `out`, a GGUF adapter for the file `base`, and say what storing it cost.

    `checkpoint` is the folder whose conversion has the base's names and order of rows (its config.json and tokenizer
    are read, its weights are not). The base may be of any quantization: llama.cpp adds the adapter beside the product
    with the quantized weight, in float32; an F16 A or B rounds what it is multiplied with to F16 as well.
    Raises StageError when the format cannot hold the adapter (`refuse`), a number of it is over F16's range, or a pair
    has no tensor of its shape in the base; ToolError when the converter does not know the model.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if reasons := refuse(config):
        raise StageError(
            f"{adapter} does not fit llama.cpp's adapter format: {'; '.join(reasons)}",
            hint="train plain LoRA on linear layers, or use a method that merges the adapter",
        )
    alpha = _strength(config["lora_alpha"], config["r"], config)
    pairs = _pairs(adapter, config, alpha)
    errors = _errors(pairs, alpha, outtype)
    hashed = base_hash(base)
    with tempfile.TemporaryDirectory(prefix="edgeft-adapter-") as made:
        folder = Path(made) / "adapter"  # the converter writes parts of its name into the file
        folder.mkdir()
        _write_plain(folder, pairs, config, alpha)
        said: dict[str, header.Value] = {"general.name": name, BASE_KEY: hashed}
        aside = out.with_name(f"{out.name}.new")
        try:
            lora_to_gguf(folder, checkpoint, aside, outtype=outtype, metadata=said)
            size = _check_complete(aside, base, pairs)
            aside.replace(out)
        finally:
            aside.unlink(missing_ok=True)
    return Written(
        layers=len(pairs), alpha=alpha, type=outtype.upper(), bytes=size, base_sha256=hashed, **errors
    )


def _strength(alpha: float, rank: int, config: Mapping[str, Any]) -> float:
    """What alpha / rank must have above the line to be PEFT's scale (peft/tuners/lora/layer.py, update_layer)."""
    return float(alpha) * math.sqrt(rank) if config.get("use_rslora") else float(alpha)


def _pairs(folder: Path, config: Mapping[str, Any], alpha: float) -> list[_Pair]:
    """The adapter's pairs, each with the scale `alpha / rank`. Raises StageError for anything else in its file."""
    from safetensors.torch import load_file

    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        if not (match := _KEY.fullmatch(key)):
            raise StageError(f"{folder} holds {key}, which is no lora_A or lora_B weight of a linear layer")
        halves.setdefault(match["module"], {})[match["side"]] = tensor.float()
    if not halves:
        raise StageError(f"{folder} holds no pair of A and B")
    found = []
    for module, sides in sorted(halves.items()):
        if missing := {"A", "B"} - sides.keys():
            raise StageError(f"{folder} has no lora_{missing.pop()} for {module}")
        a, b = sides["A"], sides["B"]
        rank = int(_own(config.get("rank_pattern"), module, config["r"]))
        if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == rank:
            raise StageError(f"{module} has A {tuple(a.shape)} and B {tuple(b.shape)}, its rank is {rank}")
        own = _strength(_own(config.get("alpha_pattern"), module, config["lora_alpha"]), rank, config)
        found.append(_Pair(module=module, a=a, b=b if own == alpha else b * (own / alpha)))
    return found


def _own(pattern: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """A module's own value: the first pattern that is the end of its name (peft/utils/other.py, get_pattern_key)."""
    return next((v for k, v in (pattern or {}).items() if re.match(rf"(.*\.)?({k})$", module)), otherwise)


def _errors(pairs: list[_Pair], alpha: float, outtype: str) -> dict[str, Any]:
    """What storing the numbers as F16 does to them. Raises StageError when one of them is not finite there."""
    import torch

    largest, vanished, lost, whole = 0.0, 0, 0.0, 0.0
    for pair in pairs:
        stored = []
        for side, given in (("A", pair.a), ("B", pair.b)):
            kept = given.half().float() if outtype == "f16" else given
            if not bool(torch.isfinite(kept).all()):
                peak = float(given.abs().max())
                raise StageError(
                    f"{side} of {pair.module} reaches {peak:g}, which {outtype.upper()} cannot hold",
                    hint='write the adapter as "f32"' if math.isfinite(peak) else "the training diverged",
                )
            largest = max(largest, float((kept - given).abs().max()))
            vanished += int(((kept == 0) & (given != 0)).sum())
            stored.append(kept)
        scale = (alpha / len(pair.a)) ** 2
        a, b, kept_a, kept_b = (t.double() for t in (pair.a, pair.b, *stored))
        whole += scale * _squared_norm(a, b)
        lost += scale * _squared_norm(torch.cat([a, kept_a]), torch.cat([b, -kept_b], 1))
    error = math.sqrt(max(0.0, lost) / whole) if whole else 0.0
    return {"max_abs_error": largest, "vanished": vanished, "relative_error": error}


def _squared_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """Squared Frobenius norm of b @ a from products of the size of the rank: trace((B^T B)(A A^T))."""
    return float(((b.T @ b) * (a @ a.T)).sum())


def _write_plain(folder: Path, pairs: list[_Pair], config: Mapping[str, Any], alpha: float) -> None:
    """A PEFT folder whose every scale is alpha / rank, for the converter, which knows no other."""
    from safetensors.torch import save_file

    tensors = {}
    for pair in pairs:
        a, b = pair.a, pair.b
        if config.get("fan_in_fan_out"):
            # GPT-2 stores its weights as (in, out). The converter turns them, and the adapter's pairs with them,
            # which PEFT keeps the right way round: turned here, they come out right.
            a, b = b.T, a.T
        tensors[f"base_model.model.{pair.module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{pair.module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}), encoding="utf-8")


def _check_complete(file: Path, base: Path, pairs: list[_Pair]) -> int:
    """Bytes of the file's tensors. Raises StageError unless all of every pair is there and fits a tensor of the base.

    A fused weight that is split shares A; the rows of B are then split, so their numbers stay as many.
    """
    found = {t.name: t for t in header.read(file).tensors}
    weights = {t.name: t for t in header.read(base).tensors}
    for name, tensor in found.items():
        stem, _, side = name.rpartition(".")
        if side not in ("lora_a", "lora_b") or not {f"{stem}.lora_a", f"{stem}.lora_b"} <= found.keys():
            raise StageError(f"the converter wrote {name}, which is no half of a pair")
        if side == "lora_b":
            continue
        if stem not in weights:
            raise StageError(f"the adapter is for {stem}, which {base} does not have")
        a, b = tensor.shape, found[f"{stem}.lora_b"].shape
        if (a[0], b[1], *b[2:]) != weights[stem].shape:
            raise StageError(
                f"the adapter of {stem} is for {a[0]} inputs and {b[1]} outputs; {base} has {weights[stem].shape} there"
            )
    written = sum(t.weights for t in found.values() if t.name.endswith(".lora_b"))
    if written != (expected := sum(pair.b.numel() for pair in pairs)):
        raise StageError(
            f"the converter wrote {written} of the {expected} numbers in the adapter's B",
            hint="a layer that it leaves out of the base is trained but would not be shipped: take it out of target_modules",
        )
    return sum(t.bytes for t in found.values())
