"""QLoRA steps on GGUF blocks (`edgeft.grid.linear.GridLinear`) against bitsandbytes NF4, in one run. Prints a table.

python benchmarks/grid_vs_nf4.py [--kinds Q4_K ...] [--layers 28] [--length 2048] [--batches 1 4] [--steps 5] [--tiny]

A 7B-class model in the shape of Qwen2-7B (hidden 3584, feed-forward 18944, 28 layers, 152,064 tokens) with random weights:
linear layers of the blocks packed, everything else bfloat16. LoRA of rank 16 on all of them by PEFT, gradient checkpointing,
bfloat16 autocast, AdamW, the whole vocabulary's logits. Both arms are one function but for the class of the linear layers; NF4 with double
quantization, as edgeft's `qlora` has it. Fewer `--layers` are said in the title and not extrapolated. `--tiny` is a small shape
that also runs on a CPU, to see that the script works; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes
import peft
import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from edgeft.grid import formats
from edgeft.grid.linear import GridLinear
from edgeft.training.model import recompute_activations

BIG = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "rope_theta": 1e6,
}  # fmt: skip
TINY = BIG | {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 512,
}  # fmt: skip
SPREAD = 0.02
"""Standard deviation of the random weights."""

Pack = Callable[[nn.Linear, torch.device], nn.Linear]


@dataclass(frozen=True, kw_only=True)
class Cost:
    tokens_per_second: float
    peak_gb: float
    weights_gb: float
    loss: float


def nf4(layer: nn.Linear, device: torch.device) -> nn.Linear:
    made = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=torch.bfloat16,
        compress_statistics=True, quant_type="nf4", device="meta",
    )  # fmt: skip
    weight = SPREAD * torch.randn(layer.out_features, layer.in_features, device=device, dtype=torch.bfloat16)
    made.weight = bitsandbytes.nn.Params4bit(
        weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=made
    ).to(device)
    if layer.bias is not None:
        made.bias = nn.Parameter(torch.zeros(layer.out_features, device=device, dtype=torch.bfloat16), False)
    made.support_avx512bf16_for_cpu = False  # its CPU kernel has no way back
    return made


def grid(kind: str) -> Pack:
    """Random codes and sub-scales in blocks of this type, with float16 scales that give weights of about SPREAD."""
    format = formats.of(kind)
    rounding = format.rounding
    assert rounding is not None, f"{kind} is a codebook: random bytes are no sensible weights"

    def pack(layer: nn.Linear, device: torch.device) -> nn.Linear:
        count = layer.out_features * layer.in_features // format.block
        blocks = torch.randint(0, 256, (count, format.bytes), dtype=torch.uint8, device=device)
        ones = torch.ones_like(rounding.fields(blocks[:64]))
        codes = torch.randint(0, len(rounding.levels), (64, format.block), dtype=torch.uint8, device=device)
        scale = SPREAD / float(format.dequantize(rounding.pack(blocks[:64], codes, ones)).std())
        for start in range(0, count, 1 << 16):
            part = blocks[start : start + (1 << 16)]
            part.copy_(
                rounding.pack(part, rounding.codes(part), scale * torch.ones_like(rounding.fields(part)))
            )
        bias = (
            None
            if layer.bias is None
            else torch.zeros(layer.out_features, device=device, dtype=torch.bfloat16)
        )
        rows = blocks.reshape(layer.out_features, -1)
        return GridLinear(rows, kind, bias, compute_dtype=torch.bfloat16)

    return pack


def model_of(shape: dict[str, float], pack: Pack, device: torch.device) -> peft.PeftModel:
    torch.manual_seed(0)
    with init_empty_weights(include_buffers=False):
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape, dtype="bfloat16"))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("model.layers"):
            above, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(above), leaf, pack(module, device))
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                made = torch.ones(weight.shape, device=device, dtype=torch.bfloat16)
                made = made if weight.dim() == 1 else made.normal_(0, SPREAD)
                module.register_parameter(name, nn.Parameter(made, False))
    model.to(device)
    model.config.use_cache = False
    recompute_activations(model)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).train()


def measure(model: peft.PeftModel, *, batch: int, length: int, steps: int, device: torch.device) -> Cost:
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=device)
    weights_gb = memory(device)[0]
    seconds = []
    for step in range(steps + 2):  # two to warm up: compilers, and the allocator
        if step == 2:
            memory(device, reset=True)
        synchronize(device)
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    speed = batch * length / statistics.median(seconds[2:])
    return Cost(
        tokens_per_second=speed, peak_gb=memory(device)[1], weights_gb=weights_gb, loss=float(loss.detach())
    )


def memory(device: torch.device, *, reset: bool = False) -> tuple[float, float]:
    """GB allocated now, and at most since the last reset; nan where torch does not count (CPU)."""
    if device.type != "cuda":
        return float("nan"), float("nan")
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 1e9, torch.cuda.max_memory_allocated() / 1e9


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    read = argparse.ArgumentParser()
    read.add_argument("--kinds", nargs="+", default=["Q4_K"])
    read.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    read.add_argument("--layers", type=int, default=0)
    read.add_argument("--length", type=int, default=0)
    read.add_argument("--steps", type=int, default=5)
    read.add_argument("--tiny", action="store_true")
    given = read.parse_args()
    logging.basicConfig(level=logging.WARNING)
    shape = dict(TINY if given.tiny else BIG)
    whole = shape["num_hidden_layers"]
    shape["num_hidden_layers"] = given.layers or whole
    length = given.length or (64 if given.tiny else 2048)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.tiny:
        raise SystemExit("this needs a CUDA GPU; --tiny runs anywhere")

    arms: dict[str, Pack] = {"NF4": nf4} | {kind: grid(kind) for kind in given.kinds}
    found: dict[tuple[str, int], Cost] = {}
    for name, pack in arms.items():
        model = model_of(shape, pack, device)
        for batch in given.batches:
            found[name, batch] = measure(model, batch=batch, length=length, steps=given.steps, device=device)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    machine = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    print(f"{machine}, torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}, peft {peft.__version__}; "
          f"hidden {shape['hidden_size']}, {shape['num_hidden_layers']} of {whole} layers, {length} tokens a row, "
          f"LoRA rank 16, gradient checkpointing, median of {given.steps} steps")  # fmt: skip
    print("| base | batch | tokens/s | against NF4 | peak GB | against NF4 | before the step GB | loss |")
    print("|---|---|---|---|---|---|---|---|")
    for (name, batch), cost in found.items():
        nf = found["NF4", batch]
        print(f"| {name} | {batch} | {cost.tokens_per_second:,.0f} | {cost.tokens_per_second / nf.tokens_per_second:.3f} "
              f"| {cost.peak_gb:.2f} | {cost.peak_gb / nf.peak_gb:.3f} | {cost.weights_gb:.2f} | {cost.loss:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
