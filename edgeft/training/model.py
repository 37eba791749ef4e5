"""Loads a base for training, attaches an adapter, and loads both again as they stood when training ended.

One place decides how the model computes, so the loss while training, the held-out loss and every later comparison
against "the trained model" mean the same thing.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeft.errors import RecipeError, SetupError, StageError
from edgeft.training import nf4
from edgeft.training.modules import Targets, is_transposed

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Method = Literal["qlora", "lora", "grid-adapter"]
ComputeDtype = Literal["auto", "bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A base in the blocks of a GGUF file."""

    file: Path
    """Holds the weights."""
    plain: Path
    """The 16-bit file that it was quantized from: tells which tensor each of the checkpoint's parameters became."""


def load_base(
    folder: Path, *, method: Method, device: str = "auto", compute_dtype: ComputeDtype = "auto",
    packed: Packed | None = None,
) -> Any:  # fmt: skip
    """The causal language model in `folder`, frozen, ready for an adapter.

    `qlora` takes the linear layers of the decoder blocks through bitsandbytes NF4 with double quantization; everything
    else, the output layer among it, stays in the compute dtype. On a GPU they stay NF4; on a CPU they are dequantized
    once, to the same numbers, where memory allows. `lora` keeps all of it in the compute dtype. `grid-adapter` takes
    the weights of `packed`, which it asks for, and keeps them in their blocks.
    `device` as for `pick_device`, `compute_dtype` as for `pick_dtype`. With bfloat16 the model's `forward` runs under
    autocast, so that adapters keep float32 weights and multiply in bfloat16.

    Raises StageError for a checkpoint that is quantized already, and whatever `skeleton` raises.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as chatter

    chatter.disable_progress_bar()
    where = pick_device(device)
    dtype = pick_dtype(compute_dtype, device=where)
    extra: dict[str, Any] = {}
    if method == "grid-adapter":
        return _packed(folder, packed, where, dtype)
    if method == "qlora":
        extra["quantization_config"] = nf4.config(skeleton(folder), dtype)
    elif is_quantized(folder):
        raise StageError(f"{folder.name} is already quantized; training starts from 16-bit or 32-bit weights")
    placed = {"": "cpu" if where == "cpu" else 0}  # accelerate wants a quantized model's GPU by number
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=placed, local_files_only=True, **extra
    )
    model.config.use_cache = False
    model.requires_grad_(False)
    if method == "qlora":
        nf4.prepare(model, dtype, on_cpu=where == "cpu")
    if dtype is torch.bfloat16:
        model.forward = torch.autocast(where.split(":")[0], dtype=dtype)(model.forward)
    return model


def load_trained(
    folder: Path, adapter: Path, *, method: Method, device: str = "auto", compute_dtype: ComputeDtype = "auto",
    packed: Packed | None = None,
) -> Any:  # fmt: skip
    """The model as it stood at the end of training: the base of `load_base` with the adapter folder attached.

    A PeftModel in eval mode; inside `with model.disable_adapter():` it is the base alone.
    """
    from peft import PeftModel

    base = load_base(folder, method=method, device=device, compute_dtype=compute_dtype, packed=packed)
    return PeftModel.from_pretrained(base, os.fspath(adapter), is_trainable=False).eval()


def attach(
    model: Any, targets: Targets, *, rank: int, alpha: float, dropout: float, rslora: bool, seed: int
) -> Any:
    """`model` with a fresh adapter on each of `targets`: A random from `seed`, B zero, both float32."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora, bias="none", task_type="CAUSAL_LM",
        target_modules=list(targets.names),
        fan_in_fan_out=all(is_transposed(model.get_submodule(name)) for name in targets.names),
    )  # fmt: skip
    return get_peft_model(model, config)


def save_adapter(model: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` in PEFT's layout.

    The same adapter gives the same bytes: no path of this machine, sorted keys, no model card.
    """
    from safetensors.torch import save_file

    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": "", "inference_mode": True}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        config, indent=2, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v)
    )
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)  # safetensors writes 0600


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the adapter's tensors in main memory, under the names PEFT's files use."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in sorted(state.items())}


def skeleton(folder: Path) -> Any:
    """The model in `folder` without its weights: its module tree on torch's meta device, built from the config.

    Raises StageError when the checkpoint is quantized already or is not a causal language model transformers knows.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if is_quantized(folder):
        raise StageError(f"{folder.name} is already quantized; training starts from 16-bit or 32-bit weights")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, OSError) as e:
        raise StageError(
            f"the base cannot be read as a causal language model: {e}",
            hint="edgeft runs no model code out of a checkpoint (trust_remote_code)",
        ) from e


def is_quantized(folder: Path) -> bool:
    """Whether the checkpoint's config says that its weights are quantized (C-41)."""
    return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))


def pick_device(wanted: str = "auto") -> str:
    """`auto`: what $EDGEFT_DEVICE says (cpu, cuda), else the first CUDA GPU, else the CPU.

    Raises SetupError when CUDA is wanted and absent.
    """
    import torch

    if wanted == "auto":
        wanted = os.environ.get("EDGEFT_DEVICE", "") or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted not in ("cpu", "cuda", "cuda:0"):
        raise SetupError(f"EDGEFT_DEVICE is {wanted!r}; it can be cpu or cuda")
    if wanted != "cpu" and not torch.cuda.is_available():
        raise SetupError("EDGEFT_DEVICE is cuda, but torch sees no CUDA GPU", hint="see `edgeft doctor`")
    return "cpu" if wanted == "cpu" else "cuda:0"


def device_name(device: str) -> str:
    """The GPU's or the processor's own name."""
    import torch

    if device != "cpu":
        return torch.cuda.get_device_name(device)
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def pick_dtype(wanted: ComputeDtype, *, device: str) -> torch.dtype:
    """The number format that matrix products are computed in.

    `auto` is bfloat16 on a GPU that has it and on a CPU with bfloat16 instructions of its own (AVX512-BF16, AMX,
    Arm BF16), else float32: a CPU without them converts every operand and is slower than in float32. float16 is
    not offered: it overflows in training without loss scaling.
    Raises RecipeError when bfloat16 is asked of a GPU that lacks it.
    """
    import torch

    if device == "cpu":
        native = set(_cpuinfo("flags", "Features").split()) & {"avx512_bf16", "amx_bf16", "bf16"}
        chosen = "bfloat16" if native else "float32"
    else:
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        chosen = "bfloat16" if able else "float32"
        if wanted == "bfloat16" and not able:
            raise RecipeError(
                f"train.compute_dtype is bfloat16, which {device_name(device)} does not compute in",
                hint='leave it at "auto"',
            )
    return torch.bfloat16 if (chosen if wanted == "auto" else wanted) == "bfloat16" else torch.float32


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the model can be asked for the logits of some positions only."""
    import inspect

    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


def recompute_activations(model: Any) -> None:
    """Turn gradient checkpointing on: activations are computed again on the way back instead of being kept."""
    # transformers renamed it within 5.x; the old name warns there, the new one is missing before.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _packed(folder: Path, packed: Packed | None, device: str, dtype: torch.dtype) -> Any:
    from edgeft.grid import model as grid

    if packed is None:
        raise StageError("grid-adapter trains on the weights of a GGUF file, and none was given")
    name: Literal["float32", "bfloat16"] = "float32" if str(dtype) == "torch.float32" else "bfloat16"
    return grid.load(folder, packed.file, packed.plain, device=device, compute_dtype=name)


def _cpuinfo(*keys: str) -> str:
    """The first of /proc/cpuinfo's fields with one of these names, or nothing (also where there is no such file)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() in keys), "")
