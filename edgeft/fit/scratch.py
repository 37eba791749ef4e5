"""llama.cpp's compute buffer: the scratch memory for one batch of a prompt, found as ggml finds it.

ggml walks the graph once before anything runs and gives each intermediate tensor a place in one buffer: into the best
fitting gap, or over an operand that nobody needs any more. The largest extent is the buffer (ggml/src/ggml-alloc.c). How
gaps fit decides about up to a fifth of it, which no closed formula of the widths gives, so the walk is done here over the
same graph: three layers, since the ones between repeat. Compared with llama.cpp by benchmarks/memory_prediction.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from edgeft.fit.shape import ModelShape

_ALIGN = 64
"""ggml-backend.cpp, TENSOR_ALIGNMENT."""
_UNGATED = {"gpt2", "gpt_neox", "gptneox", "bloom"}
"""Layer norms, biases everywhere, and a feed-forward without a gate."""
_POST_NORMED = {"gemma2", "gemma3", "gemma3_text"}
"""A norm behind attention and feed-forward too, and queries scaled after their rotation: no buffer more, all in place."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What of the way a model is served decides about the graph."""

    tokens: int
    """Tokens of one batch."""
    outputs: int
    """Tokens of it whose logits are wanted: one a conversation (server-context.cpp, n_outputs_max)."""
    masks: tuple[int, ...]
    """Cells of the KV cache that a token of the batch looks at: one mask a kind of layer."""
    rotated: bool
    """A quantized KV cache: queries, keys and values are turned by a Hadamard matrix (llama-kv-cache.cpp, attn_rot_k)."""


def compute_bytes(shape: ModelShape, batch: Batch) -> int:
    """Bytes of the compute buffer on a CPU, with flash attention, which is on by default."""
    graph = _Graph()
    _model(graph, shape, batch)
    return _extent(graph)


@dataclass(frozen=True, kw_only=True)
class _Node:
    bytes: int
    sources: tuple[int, ...] = ()
    over: bool = False
    """May take the place of an operand of the same size that nobody needs any more (ggml_op_can_inplace)."""


@dataclass
class _Graph:
    """Tensors in the order of their computation. Weights and the KV cache are elsewhere and do not appear."""

    nodes: list[_Node] = field(default_factory=list)
    inputs: int = 0
    """The first so many are given: they have their places before the walk begins."""

    def new(self, size: int, *sources: int) -> int:
        self.nodes.append(_Node(bytes=size, sources=sources))
        return len(self.nodes) - 1

    def over(self, size: int, *sources: int) -> int:
        self.nodes.append(_Node(bytes=size, sources=sources, over=True))
        return len(self.nodes) - 1


def _extent(graph: _Graph) -> int:
    """The highest byte in use during the walk (ggml_gallocr_alloc_graph_impl)."""
    left = [0] * len(graph.nodes)
    for node in graph.nodes:
        for source in node.sources:
            left[source] += 1
    places = _Places()
    at: dict[int, int] = {}
    size = [-(-node.bytes // _ALIGN) * _ALIGN for node in graph.nodes]
    for i in range(graph.inputs):
        at[i] = places.take(size[i])
    for i, node in enumerate(graph.nodes):
        if i >= graph.inputs:
            heir = [s for s in node.sources if node.over and s in at and left[s] == 1 and size[s] == size[i]]
            at[i] = at.pop(heir[0]) if heir else places.take(size[i])
        for source in node.sources:
            left[source] -= 1
            if not left[source] and source in at:
                places.give(at.pop(source), size[source])
    return places.highest


class _Places:
    """Free gaps of a buffer that may grow at its end: the best fitting gap is taken, else the end (ggml_dyn_tallocr)."""

    def __init__(self) -> None:
        self.gaps: list[tuple[int, int]] = []
        self.end = self.highest = 0

    def take(self, size: int) -> int:
        fitting = [gap for gap in self.gaps if gap[1] >= size]
        if not fitting:
            start, self.end = self.end, self.end + size
            self.highest = max(self.highest, self.end)
            return start
        # of equal ones ggml takes the last
        start, room = min(fitting, key=lambda gap: (gap[1], -gap[0]))
        self.gaps.remove((start, room))
        if room > size:
            self.gaps.append((start + size, room - size))
        return start

    def give(self, start: int, size: int) -> None:
        for gap in [g for g in self.gaps if g[0] + g[1] == start or start + size == g[0]]:
            self.gaps.remove(gap)
            start, size = min(start, gap[0]), size + gap[1]
        if start + size == self.end:
            self.end = start
        else:
            self.gaps.append((start, size))


def _model(g: _Graph, shape: ModelShape, batch: Batch) -> None:
    """The whole graph, of three layers at most; the last one computes only the tokens whose logits are wanted."""
    t, wide = batch.tokens, 4 * shape.hidden
    g.new(4 * t)  # token ids
    instead = g.new(
        wide * t
    )  # vectors instead of ids, for pictures: always in the graph (llm_graph_input_embd)
    positions = g.new(4 * t)
    kinds: list[_Kind] = []
    for cells in batch.masks:
        rotations: tuple[int, ...] = ()
        indices = g.new(8 * t), g.new(8 * t)
        mask = g.new(2 * t * cells)
        if batch.rotated and shape.head_dim % 64 == 0:
            side = shape.head_dim & -shape.head_dim  # its largest power of two; 64 for values
            rotations = g.new(4 * side * side), g.new(4 * 64 * 64)
        kinds.append((mask, indices, rotations))
    wanted = g.new(4 * batch.outputs)
    g.inputs = len(g.nodes)
    stream = g.new(wide * t, 0)
    layers = min(shape.layers, 3)
    for i in range(layers):
        stream = _layer(
            g, shape, stream, t, kinds[i % len(kinds)], positions,
            wanted=wanted if i == layers - 1 else None, outputs=batch.outputs,
        )  # fmt: skip
    last = _norm(g, shape, stream, wide * batch.outputs)
    g.new(4 * shape.vocab * batch.outputs, last)
    for mask, indices, rotations in kinds:  # inputs keep their place to the end
        g.new(0, mask, *indices, *rotations)
    g.new(0, instead)


_Kind = tuple[int, tuple[int, int], tuple[int, ...]]
"""Mask, cells to write to, and rotations of one kind of layer."""


def _layer(
    g: _Graph, shape: ModelShape, stream: int, t: int, kind: _Kind, positions: int, *, wanted: int | None, outputs: int
) -> int:  # fmt: skip
    """One layer: attention, then the feed-forward, each added to the stream (src/models/*.cpp)."""
    wide = 4 * shape.hidden
    normed = _norm(g, shape, stream, wide * t)
    out = _attention(g, shape, normed, t, kind, positions)
    if shape.architecture in _POST_NORMED:
        out = _norm(g, shape, out, wide * t)
    rows = t
    if wanted is not None:
        rows = outputs
        out, stream = g.new(wide * rows, out, wanted), g.new(wide * rows, stream, wanted)
    stream = g.over(wide * rows, out, stream)
    normed = _norm(g, shape, stream, wide * rows)
    out = _experts(g, shape, normed, rows) if shape.n_experts else _feed(g, shape, normed, rows)
    if shape.architecture in _POST_NORMED:
        out = _norm(g, shape, out, wide * rows)
    return g.over(wide * rows, out, stream)


def _norm(g: _Graph, shape: ModelShape, source: int, size: int) -> int:
    """An RMS norm may overwrite its operand, a layer norm may not; the products with the weights overwrite."""
    first = g.new(size, source) if shape.architecture in _UNGATED else g.over(size, source)
    return g.over(size, first)


def _attention(g: _Graph, shape: ModelShape, normed: int, t: int, kind: _Kind, positions: int) -> int:
    mask, indices, rotations = kind
    wide, queries, keys = (
        4 * shape.hidden,
        4 * shape.heads * shape.head_dim,
        4 * shape.kv_heads * shape.head_dim,
    )
    if any(m.role == "attn_qkv" for m in shape.matrices[:8]):
        fused = g.new((queries + 2 * keys) * t, normed)
        if shape.architecture in _UNGATED:
            fused = g.over((queries + 2 * keys) * t, fused)
        q, k, v = g.new(queries * t, fused, positions), g.new(keys * t, fused, positions), fused
    else:
        q = g.new(queries * t, g.new(queries * t, normed), positions)
        if rotations:
            q = g.new(queries * t, q, rotations[0])
        if shape.architecture in _POST_NORMED:  # these compute keys before values
            k, v = _keys(g, keys * t, normed, positions, rotations), _values(g, keys * t, normed, rotations)
        else:
            v, k = _values(g, keys * t, normed, rotations), _keys(g, keys * t, normed, positions, rotations)
    g.new(0, k, indices[0])  # into the cache
    g.new(0, v, indices[1])
    said = g.new(queries * t, q, mask)
    if rotations:
        said = g.new(queries * t, said, rotations[1])
    out = g.new(wide * t, said)
    return g.over(wide * t, out) if shape.architecture in _UNGATED else out


def _keys(g: _Graph, size: int, normed: int, positions: int, rotations: tuple[int, ...]) -> int:
    """Turned by their positions into a new tensor, since ggml never overwrites what it sees as a view."""
    k = g.new(size, g.new(size, normed), positions)
    return g.new(size, k, rotations[0]) if rotations else k


def _values(g: _Graph, size: int, normed: int, rotations: tuple[int, ...]) -> int:
    v = g.new(size, normed)
    return g.new(size, v, rotations[1]) if rotations else v


def _feed(g: _Graph, shape: ModelShape, normed: int, rows: int) -> int:
    wide, ffn = 4 * shape.hidden * rows, 4 * shape.ffn * rows
    roles = {m.role: m.rows for m in shape.matrices if m.layer == 0}
    if "ffn_gate" in roles:
        gate, up = g.new(ffn, normed), g.new(ffn, normed)
        return g.new(wide, g.new(ffn, gate, up))
    if roles.get("ffn_up") == 2 * shape.ffn:  # gate and up in one matrix
        return g.new(wide, g.new(ffn, g.new(2 * ffn, normed)))
    up = g.over(ffn, g.over(ffn, g.new(ffn, normed)))  # bias, then the activation
    return g.over(wide, g.new(wide, up))


def _experts(g: _Graph, shape: ModelShape, normed: int, rows: int) -> int:
    """llama-graph.cpp, build_moe_ffn: the chosen experts of every token side by side, then their weighted sum."""
    used = shape.experts_used
    ffn = next(m.rows for m in shape.matrices if m.role == "ffn_up_exps") * used * 4 * rows
    wide, few = 4 * shape.hidden * rows, 4 * used * rows
    scores = g.over(4 * shape.n_experts * rows, g.new(4 * shape.n_experts * rows, normed))
    order = g.new(4 * shape.n_experts * rows, scores)
    weights = g.new(few, scores, order)
    share = g.over(few, weights, g.over(4 * rows, g.new(4 * rows, weights)))
    gate, up = g.new(ffn, normed, order), g.new(ffn, normed, order)
    down = g.new(wide * used, g.new(ffn, gate, up), order)
    weighted = g.over(wide * used, down, share)
    total = g.new(wide, weighted)
    for _ in range(used - 2):
        total = g.over(wide, total, weighted)
    return total
