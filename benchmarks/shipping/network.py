"""The model under test: its linear layers can be swapped, adapted, or trained through the rounding of blocks.

Weights are quantized by ggml's own functions with an importance matrix, tensor types chosen by llama.cpp's rules for the
label (`edgeft.fit`), so that mode A is what llama-quantize makes. Embeddings and output layer stay in float32 in every
mode: they are the same for all.
"""

from __future__ import annotations

import ctypes
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.functional import linear

from edgeft.fit import quant, shape
from edgeft.grid import formats, rounding

ROLES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
NUMBERS = {
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
    "IQ4_NL": 20, "IQ4_XS": 23,
}  # fmt: skip
"""enum ggml_type of ggml.h."""


class Layer(torch.nn.Module):
    """A frozen linear layer: as it is, with an adapter added, or with the sum rounded to blocks."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.way, self.energy = plain.weight.data, "plain", None
        self.a = self.b = self.t = None
        self.scaling = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "watched":
            energy = x.detach().float().flatten(0, -2).square().sum(0)
            self.energy = energy if self.energy is None else self.energy + energy
        if self.way == "adapted":
            return linear(x, self.weight) + linear(linear(x, self.a), self.b) * self.scaling
        return linear(x, self.rounded() if self.way == "rounded" else self.weight)

    def fresh_adapter(self, rank: int, rng: torch.Generator) -> list[torch.Tensor]:
        rows, columns = self.weight.shape
        self.a = (torch.randn(rank, columns, generator=rng) / math.sqrt(columns)).to(self.weight.device)
        self.b = torch.zeros(rows, rank, device=self.weight.device)
        self.scaling = 2.0
        return [self.a, self.b]

    def through(self, packed: torch.Tensor, kind: str, *, learn: bool) -> list[torch.Tensor]:
        """Round to these blocks from now on."""
        self.format = formats.of(kind)
        self.blocks = packed.reshape(-1, self.format.bytes)
        self.fields = self.format.rounding.fields(self.blocks)
        self.t = torch.zeros_like(self.fields) if learn else None
        return [self.t] if learn else []

    def rounded(self) -> torch.Tensor:
        fields = self.fields if self.t is None else rounding.half(self.fields * self.t.exp())
        scale, offset = self.format.rounding.scales(self.blocks, fields)
        return rounding.through(
            self.weight, self.a, self.b, self.scaling, scale, offset, self.format.rounding, torch.float32
        )


class Network:
    """The whole model on one device."""

    def __init__(self, folder: Path, ggml: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = transformers.AutoConfig.from_pretrained(folder / "config.json")
        self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model.load_state_dict({k: v.float() for k, v in torch.load(folder / "state.pt").items()})
        self.model.to(self.device).eval().requires_grad_(False)
        self.layers: dict[str, Layer] = {}
        for name, module in list(self.model.named_modules()):
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                above, _, leaf = name.rpartition(".")
                self.layers[name] = Layer(module)
                setattr(self.model.get_submodule(above), leaf, self.layers[name])
        self.base = {name: layer.weight for name, layer in self.layers.items()}
        self._shape = shape.from_config(config.to_dict())
        self._quantize = ctypes.CDLL(ggml).ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        self._quantize.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p,
        ]  # fmt: skip

    def use(self, weights: dict[str, torch.Tensor], way: str = "plain") -> None:
        for name, layer in self.layers.items():
            layer.weight, layer.way = weights[name], way

    def kinds(self, label: str) -> dict[str, str]:
        """The block type of every layer under a label."""
        placed = quant.place(self._shape, label, imatrix=True)
        of = {(p.matrix.layer, p.matrix.role): p.type for p in placed}
        return {n: of[int(n.split(".")[2]), ROLES[".".join(n.split(".")[3:])]] for n in self.layers}

    @torch.no_grad()
    def imatrix(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sums of squared inputs of every layer, for the weights in use."""
        for layer in self.layers.values():
            layer.energy, layer.way = None, "watched"
        for part in tokens.to(self.device).split(8):
            self.model(input_ids=part)
        for layer in self.layers.values():
            layer.way = "plain"
        return {name: layer.energy for name, layer in self.layers.items()}

    def quantized(self, weights: Any, label: str, imatrix: Any) -> dict[str, torch.Tensor]:
        """Packed rows, uint8 [out, row bytes]."""
        kinds = self.kinds(label)

        def one(name: str) -> torch.Tensor:
            numbers = np.ascontiguousarray(weights[name].float().cpu().numpy())
            energy = np.ascontiguousarray(imatrix[name].float().cpu().numpy())
            format, (rows, columns) = formats.of(kinds[name]), numbers.shape
            out = np.zeros((rows, columns // format.block * format.bytes), np.uint8)
            written = self._quantize(
                NUMBERS[kinds[name]],
                numbers.ctypes.data,
                out.ctypes.data,
                0,
                rows,
                columns,
                energy.ctypes.data,
            )
            assert written == out.size, (name, written, out.size)
            return torch.from_numpy(out).to(self.device)

        with ThreadPoolExecutor(max(4, (os.cpu_count() or 4) // 4)) as pool:
            return dict(zip(self.layers, pool.map(one, self.layers), strict=True))

    def dequantized(self, packed: dict[str, torch.Tensor], label: str) -> dict[str, torch.Tensor]:
        kinds = self.kinds(label)
        return {
            name: formats.of(kinds[name]).dequantize(rows.reshape(-1, formats.of(kinds[name]).bytes)).reshape(self.base[name].shape)
            for name, rows in packed.items()
        }  # fmt: skip

    def merged(self, start: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The base with an adapter of rank r folded in: start holds a, b by layer, and the scaling."""
        return {n: w + (start["b"][n] @ start["a"][n]) * start["scaling"] for n, w in self.base.items()}

    @torch.no_grad()
    def losses(
        self, tokens: torch.Tensor, against: list[torch.Tensor] | None = None, keep: bool = False
    ) -> Any:
        """Per scored token (the second half of each chunk), in float32: nats [chunks, tokens], the KL divergence from
        `against` in the same shape or None, and the log-probabilities if they are to be kept."""
        half, nll, kld, kept = tokens.shape[1] // 2, [], [], []
        for i, part in enumerate(tokens.to(self.device).split(10)):
            said = torch.log_softmax(self.model(input_ids=part).logits[:, half - 1 : -1].float(), -1)
            nll.append(-said.gather(2, part[:, half:, None])[..., 0])
            if against is not None:
                other = against[i].to(self.device).float()
                kld.append((other.exp() * (other - said)).sum(-1))
            if keep:
                kept.append(said.half().cpu())
        return torch.cat(nll).cpu().numpy(), torch.cat(kld).cpu().numpy() if kld else None, kept
