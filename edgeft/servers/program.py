"""The other half of `vllm.Session`: runs in vLLM's own interpreter, holds the model, answers over a socket.

It is copied beside the socket and started there, imports nothing of edgeft, and runs under whatever Python vLLM was installed for.
A request is one line of JSON. An answer is one line of JSON, followed by as many bytes as its `bytes` says.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

_SMALLEST_CACHE = 64 << 20


def main() -> None:
    settings = json.loads(sys.argv[1])
    log = os.open(settings["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    line = socket.socket(socket.AF_UNIX)
    line.connect(settings["socket"])
    file = line.makefile("rwb")
    say(file, load, settings)


def say(file: Any, load: Callable[[dict[str, Any]], Model], settings: dict[str, Any]) -> None:
    """Load the model, say what it is, and answer until the other side hangs up."""
    model: Model | None = None

    def answer(request: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        nonlocal model
        if model is None:
            model = load(settings)
            return model.about(), []
        return model.answer(request)

    request: dict[str, Any] = {}
    while True:
        try:
            found, parts = answer(request)
        except Exception as error:  # noqa: BLE001  whatever it is, the other side must hear of it
            import traceback

            traceback.print_exc()
            found, parts = (
                {"error": f"{type(error).__name__}: {error}", "at": "loading" if model is None else "asking"},
                [],
            )
        found["bytes"] = sum(part.nbytes for part in parts)
        file.write(json.dumps(found).encode() + b"\n")
        for part in parts:
            file.write(memoryview(part).cast("B"))
        file.flush()
        text = file.readline()
        if not text or model is None:
            os._exit(0)  # at once: what vLLM would tidy up ends with the process
        request = json.loads(text)


def load(settings: dict[str, Any]) -> Model:
    """The model of a folder. One more position than asked for: vLLM wants to say a token after every prompt."""
    vllm: Any = importlib.import_module("vllm")
    length = settings["context"] + 1
    llm = vllm.LLM(
        model=settings["folder"], dtype=settings["dtype"], enforce_eager=True, seed=0, disable_log_stats=True,
        max_model_len=length, max_num_seqs=1, max_num_batched_tokens=length, enable_prefix_caching=False,
        kv_cache_memory_bytes=cache_bytes(settings["folder"], length),
    )  # fmt: skip
    return Model(llm)


def cache_bytes(folder: str, length: int) -> int:
    """Memory for one conversation: keys and values of all layers in float32, and some blocks to spare."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return max(_SMALLEST_CACHE, int(2 * 4 * config.num_hidden_layers * heads * width * (length + 512)))


class Model:
    """vLLM's engine in this process, and what its model computed before anything was sampled from it."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.tokenizer = llm, llm.get_tokenizer()
        self.rows: list[Any] | None = None
        model = llm.apply_model(lambda model: model)[0]
        compute = model.compute_logits

        def heard(hidden: Any, *args: Any, **kwargs: Any) -> Any:
            logits = compute(hidden, *args, **kwargs)
            if self.rows is not None:
                self.rows.append(
                    logits.detach().float().cpu().clone()
                )  # the sampler may change them in place
            return logits

        model.compute_logits = heard
        self.n_vocab = int(self.logits([0])[0].shape[-1])

    def about(self) -> dict[str, Any]:
        platform: Any = importlib.import_module("vllm.platforms").current_platform
        config = self.llm.llm_engine.model_config
        device = str(platform.get_device_name() or platform.device_type)
        return {
            "n_vocab": self.n_vocab, "dtype": str(config.dtype).removeprefix("torch."),
            "device": "CPU" if device.lower() == "cpu" else device, "quantization": config.quantization or "",
        }  # fmt: skip

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """The answer to one request, and the arrays that go with it."""
        what = request["do"]
        if what == "logits":
            parts = self.logits(request["ids"])
            return {"shape": [sum(len(p) for p in parts), self.n_vocab]}, parts
        if what == "generate":
            ids, ended = self.generate(request["ids"], request["max_tokens"])
            return {"ids": ids, "ended": ended}, []
        if what == "tokenize":
            return {"ids": list(self.tokenizer.encode(request["text"], add_special_tokens=False))}, []
        if what == "detokenize":
            return {"text": self.tokenizer.decode(request["ids"], skip_special_tokens=False)}, []
        return {"text": self.render(request["messages"])}, []

    def logits(self, ids: list[int]) -> list[Any]:
        """Of every position, in order. vLLM computes the last row, from which it samples, and then those that the
        probabilities of the prompt are taken from: without the last (its first model runner) or with it (its second, 0.25
        on a GPU)."""
        self.rows = []
        try:
            self.run(ids, max_tokens=1, prompt_logprobs=0)
            last, *before = self.rows
        finally:
            self.rows = None
        if sum(map(len, before)) < len(ids):
            before = [*before, last]
        rows = [r.numpy() for r in before]
        if sum(len(r) for r in rows) != len(ids):
            raise RuntimeError(
                f"vLLM computed logits of {[len(r) for r in rows]} positions for a prompt of {len(ids)}"
            )
        return rows

    def generate(self, ids: list[int], max_tokens: int) -> tuple[list[int], bool]:
        """The most probable tokens. generation_config.json is read for the tokens that end an answer alone."""
        said = self.run(ids, max_tokens=max_tokens)
        ended = said.finish_reason == "stop"
        return list(said.token_ids)[: -1 if ended else None], ended

    def render(self, messages: list[dict[str, str]]) -> str | None:
        """The prompt as vLLM's chat endpoint writes it."""
        if not getattr(self.tokenizer, "chat_template", None):
            return None
        params = importlib.import_module("vllm.renderers").ChatParams(
            chat_template_kwargs={"add_generation_prompt": True, "tokenize": False}
        )
        _, prompt = self.llm.renderer.render_messages(messages, params)
        return str(prompt["prompt"])

    def run(self, ids: list[int], **settings: Any) -> Any:
        sampling = importlib.import_module("vllm").SamplingParams(
            temperature=0.0, detokenize=False, **settings
        )
        prompt = {"prompt_token_ids": ids}
        (found,) = self.llm.generate([prompt], sampling, use_tqdm=False)
        return found.outputs[0]


if __name__ == "__main__":
    main()
