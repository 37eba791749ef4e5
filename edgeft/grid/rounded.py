"""The layer that learns on the grid of a file: a PEFT LoRA layer whose sum with the frozen weight is rounded to the file's
blocks. Rank, alpha, rsLoRA and target modules are PEFT's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from edgeft.errors import StageError
from edgeft.grid import formats
from edgeft.grid.rounding import codes, half, through

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def attach(
    model: Any,
    latents: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: float,
    rslora: bool,
    learn_scales: bool,
    seed: int,
) -> Any:
    """`model`, as `grid.model.load` gives it, with the named layers learning through the rounding of their blocks.

    `latents`: for each layer's name the weight [out, in] before it was quantized, which the rounding starts from. The
    adapter's A is random from `seed`, its B zero. With `learn_scales` the float16 numbers of every block are trained too,
    each as its start times exp(t). Returns a PeftModel. Raises StageError for a layer whose type has no rounding.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    latent_class, layer_class = _classes()
    for name, latent in latents.items():
        above, _, leaf = name.rpartition(".")
        frozen = model.get_submodule(name)
        setattr(model.get_submodule(above), leaf, latent_class(frozen, latent, learn_scales))
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=rslora, bias="none", task_type="CAUSAL_LM", target_modules=list(latents)
    )  # fmt: skip
    config._register_custom_module({latent_class: layer_class})
    return get_peft_model(model, config)


def packed(model: Any) -> dict[str, Tensor]:
    """The layers' blocks with the codes and fields that `model` computes with now: uint8 [out, row bytes] in main memory,
    by the name of the layer's weight.

    Raises StageError when the blocks do not stand for the weights of the last step, bit for bit.
    """
    import torch

    _, layer_class = _classes()
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, layer_class):
            continue
        blocks = layer.blocks()
        format = formats.of(layer.get_base_layer().kind)
        stands_for = format.dequantize(blocks).reshape(layer.out_features, layer.in_features)
        if not torch.equal(stands_for, layer.rounded(torch.float32).detach()):
            raise StageError(f"the blocks of {name} do not hold the weights it was trained with last")
        found[f"{name}.weight"] = blocks.reshape(layer.out_features, -1).cpu()
    return found


@cache
def _classes() -> tuple[type[Any], type[Any]]:
    """The frozen layer and its learning one, made at the first use: their base classes are torch's and PEFT's."""
    import torch
    from peft.tuners import lora
    from torch.nn.functional import linear

    class Latent(torch.nn.Linear):
        """What a layer starts from: its weight before quantization, and the blocks that it is rounded to."""

        def __init__(self, frozen: Any, latent: Tensor, learn_scales: bool) -> None:
            torch.nn.Module.__init__(self)
            format = formats.of(frozen.kind)
            if format.rounding is None:
                raise StageError(f"blocks of {frozen.kind} cannot be rounded to one weight at a time")
            self.in_features, self.out_features = frozen.in_features, frozen.out_features
            self.kind, self.compute_dtype, self.learn_scales = frozen.kind, frozen.compute_dtype, learn_scales
            self.rounding = format.rounding
            device = frozen.weight.device
            self.weight = torch.nn.Parameter(latent.to(device), requires_grad=False)
            self.register_parameter("bias", frozen.bias)
            blocks = frozen.weight.data.reshape(-1, format.bytes)
            self.register_buffer("blocks", blocks, persistent=False)
            self.register_buffer("fields", self.rounding.fields(blocks), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            raise StageError("a layer that is rounded has no output without its adapter")

    class Rounded(lora.Linear):  # type: ignore[misc]  # PEFT is untyped
        """Computes with the rounded sum of the frozen weight and the adapter's product."""

        adapter_layer_names = (*lora.Linear.adapter_layer_names, "lora_scales")
        lora_scales: Any

        def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
            latent = self.get_base_layer()
            self.lora_scales = torch.nn.ParameterDict({})
            if latent.learn_scales and latent.fields.numel():
                self.lora_scales[adapter_name] = torch.nn.Parameter(torch.zeros_like(latent.fields))
            super().update_layer(adapter_name, *args, **kwargs)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            latent, device = self.get_base_layer(), x.device.type
            auto = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if auto else latent.compute_dtype
            bias = None if latent.bias is None else latent.bias.to(dtype)
            y = linear(x.to(dtype), self.rounded(dtype), bias)
            return y if auto else y.to(x.dtype)

        def rounded(self, dtype: torch.dtype) -> Tensor:
            """The weight [out, in] on the file's grid."""
            latent, a, b, scaling = self._parts()
            scale, offset = latent.rounding.scales(latent.blocks, self.fields())
            return through(latent.weight, a, b, scaling, scale, offset, latent.rounding, dtype)

        def blocks(self) -> Tensor:
            """uint8 [blocks, bytes]: what a file must hold for that weight."""
            latent, a, b, scaling = self._parts()
            with torch.no_grad():
                fields = self.fields()
                scale, offset = latent.rounding.scales(latent.blocks, fields)
                code = codes(latent.weight, a, b, scaling, scale, offset, latent.rounding)
                code = code.reshape(len(latent.blocks), -1)
                blocks: Tensor = latent.rounding.pack(latent.blocks, code, fields)
            return blocks

        def fields(self) -> Tensor:
            """float32 [blocks, k], float16 numbers all."""
            latent: Any = self.get_base_layer()
            name = self.active_adapters[0]
            if name not in self.lora_scales:
                start: Tensor = latent.fields
                return start
            return half(latent.fields * self.lora_scales[name].exp())

        def _parts(self) -> tuple[Any, Tensor, Tensor, float]:
            name = self.active_adapters[0]
            return (
                self.get_base_layer(),
                self.lora_A[name].weight,
                self.lora_B[name].weight,
                self.scaling[name],
            )

    return Latent, Rounded
