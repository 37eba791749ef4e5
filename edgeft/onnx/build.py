"""Makes an ONNX Runtime GenAI folder from a checkpoint: the graph by GenAI's model builder, the weights packed here."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgeft import progress
from edgeft.errors import RecipeError, SetupError, StageError
from edgeft.onnx import naming, pack, tokenizer

Provider = Literal["cpu", "cuda", "dml"]
EMBEDDING = "/model/embed_tokens/Gather"
SAMPLING = (
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "min_length", "length_penalty",
    "num_beams",
)  # fmt: skip
"""What generation_config.json and genai_config.json call alike."""
PAPERS = re.compile(r"(?i)(licen[cs]e|notice|copying|readme)")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is built."""

    provider: Provider
    block: int
    symmetric: bool
    accuracy: int
    search: bool
    """Look for the scale and zero point with the least error; otherwise those that reach the outermost weights."""
    mixed: bool
    """Eight bits for the products that llama.cpp's mixtures give more to."""
    head: Literal[4, 8, 0]
    """Bits of the output matrix, and of the embedding where they are one; 0: left in the graph's own precision."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """What was written."""

    types: Mapping[str, int]
    """How many tensors of each kind: int4, int8, and the graph's own precision."""
    unweighed: list[str]
    """Layers' products of which `importance` says nothing."""
    repairs: list[str]
    """What the builder, or GenAI's tokenizer, needed otherwise."""


def build(
    checkpoint: Path,
    out: Path,
    settings: Settings,
    importance: Mapping[str, Any] | None = None,
    codes: Mapping[str, pack.Given] | None = None,
) -> Built:
    """Write the folder `out` (new or empty) from a 16-bit checkpoint.

    `importance` is what each column of a weight carried, by GGUF name (llamacpp.imatrix.Matrix.means); None: all alike.
    `codes` are weights that are rounded already, by the checkpoint's names; the checkpoint holds the same numbers.
    Offline, and the same bytes for the same checkpoint and packages. Raises RecipeError for an architecture that the
    builder does not know, StageError with its reason where it fails.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    refuse(config)
    out.mkdir(parents=True, exist_ok=True)
    aside = out.parent / f"{out.name}.aside"
    aside.mkdir()
    try:
        progress.report("make the graph", 0, 2)
        _builder(checkpoint, aside, config, settings)
        unweighed: list[str] = []
        by_name = naming.importance(importance, unweighed) if importance else _alike
        plan = pack.Plan(
            block=settings.block, symmetric=settings.symmetric, accuracy=settings.accuracy,
            search=settings.search, bits=_bits(settings, int(config["num_hidden_layers"])), importance=by_name,
            given=_given(codes or {}),
        )  # fmt: skip
        types = pack.pack(aside, out, plan)
        found = json.loads((aside / "genai_config.json").read_text(encoding="utf-8"))
        repairs = _repair(found, checkpoint)
        (out / "genai_config.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        repairs += tokenizer.write(checkpoint, out, context=int(found["model"]["context_length"]))
        for papers in (p for p in checkpoint.iterdir() if p.is_file() and PAPERS.match(p.name)):
            shutil.copyfile(papers, out / papers.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Built(types=dict(types), unweighed=unweighed, repairs=repairs)


def refuse(config: Mapping[str, Any]) -> None:
    """Raise RecipeError for a model that cannot be built, from its config.json."""
    named = next(iter(config.get("architectures") or ()), "") or str(config.get("model_type", ""))
    if named not in architectures():
        raise RecipeError(
            f"ONNX Runtime GenAI's model builder does not know {named or 'a model without architectures in its config'}",
            hint=f"it knows {', '.join(sorted(architectures()))}; or ship a GGUF file",
        )
    for wrong in (_experts(config), _head_width(config), _rotary(config)):
        if wrong:
            raise RecipeError(f"{named} cannot be built as an ONNX folder: {wrong}", hint="ship a GGUF file")


def _experts(config: Mapping[str, Any]) -> str:
    experts = config.get("num_local_experts") or config.get("num_experts")
    return f"it has {experts} experts, and edgeft packs the products of dense models only" if experts else ""


def _head_width(config: Mapping[str, Any]) -> str:
    heads = int(config.get("num_attention_heads") or 1)
    width = int(config.get("head_dim") or int(config.get("hidden_size") or 0) // heads)
    return (
        f"its heads are {width} wide, and ONNX Runtime's attention takes multiples of 16"
        if width % 16
        else ""
    )


def _rotary(config: Mapping[str, Any]) -> str:
    """transformers 5 keeps one set of rotary numbers for each kind of layer; the builder of GenAI 0.18 reads only one."""
    kinds = config.get("rope_parameters")
    several = isinstance(kinds, Mapping) and any(isinstance(value, Mapping) for value in kinds.values())
    if several or str(config.get("model_type", "")).startswith("gemma3"):
        return "its kinds of layers rotate differently, which GenAI's model builder does not read from transformers 5"
    return ""


def architectures() -> frozenset[str]:
    """The text models that the installed model builder makes, read from its source without importing it.

    Raises SetupError where GenAI is not installed.
    """
    found = importlib.util.find_spec("onnxruntime_genai")
    if found is None or not found.submodule_search_locations:
        raise SetupError("ONNX Runtime GenAI is not installed", hint="pip install 'edgeft[onnx]'")
    source = Path(found.submodule_search_locations[0]) / "models" / "builder.py"
    names = re.findall(
        r'config\.architectures\[0\] == "(\w+ForCausalLM)"', source.read_text(encoding="utf-8")
    )
    return frozenset(names)


def _builder(checkpoint: Path, out: Path, config: Mapping[str, Any], settings: Settings) -> None:
    """GenAI's model builder, offline: the graph with its weights as they are, in the provider's own precision."""
    precision = "fp32" if settings.provider == "cpu" else "fp16"
    try:
        with _offline():
            from onnxruntime_genai.models import builder

            cache = str(out / "cache")
            options = builder.parse_extra_options(
                None, str(checkpoint), str(out), precision, settings.provider, cache, ["hf_token=false"]
            )
            builder.create_model(
                None, str(checkpoint), str(out), precision, settings.provider, cache, **options
            )
    except ImportError as e:
        raise SetupError(
            f"GenAI's model builder cannot be imported: {e}", hint="pip install 'edgeft[onnx]'"
        ) from e
    except Exception as e:
        # Whatever it raises is about this model: a rotary type that it does not know, a key that it misses.
        raise StageError(
            f"ONNX Runtime GenAI's model builder cannot make {config.get('model_type')}: {type(e).__name__}: {e}",
            hint="ship a GGUF file, or try a newer onnxruntime-genai",
        ) from e


@contextmanager
def _offline() -> Iterator[None]:
    """What the builder imports looks nothing up: everything is in the checkpoint's folder."""
    wanted = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _bits(settings: Settings, layers: int) -> Callable[[str], int]:
    """How many bits each product gets."""
    more = naming.upgraded(layers) if settings.mixed else frozenset()

    def of(name: str) -> int:
        if name == pack.HEAD:
            return settings.head
        if name == EMBEDDING:
            return settings.head
        place = naming.product(name)
        if place is None:
            return 0
        layer, role = place
        return 8 if layer in more and role in ("v_proj", "qkv_proj", "down_proj") else 4

    return of


def _given(codes: Mapping[str, pack.Given]) -> Callable[[str], pack.Given | None]:
    """The codes of a product, from those of the parameters that lie in it."""

    def of(name: str) -> pack.Given | None:
        import numpy as np

        tried, (part, of_parts) = naming.parameters(name)
        for number, names in enumerate(tried):
            if all(parameter in codes for parameter in names):
                stacked = [np.concatenate([codes[n][i] for n in names]) for i in range(3)]
                if of_parts > 1 and number == len(tried) - 1:
                    stacked = [np.split(numbers, of_parts)[part] for numbers in stacked]
                return stacked[0], stacked[1], stacked[2]
        return None

    return of


def _alike(name: str, columns: int) -> None:
    """All columns count alike."""


def _repair(found: dict[str, Any], checkpoint: Path) -> list[str]:
    """Bring genai_config.json in line with what the checkpoint says of sampling and of its special tokens."""
    before = json.loads(json.dumps(found))
    for place, values in settled(checkpoint).items():
        found[place].update(values)
    return [
        f"genai_config.json: {place}.{key} {before[place].get(key)} -> {value}"
        for place in ("model", "search") for key, value in found[place].items() if before[place].get(key) != value
    ]  # fmt: skip


def settled(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """What genai_config.json must say, by part: the checkpoint's special tokens ("model") and its sampling ("search").

    An answer ends at what generation_config.json lists, and at the tokenizer's own end.
    """
    from transformers import AutoTokenizer

    tokenizer_ = AutoTokenizer.from_pretrained(checkpoint)
    config, said = (
        json.loads(path.read_text(encoding="utf-8")) if (path := checkpoint / name).is_file() else {}
        for name in ("config.json", "generation_config.json")
    )
    listed = said.get("eos_token_id", config.get("eos_token_id"))
    ends = [*(listed if isinstance(listed, list) else [listed]), tokenizer_.eos_token_id]
    ends = list(dict.fromkeys(i for i in ends if i is not None))
    pads = (said.get("pad_token_id"), tokenizer_.pad_token_id, config.get("pad_token_id"), *ends)
    starts = (tokenizer_.bos_token_id, said.get("bos_token_id"), config.get("bos_token_id"))
    model: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    for name, ids in (("pad_token_id", pads), ("bos_token_id", starts)):
        if (first := next((i for i in ids if i is not None), None)) is not None:
            model[name] = first
    return {"model": model, "search": {key: said[key] for key in SAMPLING if said.get(key) is not None}}
