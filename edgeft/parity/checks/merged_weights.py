"""Is a merged checkpoint the base plus the adapter? Every tensor, computed again from what PEFT publishes.

W' = W + scale · B A, with scale = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (peft/tuners/lora/layer.py,
`get_delta_weight`). Nothing of edgeft's own merge is used: two programs must agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from edgeft.parity.checks.check import Check
from edgeft.parity.checks.lora import Change, UnknownAdapter, bind, read
from edgeft.parity.checks.merge_faults import UNIT, Found, measure, same_bytes
from edgeft.parity.checks.tensors import Stored, config, in_checkpoint

F16_MAX = 65504.0
HEADS = ("lm_head.weight", "embed_out.weight", "output_layer.weight")
"""How the output layer's weight ends in the checkpoints of the families that edgeft trains."""
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")

Tensors = Mapping[str, Stored]


def merged(base: Path, adapter: Path, merged: Path) -> list[Check]:
    """Check a merged checkpoint against `base` (the weights it was merged into) and a PEFT LoRA `adapter`.

    Reads everything once, a block at a time. The checks: plain weights (C-41), tensor list (C-34), tied embeddings
    (C-12), adapter binding (C-02), adapter applied (C-01, C-07), base weights (C-01, C-06), finite numbers (C-35). An
    adapter that is not plain LoRA is answered with None, and then nothing is said about the weights. Raises DataError
    when a folder holds no readable safetensors files.
    """
    before, after = in_checkpoint(base), in_checkpoint(merged)
    checks = [_plain(merged, before, after), _same_tensors(merged, before, after), _tied(base, merged, after)]
    try:
        changes, unbound = bind(read(adapter), before)
    except UnknownAdapter as error:
        return [*checks, _check("adapter binding", ("C-02",), None, str(error))]
    checks.append(_binding(changes, unbound))
    found = [
        measure(name, stored, after[name], changes.get(name))
        for name, stored in before.items()
        if name in after and after[name].shape == stored.shape
        if stored.dtype == after[name].dtype or {stored.dtype, after[name].dtype} <= UNIT.keys()
    ]
    return [*checks, *_applied(found, changes), _base(found), _finite(found)] if found else checks


def _check(name: str, codes: tuple[str, ...], ok: bool | None, said: str) -> Check:
    return Check(step="merged", name=name, codes=codes, ok=ok, said=said)


def _plain(folder: Path, before: Tensors, after: Tensors) -> Check:
    """Only 16-bit and wider floats, but for masks and counters that the base has as well."""
    codes = ("C-41", "C-06")
    if quantized := config(folder).get("quantization_config"):
        method = quantized.get("quant_method", "by a method without a name")
        said = f"config.json of the merge still says that it is quantized ({method})"
        return _check("plain weights", codes, False, said)
    for name, stored in after.items():
        as_before = name in before and before[name].dtype == stored.dtype and stored.dtype[0] in "BIU"
        if stored.dtype not in UNIT and not as_before:
            return _check(
                "plain weights", codes, False, f"{name} is stored as {stored.dtype}, not as a 16-bit float"
            )
    kinds = " and ".join(sorted({s.dtype for s in after.values()}))
    return _check("plain weights", codes, True, f"{len(after)} tensors in {kinds}, no quantization_config")


def _same_tensors(folder: Path, before: Tensors, after: Tensors) -> Check:
    name, codes = "tensor list", ("C-34", "C-13")
    tied = bool(config(folder).get("tie_word_embeddings"))
    missing = [n for n in before if n not in after and not (tied and n.endswith(HEADS))]
    extra = [n for n in after if n not in before and not (tied and n.endswith(HEADS))]
    if missing:
        return _check(name, codes, False, f"the merge lost {_listed(missing)}, which the base has")
    if extra:
        return _check(name, codes, False, f"the merge has {_listed(extra)}, which the base lacks")
    for tensor, stored in before.items():
        if tensor in after and stored.shape != after[tensor].shape:
            said = f"{tensor} is {after[tensor].shape} in the merge and {stored.shape} in the base"
            return _check(name, codes, False, said)
    return _check(name, codes, True, f"the base's {len(before)} tensors, each with its shape")


def _tied(base: Path, folder: Path, after: Tensors) -> Check:
    name, codes = "tied embeddings", ("C-12", "C-13")
    ties, tied_before = (config(place).get("tie_word_embeddings") for place in (folder, base))
    head = next((n for n in after if n.endswith(HEADS)), "")
    embedding = next((n for n in after if n.endswith(EMBEDDINGS)), "")
    if ties is False and tied_before is not False and embedding and not head:
        said = f"config.json says that the output layer is not {embedding}, but there is no output layer"
        return _check(name, codes, False, said)
    if not (ties and head and embedding):
        said = "one tensor serves input and output" if ties else "config.json does not tie them"
        return _check(name, codes, True, said)
    same = same_bytes(after[embedding], after[head])
    said = "hold the same numbers" if same else "hold different numbers, although config.json ties them"
    return _check(name, codes, same, f"{embedding} and {head} {said}")


def _binding(changes: Mapping[str, Change], unbound: Sequence[str]) -> Check:
    if unbound:
        return _check("adapter binding", ("C-02",), False, unbound[0])
    return _check(
        "adapter binding",
        ("C-02",),
        True,
        f"each of {len(changes)} adapter layers has one weight of the base",
    )


def _applied(found: Sequence[Found], changes: Mapping[str, Change]) -> Iterator[Check]:
    """C-01 and C-07: what of the adapter is in the merged weights."""
    name, codes = "adapter applied", ("C-01", "C-07")
    mine = [f for f in found if f.adapted]
    by = {fault: [f for f in mine if f.fault == fault] for fault in ("lost", "nothing", "scale", "")}
    if lost := by["lost"]:
        whole = (
            "the adapter was not applied"
            if len(lost) == len(mine)
            else "a part of the adapter was not applied"
        )
        yield _check(name, codes, False, f"{whole}: {_share(lost, mine)} still the base's")
    if nothing := by["nothing"]:
        said = f"the adapter's change to {_share(nothing, mine)} zero, or smaller than the weight's rounding"
        yield _check(name, (*codes, "C-03"), False, said)
    if scaled := by["scale"]:
        said = f"{_share(scaled, mine)} base + adapter {_wrong_scale(scaled[0], changes)}"
        yield _check(name, codes, False, said)
    if not (lost or nothing or scaled):
        said = f"{len(by[''])} of {len(mine)} adapted weights are base + scale · B A within their rounding"
        yield _check(name, codes, True if by[""] else None, said)


def _wrong_scale(found: Found, changes: Mapping[str, Change]) -> str:
    change = changes[found.name]
    said = f"with a scale of {found.scale:.4g} instead of {change.scale:.4g}"
    plain, stable = change.alpha / change.rank, change.alpha / change.rank**0.5
    if change.rslora and abs(found.scale / plain - 1) < 0.1:
        return f"{said}: lora_alpha / r, but the adapter is rsLoRA, which wants lora_alpha / sqrt(r)"
    if not change.rslora and abs(found.scale / stable - 1) < 0.1:
        return f"{said}: lora_alpha / sqrt(r), but the adapter is not rsLoRA"
    return f"{said}: it was applied twice" if abs(found.scale / change.scale - 2) < 0.1 else said


def _base(found: Sequence[Found]) -> Check:
    """C-01, C-06: what is not the adapter's must be the base's."""
    name, codes = "base weights", ("C-01", "C-06")
    other = sorted((f for f in found if f.fault == "other"), key=lambda f: -f.off)
    untouched = sum(not f.adapted for f in found)
    if four := [f for f in other if f.four_bit]:
        said = (
            f"{_share(four, found)} rounded to 4 bits again: at most 16 different numbers in each block of 64"
        )
        return _check(name, codes, False, said)
    if 2 * len(other) > len(found):
        said = (
            f"the base under the adapter is another one: {len(other)} of {len(found)} tensors differ from it, "
            f"{other[0].name} by {other[0].off:.3g} of its norm"
        )
        return _check(name, codes, False, said)
    if other:
        what = "base + adapter" if other[0].adapted else "the base's"
        said = f"{_share(other, found)} not {what}: {other[0].name} is off by {other[0].off:.3g} of its norm"
        return _check(name, codes, False, said)
    return _check(name, codes, True, f"{untouched} tensors without an adapter are the base's bit for bit")


def _finite(found: Sequence[Found]) -> Check:
    name, codes = "finite numbers", ("C-35", "C-36")
    if broken := [f for f in found if f.fault == "broken"]:
        said = f"{_share(broken, found)} not finite in {broken[0].broken} places"
        return _check(name, codes, False, said)
    if zero := [f for f in found if f.fault == "zero"]:
        return _check(name, codes, False, f"{_share(zero, found)} all zeros, unlike the base's")
    top = max(found, key=lambda f: f.largest)
    said = f"the largest number is {top.largest:.4g}, in {top.name}; float16 ends at {F16_MAX:g}"
    return _check(name, codes, True, said)


def _share(some: Sequence[Found], of: Sequence[Found]) -> str:
    """The first of some tensors by name and how many more of how many, with its verb."""
    if len(some) == 1:
        return f"{some[0].name} is"
    return f"{some[0].name} and {len(some) - 1} more of {len(of)} tensors are"


def _listed(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
