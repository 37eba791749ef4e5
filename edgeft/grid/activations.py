"""What llama.cpp does to the other side of a product, in torch: activations rounded to 8 or 16 bits, and the cache to float16.

A product with a quantized weight is one with a quantized activation: ggml's CPU kernels multiply whole numbers. Which type
an activation gets depends on the weight's (ggml-cpu.c, `vec_dot_type`). Here the same numbers come out as float32, bit
for bit those of an x86-64 with AVX; a straight-through gradient lets training see them.

Not simulated: the order of sums, the processor's exponential function, half-precision sums on ARM, and attention of a
sequence of fewer than 64 tokens, whose queries ggml rounds to float16 too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from edgeft.errors import StageError
from edgeft.grid import formats

if TYPE_CHECKING:
    from torch import Tensor

    Undo = Callable[[], None]

log = logging.getLogger(__name__)

BLOCKS = {"F32": 1, "F16": 1, "BF16": 1, "Q8_0": 32, "Q8_1": 32, "Q8_K": 256}
"""Types that an activation is brought to, and how many numbers share a scale in them."""

_OF_32 = {"Q1_0", "Q2_0", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4"}
_WITH_SUMS = {"Q4_1", "Q5_1"}
_CACHE, _MARK = "edgeft_float16_cache", "rounds_activations"


def activation_type(weight: str) -> str:
    """What ggml brings an activation to before a product with a weight of this type (`vec_dot_type` in ggml-cpu.c).

    One of BLOCKS: Q8_0 or Q8_1 for blocks of 32 weights, Q8_K for blocks of 256, the weight's own type for floats.
    Raises StageError for a type that `formats` does not know.
    """
    known = formats.of(weight).name
    if known in BLOCKS and BLOCKS[known] == 1:
        return known
    if known in _OF_32:
        return "Q8_0"
    return "Q8_1" if known in _WITH_SUMS else "Q8_K"


def rounded_activations(x: Tensor, kind: str) -> Tensor:
    """`x` [..., in] as ggml stores it in the type `kind` and reads it again; the shape and type of `x`.

    Rounding is done in float32, whatever the type of `x`. The gradient is that of the identity. The sources are quantize_row_q8_0
    and _q8_1 of ggml-cpu/arch/x86/quants.c (scale max/127 in float16, codes rounded half to even) and quantize_row_q8_K_ref of
    ggml-quants.c (scale in float32, with the sign that makes the largest number -127). A block whose scale is zero in
    float16 becomes zeros. Raises StageError for another kind, and for rows that are no whole blocks.
    """
    if kind not in BLOCKS:
        raise StageError(f"no activation is brought to {kind!r} (there are {', '.join(BLOCKS)})")
    if x.shape[-1] % BLOCKS[kind]:
        raise StageError(f"{x.shape[-1]} activations are no whole blocks of {BLOCKS[kind]} ({kind})")
    if kind == "F32":
        return x
    rounded: Tensor = _straight_through().apply(x, kind)
    return rounded


@contextmanager
def simulate(model: Any, *, products: bool = True, float16_cache: bool = True) -> Iterator[None]:
    """While the block runs, `model` rounds activations as llama.cpp does with the file that it was loaded from.

    `model` is what `grid.model.load` gave, bare or with an adapter of PEFT on it. With `products`, the inputs of every product
    with a weight of the file are rounded, the output layer's too, and those of an adapter as F16 tensors ask for. With
    `float16_cache` keys and values are rounded to float16, llama.cpp's default, where the model's attention is torch's
    scaled_dot_product_attention. Exact in float32; under autocast to bfloat16 the rounded numbers are rounded once more.
    Raises StageError for a model that does not say what type its output layer has.
    """
    undo = install(model, products=products, float16_cache=float16_cache)
    try:
        yield
    finally:
        undo()


def install(model: Any, *, products: bool = True, float16_cache: bool = True) -> Undo:
    """What `simulate` does, until the function that this returns is called. What rounds already is left alone."""
    from edgeft.grid.linear import GridLinear

    head = model.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    if head is not None and not hasattr(head, "kind"):
        raise StageError(
            "the type of the output layer is not known: the model was not loaded by grid.model.load"
        )
    undone: list[Undo] = []
    for module in model.modules() if products else ():
        if isinstance(module, GridLinear) or module is head or _trains_through_rounding(module):
            undone.append(install_layer(module))
        elif hasattr(module, "lora_A"):
            for part in (*module.lora_A.values(), *module.lora_B.values()):
                undone.append(_replace_forward(part, _rounding(part.forward, "F16")))
    if float16_cache:
        undone.append(_round_cache(model))

    def undo() -> None:
        for one in reversed(undone):
            one()

    return undo


def install_layer(module: Any) -> Undo:
    """The same for one layer: a GridLinear, the dense output layer of such a model, or one of `rounded`."""
    weight = module.get_base_layer() if _trains_through_rounding(module) else module
    kind = activation_type(weight.kind)
    forward = _rounding(module.forward, kind)
    if kind == "Q8_1":
        forward = _with_sums(forward, module, weight)
    return _replace_forward(module, forward)


def _trains_through_rounding(module: Any) -> bool:
    """Whether it is the layer of `rounded`, which needs PEFT to be named."""
    return hasattr(module, "rounded") and hasattr(module, "lora_A")


def _replace_forward(module: Any, forward: Callable[..., Tensor]) -> Undo:
    """A module's own attribute goes before its class's method; without it, nothing is slower than before."""
    before = vars(module).get("forward")
    if hasattr(before, _MARK):
        return lambda: None
    setattr(forward, _MARK, True)
    module.forward = forward

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return undo


def _rounding(forward: Callable[..., Tensor], kind: str) -> Callable[..., Tensor]:
    def rounded(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return forward(rounded_activations(x, kind), *args, **kwargs)

    return rounded


def _blocks(weight: Any) -> Tensor | None:
    """The blocks [n, bytes] of a layer that has them. The output layer holds plain numbers: its sums are not simulated."""
    import torch

    held: Tensor = getattr(weight, "blocks", weight.weight)
    return held.reshape(-1, formats.of(weight.kind).bytes) if held.dtype is torch.uint8 else None


def _with_sums(forward: Callable[..., Tensor], module: Any, weight: Any) -> Callable[..., Tensor]:
    """Q8_1 also stores each block's sum, a float16 of its own, and that is what a weight's offset is multiplied with.

    (ggml_vec_dot_q4_1_q8_1: `sumf += d * d' * sumi + m * s`.) So the product is that of the rounded numbers, plus the
    offsets times what the stored sum differs from theirs by.
    """
    blocks, rounding = _blocks(weight), formats.of(weight.kind).rounding
    if blocks is None or rounding is None:
        return forward

    def summed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        import torch

        fields = module.fields() if hasattr(module, "fields") else rounding.fields(blocks)
        offset = rounding.scales(blocks, fields)[1]
        y = forward(x, *args, **kwargs)
        if offset is None:
            return y
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            more = _sum_error(x.float()) @ offset.detach().reshape(weight.out_features, -1).T
        return y + more.to(y.dtype)

    return summed


@cache
def _straight_through() -> Any:
    import torch

    class StraightThrough(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                if kind in ("F16", "BF16"):
                    return x.to(torch.float16 if kind == "F16" else torch.bfloat16).to(x.dtype)
                blocks = x.float().reshape(*x.shape[:-1], -1, BLOCKS[kind])
                scale, codes = _q8_k(blocks) if kind == "Q8_K" else _q8(blocks)[1:]
                return (scale * codes).reshape(x.shape).to(x.dtype)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
            return grads[0], None

    return StraightThrough


def _q8(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks [..., 32] -> scale before it is stored, as float16 stores it, and codes -127 .. 127."""
    import torch

    largest = blocks.abs().amax(-1, keepdim=True)
    # Tensors on both sides: torch multiplies by the reciprocal of a number, which is another float32.
    most = torch.full_like(largest, 127)
    scale = largest / most
    stored = scale.half().float()
    codes = (blocks * (most / largest)).round()
    return scale, stored, torch.where(stored == 0, 0, codes)


def _sum_error(x: Tensor) -> Tensor:
    """x [..., in] -> [..., in / 32]: what Q8_1 stores as a block's sum, less the sum of the numbers it stores."""
    scale, stored, codes = _q8(x.reshape(*x.shape[:-1], -1, BLOCKS["Q8_1"]))
    total = codes.sum(-1)
    return (scale[..., 0] * total).half().float() - stored[..., 0] * total


def _q8_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [..., 256] -> scale [..., 1] and codes -127 .. 127."""
    import torch

    first = blocks.abs().argmax(-1, keepdim=True)
    largest = blocks.gather(-1, first)
    inverse = torch.full_like(largest, -127) / largest
    dead = ~inverse.isfinite()
    scale = torch.where(dead, 0, torch.ones_like(inverse) / inverse)
    codes = (blocks * inverse).round()
    return scale, torch.where(dead, 0, codes)


def _round_cache(model: Any) -> Undo:
    """Keys, turned by their position, and values are float16 in llama.cpp's cache; the sums over them are float32."""
    config = model.config
    before = config._attn_implementation
    if before == _CACHE:
        return lambda: None
    if before != "sdpa":
        log.warning("keys and values are not rounded to float16: the model's attention is %s", before)
        return lambda: None
    _register()
    config._attn_implementation = _CACHE

    def undo() -> None:
        config._attn_implementation = before

    return undo


@cache
def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        key, value = (rounded_activations(x, "F16") for x in (key, value))
        return plain(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(_CACHE, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_CACHE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
