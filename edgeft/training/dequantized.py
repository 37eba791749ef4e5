"""The numbers that QLoRA's frozen layers compute with: which layers those are, and what NF4 makes of a weight.

Nothing is chosen here. The layers, block size and storage are those of the module tree that transformers builds for
`load_base`, the quantization is bitsandbytes' own, and a weight is cast to the compute dtype first, as loading does:
bfloat16 and float32 give different 4-bit codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.training import model as models
from edgeft.training import nf4

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer that QLoRA holds in NF4."""

    name: str
    """Of the module."""
    transposed: bool
    """Its weight is stored as (in, out), as GPT-2's Conv1D does; NF4 blocks run over (out, in)."""
    dtype: torch.dtype
    """In which the weight is quantized and computes."""
    block: int
    kind: str
    double: bool
    """The block scales are quantized as well."""
    storage: torch.dtype

    def values(self, weight: torch.Tensor, device: str) -> torch.Tensor:
        """What training computes with instead of `weight`: same shape, on `device`, in `self.dtype`.

        Takes about 50 bytes a number at its peak on a CPU, where bitsandbytes quantizes in plain torch.
        """
        from bitsandbytes import functional

        ready = weight.to(device=device, dtype=self.dtype)
        ready = (ready.T if self.transposed else ready).contiguous()
        packed, state = functional.quantize_4bit(
            ready, blocksize=self.block, compress_statistics=self.double, quant_type=self.kind,
            quant_storage=self.storage,
        )  # fmt: skip
        del ready
        plain: torch.Tensor = functional.dequantize_4bit(packed, state)
        return plain.T if self.transposed else plain


def layers(folder: Path, compute_dtype: torch.dtype) -> list[Layer]:
    """The layers of the checkpoint in `folder` that `load_base(method="qlora")` holds in NF4, in the model's order.

    Raises what `skeleton` raises.
    """
    import bitsandbytes
    from transformers.integrations import replace_with_bnb_linear
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    empty = models.skeleton(folder)
    config = nf4.config(empty, compute_dtype)
    skipped = Bnb4BitHfQuantizer.get_modules_to_not_convert(
        empty, config.llm_int8_skip_modules, empty._keep_in_fp32_modules
    )
    tree: Any = replace_with_bnb_linear(empty, modules_to_not_convert=skipped, quantization_config=config)
    return [
        Layer(
            name=name, transposed=module.source_cls is Conv1D, dtype=compute_dtype, block=module.weight.blocksize,
            kind=module.weight.quant_type, double=module.weight.compress_statistics,
            storage=module.weight.quant_storage,
        )
        for name, module in tree.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    ]  # fmt: skip
