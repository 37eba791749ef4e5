"""How much memory llama-server takes on a board, part by part, and the largest thing that would still fit.

Compared with llama.cpp's own report for eleven families of shapes by benchmarks/memory_prediction.py: KV cache and compute
buffer to 0.1 %, weights to 1.3 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgeft.errors import RecipeError
from edgeft.fit import scratch
from edgeft.fit.board import Board
from edgeft.fit.mixture import BLOCKS
from edgeft.fit.quant import Placed, place, row_bytes
from edgeft.fit.scratch import Batch
from edgeft.fit.shape import ModelShape

KV_TYPES = {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
OFFERED = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M")
"""What a refusal may offer instead. Below three bits a small model is hardly itself any more."""
UBATCH = 512
"""Tokens llama.cpp computes at once while it reads a prompt (its default)."""
_CELLS = 256
"""A KV cache is a multiple of this (llama-context.cpp)."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How the model is served; what of it costs memory."""

    context: int
    """Tokens of one conversation."""
    kv_type: str = "f16"
    parallel: int = 1
    mmap: bool = False
    """Map the file instead of reading it: then weights that are repacked lie in memory twice."""
    prompt_cache_mb: int = 0
    """What the server may keep of earlier conversations (`--cache-ram`; its own default is 8 GiB)."""
    checkpoints: int = 2
    """Copies of the windowed layers' cache that the server keeps a conversation, so that an answer can be asked for again
    (`--ctx-checkpoints` of bundle/launch.py; its own default is 32). Models without windows have none."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """Predicted memory in MB, by part."""

    weights: float
    repacked: float
    """Second copies: repacked weights beside a mapped file, and a tied output beside its embedding."""
    kv_cache: float
    compute: float
    runtime: float
    """The server process, the vocabulary, and the prompt cache it is allowed."""
    adapter: float = 0.0
    """An adapter that is loaded beside the weights."""
    checkpoints: float = 0.0
    """Copies of the windowed layers' cache, once a conversation has had enough turns to fill their number."""

    @property
    def total(self) -> float:
        parts = (
            self.weights,
            self.repacked,
            self.kv_cache,
            self.compute,
            self.runtime,
            self.adapter,
            self.checkpoints,
        )
        return sum(parts)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The verdict for one model, quantization and way of serving on one board."""

    board: Board
    label: str
    serving: Serving
    need: Need
    available_mb: int

    @property
    def fits(self) -> bool:
        return self.need.total <= self.available_mb


@dataclass(frozen=True, kw_only=True)
class Largest:
    """What would fit: each with everything else unchanged."""

    context: int
    """The longest context for this quantization; 0 when not even the shortest fits."""
    label: str
    """The largest quantization at this context; empty when none fits."""
    smaller: tuple[str, int]
    """The largest quantization at the shortest context, and that context's largest; ("", 0) when none."""


def fits(shape: ModelShape, label: str, serving: Serving, board: Board, *, adapter_mb: float = 0.0) -> Fit:
    """Whether a model fits a board. Raises RecipeError for an unknown quantization or KV type."""
    need = predict(shape, label, serving, board, adapter_mb=adapter_mb)
    return Fit(board=board, label=label, serving=serving, need=need, available_mb=board.available_mb)


def predict(
    shape: ModelShape, label: str, serving: Serving, board: Board, *, adapter_mb: float = 0.0
) -> Need:
    """The memory llama-server takes, in the memory that has to hold the model. `adapter_mb`: of an adapter beside it.

    Raises RecipeError for an unknown quantization or KV type.
    """
    placed = place(shape, label)
    weights = sum(p.bytes for p in placed) + 4 * shape.vectors
    if board.vram_mb and not shape.tied:
        # llama.cpp leaves the input embedding in main memory; a tied one is copied to the card as the output
        weights -= sum(p.bytes for p in placed if p.matrix.role == "token_embd")
    return Need(
        weights=weights / 1e6,
        repacked=_copies(shape, placed, serving, board) / 1e6,
        kv_cache=kv_bytes(shape, serving) / 1e6,
        compute=compute_bytes(shape, serving) / 1e6,
        runtime=_runtime(shape, serving, board) / 1e6,
        adapter=adapter_mb,
        checkpoints=0 if board.vram_mb else checkpoint_bytes(shape, serving) / 1e6,
    )


def kv_bytes(shape: ModelShape, serving: Serving) -> int:
    """2 · layers · kv_heads · head_dim · cells · bytes, one row of every layer a cell (llama-kv-cache.cpp).

    A windowed layer keeps its window and one batch instead of the whole context (llama-kv-cache-iswa.cpp).
    """
    if serving.kv_type not in KV_TYPES:
        raise RecipeError(
            f"the KV cache type {serving.kv_type!r} is not known", hint=f"choose from {', '.join(KV_TYPES)}"
        )
    kind = KV_TYPES[serving.kv_type]
    width = shape.kv_heads * shape.head_dim
    if width % BLOCKS[kind][0]:
        raise RecipeError(
            f"a KV cache of type {serving.kv_type} needs rows of a multiple of 32; this model has {width}",
            hint='use kv_type = "f16"',
        )
    cells, windowed = _cells(shape, serving)
    rows = (shape.layers - shape.window_layers) * cells + shape.window_layers * windowed
    return 2 * rows * row_bytes(kind, width) * serving.parallel


def checkpoint_bytes(shape: ModelShape, serving: Serving) -> int:
    """What the server keeps so that an answer can be asked for again: the windows' cache, once a checkpoint.

    In main memory, whatever `--cache-ram` says (server-context.cpp, create_checkpoint): 5.006 MiB each were logged for ten
    windowed layers of 512 tokens, and this gives 5.000.
    """
    tokens = min(shape.sliding_window, serving.context) * shape.window_layers
    row = row_bytes(KV_TYPES[serving.kv_type], shape.kv_heads * shape.head_dim)
    return 2 * tokens * row * serving.checkpoints * serving.parallel


def compute_bytes(shape: ModelShape, serving: Serving) -> int:
    """The scratch buffer for one batch of a prompt, and the buffer that logits are handed out in.

    The server asks for the logits of one token a conversation (server-context.cpp: n_outputs_max), so a large
    vocabulary costs little here; other programs reserve 512 rows of it. Each conversation's part of a batch looks only
    at its own cells, so the mask does not grow with their number.
    """
    cells, windowed = _cells(shape, serving)
    kinds = (cells,) if shape.window_layers < shape.layers else ()
    batch = Batch(
        tokens=min(UBATCH, cells * serving.parallel), outputs=serving.parallel,
        masks=(*kinds, windowed) if shape.window_layers else kinds, rotated=serving.kv_type != "f16",
    )  # fmt: skip
    return scratch.compute_bytes(shape, batch) + 4 * shape.vocab * serving.parallel


def repackable(kind: str, rows: int, board: Board) -> bool:
    """Whether llama.cpp copies a tensor into another layout for this processor.

    ggml/src/ggml-cpu/repack.cpp: ggml_repack_get_optimal_repack_type. A GPU has no use for it.
    """
    has = board.features
    if board.vram_mb:
        return False
    if "avx2" in has:
        return rows % 8 == 0 and (kind in ("Q4_0", "Q4_K", "IQ4_NL") or (kind == "Q2_K" and "avx512" in has))
    if "dotprod" in has or "i8mm" in has:
        if kind == "IQ4_NL":
            return "dotprod" in has and rows % 4 == 0
        return (kind in ("Q4_0", "Q8_0") and rows % 4 == 0) or (
            kind in ("Q4_K", "Q5_K", "Q6_K") and rows % 8 == 0
        )
    return False


def largest_that_fits(
    shape: ModelShape, label: str, serving: Serving, board: Board, labels: Sequence[str] = OFFERED, *,
    adapter_mb: float = 0.0,
) -> Largest:  # fmt: skip
    """The longest context for this quantization, and the largest quantization (of `labels`) at this context."""
    needs = {name: predict(shape, name, serving, board, adapter_mb=adapter_mb) for name in {*labels, label}}
    fixed = {name: _fixed(need) for name, need in needs.items()}
    by_size = sorted(labels, key=lambda name: -needs[name].weights)
    shortest = replace(serving, context=min(serving.context, 512))

    def first(way: Serving) -> str:
        room = board.available_mb - _growing(shape, way, board)
        return next((name for name in by_size if fixed[name] <= room), "")

    small = first(shortest)
    return Largest(
        context=_longest(shape, fixed[label], serving, board),
        label=first(serving),
        smaller=(small, _longest(shape, fixed[small], serving, board) if small else 0),
    )


def longest_context(
    shape: ModelShape, label: str, serving: Serving, board: Board, *, adapter_mb: float = 0.0
) -> int:  # fmt: skip
    """The longest context in steps of 256 that fits with everything else unchanged, never above the trained one."""
    need = predict(shape, label, serving, board, adapter_mb=adapter_mb)
    return _longest(shape, _fixed(need), serving, board)


def refusal(shape: ModelShape, fit: Fit) -> tuple[str, str]:
    """The sentence that refuses a model, and the hint with the largest that would fit."""
    s, need, board = fit.serving, fit.need, fit.board
    slots = f" for each of {s.parallel} conversations" if s.parallel > 1 else ""
    parts = ", ".join(f"{n} {_size(v)}" for n, v in (
        ("weights", need.weights), ("repacked copies", need.repacked), ("adapter", need.adapter),
        ("KV cache", need.kv_cache), ("its copies", need.checkpoints), ("buffers", need.compute), ("server", need.runtime),
    ) if v >= 0.5)  # fmt: skip
    about = "" if shape.exact else f" (estimated: {shape.architecture or 'this architecture'} is not known)"
    message = (
        f"{fit.label} with a context of {s.context}{slots} (KV {s.kv_type}) needs {_size(need.total)} of "
        f"{board.memory} ({parts}){about}; {board.name} leaves {_size(fit.available_mb)} for a model"
    )
    best = largest_that_fits(shape, fit.label, s, board, adapter_mb=need.adapter)
    options = []
    if best.context:
        options.append(f"{fit.label} with a context of {best.context}")
    if best.label:
        options.append(f"{best.label} with a context of {s.context}")
    if not options and best.smaller[0]:
        options.append(f"{best.smaller[0]} with a context of {best.smaller[1]}")
    if not options:
        return (
            message,
            "no quantization of three bits or more fits there: take a smaller base or a larger target",
        )
    return message, f"what would fit: {', or '.join(options)}"


def _copies(shape: ModelShape, placed: Sequence[Placed], serving: Serving, board: Board) -> int:
    """Bytes that lie in memory a second time (llama-model-loader.cpp: create_tensor).

    An embedding is looked up by row, which the repacked layout cannot do, so a tied one is kept in both.
    """
    copies = 0
    for p in placed:
        if not repackable(p.type, p.matrix.rows, board):
            continue
        if p.matrix.role == "token_embd":
            copies += p.bytes if shape.tied else 0
        elif serving.mmap:
            copies += p.bytes
    return copies


def _runtime(shape: ModelShape, serving: Serving, board: Board) -> float:
    """30 MB for the process, its threads and what requests leave, 400 bytes a token of vocabulary.

    Measured peaks less what llama.cpp reports: 39 MB with SmolLM2's 49,152 tokens, where this gives 50; 28 to 53 MB with
    made-up vocabularies of 32,000 to 131,072, where it gives 43 to 82 (benchmarks/memory_prediction.py).
    On a card this lies in main memory; what the card itself loses is the target's vram_reserve_mb.
    """
    return 0 if board.vram_mb else 30e6 + 400 * shape.vocab + serving.prompt_cache_mb * 1e6


def _longest(shape: ModelShape, fixed_mb: float, serving: Serving, board: Board) -> int:
    """The longest context in steps of 256 that fits, never above the trained one; 0 when none does."""
    low, high = 0, (shape.context_length or 131072) // _CELLS
    while low < high:
        middle = (low + high + 1) // 2
        if fixed_mb + _growing(shape, replace(serving, context=middle * _CELLS), board) <= board.available_mb:
            low = middle
        else:
            high = middle - 1
    return low * _CELLS


def _fixed(need: Need) -> float:
    """MB of what does not depend on the context."""
    return need.total - need.kv_cache - need.compute - need.checkpoints


def _growing(shape: ModelShape, serving: Serving, board: Board) -> float:
    """MB of what grows with the context."""
    copies = 0 if board.vram_mb else checkpoint_bytes(shape, serving)
    return (kv_bytes(shape, serving) + compute_bytes(shape, serving) + copies) / 1e6


def _cells(shape: ModelShape, serving: Serving) -> tuple[int, int]:
    """Cells of one conversation in a layer that sees all of it, and in one that sees a window of it."""
    cells = _padded(serving.context)
    return cells, min(cells, _padded(shape.sliding_window + UBATCH)) if shape.sliding_window else cells


def _padded(tokens: int) -> int:
    return -(-tokens // _CELLS) * _CELLS


def _size(mb: float) -> str:
    return f"{mb / 1000:.1f} GB" if mb >= 1000 else f"{mb:.0f} MB"
