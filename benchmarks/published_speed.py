"""Published tokens a second against the speed law, board by board.

    python benchmarks/published_speed.py

For each point: what the target's bandwidth predicts (lowest and highest), how far the middle of it is off, and, where a
kind of board has three points or more, how far a prediction from the *other* points alone is off. The targets' bandwidths
were derived from such points, so the second is the fair number. Sizes of models as their configurations on the hub state.
LFM2, which the first Pi 5 figures were published for, is no plain decoder and not in the list.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from edgeft.fit.board import Board
from edgeft.fit.shape import from_config
from edgeft.fit.speed import decode, read_bytes
from edgeft.recipe import load
from edgeft.resources import folder


def _config(
    family: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, *, tied: bool = False, **more: int
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": family, "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": ffn, "vocab_size": vocab, "tie_word_embeddings": tied, **more,
    }  # fmt: skip


MODELS = {
    "SmolLM2-135M": _config("llama", 30, 576, 9, 3, 1536, 49152, tied=True),
    "TinyLlama-1.1B": _config("llama", 22, 2048, 32, 4, 5632, 32000),
    "Qwen-1.8B": _config("qwen2", 24, 2048, 16, 16, 5504, 151936),
    "Gemma-2B": _config("gemma", 18, 2048, 8, 1, 16384, 256000, tied=True, head_dim=256),
    "Llama-3.2-3B": _config("llama", 28, 3072, 24, 8, 8192, 128256, tied=True, head_dim=128),
    "Llama-3.1-8B": _config("llama", 32, 4096, 32, 8, 14336, 128256),
    "DeepSeek-R1-14B": _config("qwen2", 48, 5120, 40, 8, 13824, 152064),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One published speed of answering, in tokens a second."""

    target: str
    kind: str
    """Boards of one kind share their bandwidth."""
    model: str
    label: str
    speed: float
    source: str


def _point(target: str, kind: str, model: str, label: str, speed: float, source: str) -> Point:
    return Point(target=target, kind=kind, model=model, label=label, speed=speed, source=source)


GEERLING = "geerlingguy/ai-benchmarks"
POINTS = (
    _point("pi-5-16gb", "Pi 5", "Llama-3.2-3B", "Q4_K_M", 5.55, f"{GEERLING}, Pi 500+"),
    _point("pi-5-16gb", "Pi 5", "Llama-3.2-3B", "Q4_K_M", 4.88, GEERLING),
    _point("pi-5-8gb", "Pi 5", "Llama-3.2-3B", "Q4_K_M", 4.61, f"{GEERLING}, an early set-up"),
    _point("pi-5-16gb", "Pi 5", "DeepSeek-R1-14B", "Q4_K_M", 1.20, GEERLING),
    _point("pi-5-8gb", "Pi 5", "TinyLlama-1.1B", "Q8_0", 9.0, "llamafile 0.7, of 2024"),
    _point("pi-4-8gb", "Pi 4", "Llama-3.2-3B", "Q4_K_M", 1.60, f"{GEERLING}, Pi 400"),
    _point("pi-4-8gb", "Pi 4", "TinyLlama-1.1B", "Q8_0", 3.0, "llamafile 0.7"),
    _point("pi-4-8gb", "Pi 4", "Qwen-1.8B", "Q4_0", 3.05, "aidatatools/ollama-benchmark PR 9"),
    _point("pi-4-8gb", "Pi 4", "Gemma-2B", "Q4_0", 1.84, "aidatatools/ollama-benchmark PR 9"),
    _point("n100-mini-pc", "N100, N150", "Llama-3.1-8B", "Q4_K_M", 3.0, "normiebench 38, N100"),
    _point("n100-mini-pc", "N100, N150", "Llama-3.2-3B", "Q4_K_M", 9.06, f"{GEERLING}, N150"),
    _point("n100-mini-pc", "N100, N150", "DeepSeek-R1-14B", "Q4_K_M", 2.13, f"{GEERLING}, N150"),
    _point("rtx-3060-box", "RTX 3060", "Llama-3.2-3B", "Q4_K_M", 122.9, f"{GEERLING} 40"),
    _point("rtx-3060-box", "RTX 3060", "DeepSeek-R1-14B", "Q4_K_M", 29.8, f"{GEERLING} 40"),
    _point("jetson-orin-nano-8gb", "Orin Nano", "SmolLM2-135M", "Q4_K_S", 165.0, "smolhub, 25 W"),
)


def board(name: str) -> Board:
    """The board of a target that ships."""
    rows = load(folder("targets") / f"{name}.toml", per_target=True).rows
    params: Any = next(p for s, p in rows if s.name == "device")
    found: Board = params.board()
    return found


def bandwidth(point: Point) -> float:
    """GB/s that a point's speed amounts to, after the board's overhead a token."""
    seconds = 1 / point.speed - board(point.target).token_overhead_ms / 1e3
    return read_bytes(from_config(MODELS[point.model]), point.label) / 1e9 / seconds


def errors(point: Point) -> tuple[float, float, float, float | None]:
    """Lowest and highest prediction, how far their middle is off in %, and a prediction from the other points alone."""
    shape = from_config(MODELS[point.model])
    found = decode(shape, point.label, board(point.target))
    middle = 100 * ((found.low * found.high) ** 0.5 / point.speed - 1)
    others = [bandwidth(p) for p in POINTS if p.kind == point.kind and p is not point]
    if len(others) < 2:
        return found.low, found.high, middle, None
    return found.low, found.high, middle, 100 * (fmean(others) / bandwidth(point) - 1)


def main() -> None:
    print(
        "| board | model, file | published | predicted | middle | from the others | source |\n|---|---|---|---|---|---|---|"
    )
    for point in POINTS:
        low, high, middle, blind = errors(point)
        alone = "" if blind is None else f"{blind:+.0f} %"
        print(
            f"| {point.kind} | {point.model} {point.label} | {point.speed:g} | {low:.3g}-{high:.3g} | {middle:+.0f} % | "
            f"{alone} | {point.source} |"
        )


if __name__ == "__main__":
    main()
