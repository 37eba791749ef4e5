"""The base in bitsandbytes NF4, for QLoRA: which layers go into 4 bits, and how they are held on a CPU."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from edgeft.training.modules import linear_layers

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def config(empty: Any, dtype: torch.dtype) -> Any:
    """Quantize just what `linear_layers` finds: a router or an output layer in 4 bits would be a silent loss."""
    from torch import nn
    from transformers import BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D

    inside = set(linear_layers(empty))
    outside = [
        name
        for name, module in empty.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in inside
    ]
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=outside,
    )  # fmt: skip


def prepare(model: Any, dtype: torch.dtype, *, on_cpu: bool) -> None:
    """Make a model that was loaded with `config` ready for training: on a CPU hold its layers dequantized, to the same
    numbers, where memory allows; else see to it that they can be trained through."""
    if on_cpu and _fits(model, dtype):
        _unpack(model, dtype)
    else:
        _never_repack(model)


def _fits(model: Any, dtype: torch.dtype) -> bool:
    """Whether the machine has twice the memory that the NF4 layers take as plain numbers."""
    import bitsandbytes
    import psutil

    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    needed = sum(m.in_features * m.out_features for m in layers) * dtype.itemsize
    fits = bool(2 * needed < psutil.virtual_memory().available)
    log.info(
        "NF4 layers are %s (%d MB)", "held dequantized" if fits else "dequantized at each use", needed >> 20
    )
    return fits


def _unpack(model: Any, dtype: torch.dtype) -> None:
    """Replace each NF4 layer by a plain one that holds the very numbers NF4 stands for.

    On a CPU bitsandbytes dequantizes each weight at each use, one pass over all of them a generated token. The base
    is frozen, so once is enough: same numbers, a third to a half more speed in training, far more in generation, for
    the memory a small model has to spare.
    """
    import bitsandbytes
    import torch

    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain = torch.nn.Linear(
                module.in_features, module.out_features, bias=False, device="meta", dtype=dtype
            )  # fmt: skip
            plain.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
            if module.bias is not None:
                plain.bias = torch.nn.Parameter(module.bias.data.to(dtype), requires_grad=False)
            above, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(above), leaf, plain)
    model.is_quantized = model.is_loaded_in_4bit = False
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    del model.config.quantization_config


def _never_repack(model: Any) -> None:
    """Stop bitsandbytes from repacking NF4 weights at the first evaluation on a CPU with AVX512-BF16.

    Repacked weights go through an inference kernel without a backward pass (bitsandbytes 0.50, `matmul_4bit`), so
    training after the step-0 evaluation would lose the gradient through every frozen layer.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
