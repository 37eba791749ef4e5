"""An AWQ folder in transformers: the packed weights unpacked to what a server computes with, and run in torch.

In the compressed-tensors layout transformers loads the folder itself, where the small library of that name is installed; what
it made of the weights is held to this package's own unpacking, bit for bit. AWQ's gemm layout would need gptqmodel: there the
weights are unpacked here and handed to transformers.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from edgeft.awq import layouts, weights
from edgeft.errors import DataError, SetupError, StageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Session:
    """A folder opened in torch. A context manager; `close` frees the model.

    `device` is "cpu" or "cuda:0". A CPU computes in float32 with the weights as they unpack in 16 bits, a GPU in those 16
    bits. `context` is the longest sequence in tokens (0: what the model was made for). Raises StageError for a folder that
    is no AWQ, SetupError when transformers cannot build its model.
    """

    def __init__(self, folder: Path, *, context: int = 0, device: str = "cpu") -> None:
        import transformers
        from transformers import AutoTokenizer

        self.folder, self.device = folder, device
        self._model, how = _opened(folder, device)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.n_vocab = int(self._model.get_output_embeddings().weight.shape[0])
        longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", 0) or context
        self.context = min(context, longest) if context else longest
        ends = getattr(self._model.generation_config, "eos_token_id", None)
        found = {*(ends if isinstance(ends, list) else [ends]), self._tokenizer.eos_token_id}
        self.ends = frozenset(i for i in found if i is not None)
        self.said = f"transformers {transformers.__version__}, {device.split(':')[0].upper()}, {how}"

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(ids), n_vocab] after each token."""
        import torch

        self._fits(len(ids))
        with torch.inference_mode():
            given = self._model(
                input_ids=torch.tensor([list(ids)], device=self.device), use_cache=False
            ).logits[0]
            found: NDArray[np.float32] = given.float().cpu().numpy()
        return found

    def generate(self, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], bool]:
        """The greedy continuation without the token that ended it, and whether one did.

        Plain greedy: what generation_config.json says of sampling and repetition is set aside.
        """
        import torch

        self._fits(len(prompt))
        out: list[int] = []
        given, cache = torch.tensor([list(prompt)], device=self.device), None
        with torch.inference_mode():
            while len(out) < max_tokens and len(prompt) + len(out) < self.context:
                step = self._model(input_ids=given, past_key_values=cache, use_cache=True)
                cache, best = step.past_key_values, int(step.logits[0, -1].argmax())
                if best in self.ends:
                    return out, True
                out.append(best)
                given = torch.tensor([[best]], device=self.device)
        return out, False

    def tokenize(self, text: str) -> list[int]:
        """Ids by the folder's tokenizer: special tokens in the text are read, none is added."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens spelled out."""
        return str(
            self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def render(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """The messages by the folder's chat template, with the start of the answer; None without a template.

        Raises DataError for what the template refuses.
        """
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            return None
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
                )
            )
        except TemplateError as e:
            raise DataError(f"the chat template refuses the messages: {e}") from e

    def close(self) -> None:
        """Free the model. Idempotent."""
        self._model = None
        gc.collect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _fits(self, tokens: int) -> None:
        if not tokens or tokens > self.context:
            raise DataError(f"{tokens} tokens do not go into a context of {self.context}")


def loads_by_library(layout: str) -> bool:
    """Whether transformers itself can open a folder in this layout here."""
    return layout == "compressed-tensors" and find_spec("compressed_tensors") is not None


def _opened(folder: Path, device: str) -> tuple[Any, str]:
    """The model, ready to run, and in words how its weights came to be."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as chatter

    chatter.disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder.name}/ has no config.json")
    declared = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layout = layouts.of_config(declared)
    ours = weights.dequantized(folder)
    short_ones = (t.dtype for t in ours.values() if t.dtype in (torch.float16, torch.bfloat16))
    dtype = next(short_ones, torch.float32)
    short = str(dtype).removeprefix("torch.")
    try:
        if loads_by_library(layout.name):
            from transformers import CompressedTensorsConfig

            extra = {} if declared["quantization_config"].get("dequantize") else {
                "quantization_config": CompressedTensorsConfig(dequantize=True)
            }  # fmt: skip
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **extra)
            _same(model, ours)
            how = f"{short} weights by compressed-tensors"
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            del config.quantization_config
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            lacking = set(model.load_state_dict(ours, strict=False).missing_keys)
            model.tie_weights()
            _same(model, ours)
            top, low = model.get_output_embeddings(), model.get_input_embeddings()
            tied = top is not None and top.weight is low.weight
            lacking -= {
                n for n, p in model.named_parameters(remove_duplicate=False) if tied and p is low.weight
            }
            if lacking:
                raise StageError(f"{folder.name}/ holds no {min(lacking)}")
            how = f"{short} weights unpacked by edgeft"
    except (ValueError, KeyError, OSError, ImportError) as e:
        raise SetupError(f"transformers cannot open {folder.name}/: {e}") from e
    del ours
    gc.collect()
    model = model.to(device) if device != "cpu" else model.to(torch.float32)
    return model.eval(), how if device != "cpu" else f"{how}, computed in float32"


def _same(model: Any, ours: Mapping[str, Any]) -> None:
    """Raises StageError when the model holds another value for a parameter than this package reads in the file."""
    import torch

    state = model.state_dict()
    for name, value in ours.items():
        if name not in state or not torch.equal(state[name].to(value.dtype), value):
            raise StageError(f"transformers made something else of {name} than what its bytes say")
