"""AWQ on a CUDA GPU: what transformers and vLLM compute from a folder there, and what making one of a wide model costs.

1. FOLDER, in both layouts, opened by transformers (as its users do it) and by vLLM: the KL divergence of every token of TEXT
   against torch in float32 on the weights that edgeft unpacks, and greedy answers side by side.
2. A model of Llama 3.2 3B's widths (random, bfloat16, FOLDER's tokenizer), quantized on the GPU: seconds, memory, vLLM's logits
   again, and tokens a second of vLLM beside the 16-bit weights. Random weights say nothing of quality.

python benchmarks/awq_gpu.py TEXT FOLDER [--layers 28] [--work FOLDER] [--only exact wide]

Needs a GPU; where vLLM is found: docs/servers.md. Prints tables; nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOKENS, WINDOWS, ANSWER = 512, 8, 64
BATCHES = (1, 32)
SPOKEN = 128
"""Tokens of an answer that is timed."""


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        speeds(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "awq_gpu")
    parser.add_argument("--only", nargs="+", choices=("exact", "wide"), default=("exact", "wide"))
    given = parser.parse_args()
    import torch
    import transformers

    from edgeft.servers.find import available

    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"vLLM {available() or 'not found'}\n"
    )
    if "exact" in given.only:
        exact(given.text, given.folder, given.work)
    if "wide" in given.only:
        wide(given.folder, given.layers, given.work)


def exact(text: Path, folder: Path, work: Path) -> None:
    """Part 1: every runtime's logits and answers beside those of torch in float32."""
    from edgeft.awq import layouts
    from edgeft.servers import open_vllm

    mine = layouts.of_config(_config(folder)).name
    other = next(name for name in layouts.LAYOUTS if name != mine)
    folders = {mine: folder, other: relaid(folder, work / other, other)}
    windows, prompts = _windows(folder, text)
    wanted = _wanted(folder, windows, prompts)
    print("| layout | runtime | tokens | KLD, mean | largest | same first token | same greedy answers |")
    print("|---|---|---|---|---|---|---|")
    for layout, place in folders.items():
        if layout == "compressed-tensors":
            _row(layout, "transformers", Transformers(place), windows, prompts, wanted)
        log = work / f"vllm-{layout}.log"
        with open_vllm(place, context=TOKENS + ANSWER, log=log) as session:
            _row(layout, session.said, session, windows, prompts, wanted)
        print(
            *{line.partition("Using ")[2] for line in log.read_text().splitlines() if "inearKernel" in line},
            sep="\n", flush=True,
        )  # fmt: skip


def wide(folder: Path, layers: int, work: Path) -> None:
    """Part 2: a wide model made, quantized and served."""
    import torch

    from edgeft import awq
    from edgeft.awq import own_text
    from edgeft.servers import open_vllm
    from edgeft.servers.find import find

    source, out = work / "wide", work / "wide-awq"
    if not (source / "config.json").is_file():
        _make(folder, source, layers)
    begun = time.monotonic()
    windows = own_text.write(source, 20, TOKENS, device="cuda:0")
    written, held = time.monotonic() - begun, torch.cuda.max_memory_allocated() / 1e9
    _gpu_again()
    begun = time.monotonic()
    made = awq.quantize(source, out, windows[:16], awq.Settings(device="cuda:0"))
    took, peak = time.monotonic() - begun, torch.cuda.max_memory_allocated() / 1e9
    print(
        f"\n{made.parameters / 1e9:.2f} G parameters, {len(made.shapes)} layers in groups of {made.group}, {made.pairs} scalings (logits moved by "
        f"{made.scaled_off or 0:.1g} of their spread), {made.bytes / 1e9:.2f} GB: own text {written:.0f} s and {held:.1f} GB "
        f"of GPU memory; 16 windows quantized in {took:.0f} s with {peak:.1f} GB\n"
    )
    _gpu_again()
    prompts = [w[:32] for w in windows[16:]]
    wanted = _wanted(out, windows[16:], prompts)
    print("| model | runtime | tokens | KLD, mean | largest | same first token | same greedy answers |")
    print("|---|---|---|---|---|---|---|")
    _gpu_again()
    with open_vllm(out, context=TOKENS + ANSWER, log=work / "vllm-wide.log") as session:
        _row("wide", session.said, session, windows[16:], prompts, wanted)
    print(
        f"\n| weights | {' | '.join(f'{n} at once, tokens/s' for n in BATCHES)} |\n|---|{'---|' * len(BATCHES)}"
    )
    for place in (source, out):
        done = subprocess.run(
            [str(find("vllm").python), __file__, "--worker", str(place), str(work / "speed.log")],
            stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        print(done.stdout or f"| {place.name} | failed: see speed.log |", end="", flush=True)


def speeds(folder: str, log: str) -> None:
    """In vLLM's interpreter: tokens a second of answering, with vLLM's own settings (compiled, CUDA graphs), the best of three."""
    import importlib
    import os

    out = os.dup(1)
    to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(to, 1)
    os.dup2(to, 2)
    vllm: Any = importlib.import_module("vllm")
    llm = vllm.LLM(
        model=folder, max_model_len=1024, max_num_seqs=max(BATCHES), gpu_memory_utilization=0.5, seed=0
    )
    asked = vllm.SamplingParams(temperature=0, max_tokens=SPOKEN, ignore_eos=True)
    cells = []
    for count in BATCHES:
        prompts = [{"prompt_token_ids": list(range(100 + i, 132 + i))} for i in range(count)]
        best = float("inf")
        for _ in range(4):
            begun = time.monotonic()
            llm.generate(prompts, asked, use_tqdm=False)
            best = min(best, time.monotonic() - begun)
        cells.append(f"{count * SPOKEN / best:,.0f}")
    os.write(out, f"| {Path(folder).name} | {' | '.join(cells)} |\n".encode())


class Transformers:
    """A folder as a user of transformers opens it on a GPU."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cuda").eval()

    def logits(self, ids: list[int]) -> Any:
        import torch

        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([ids], device="cuda")).logits[0].float().cpu().numpy()

    def generate(self, ids: list[int], count: int) -> tuple[list[int], bool]:
        import torch

        given = torch.tensor([ids], device="cuda")
        said = self.model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False
        )[0, len(ids) :].tolist()
        end = self.model.generation_config.eos_token_id
        return (said[: said.index(end)], True) if end in said else (said, False)


def relaid(folder: Path, out: Path, layout: str) -> Path:
    """The same folder in another layout."""
    from safetensors.torch import save_file

    from edgeft.awq import layouts, weights

    if (out / "config.json").is_file():
        return out
    shutil.copytree(folder, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, Any] = {}
    group = 0
    for name, found in weights.tensors(folder):
        if isinstance(found, layouts.Codes):
            base, group = name.removesuffix(".weight"), found.codes.shape[1] // found.scales.shape[1]
            tensors |= {f"{base}.{k}": v.contiguous() for k, v in layouts.of(layout).pack(found).items()}
        else:
            tensors[name] = found.contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = _config(folder)
    config["quantization_config"] = layouts.of(layout).config(group, ["lm_head"])
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out


def _row(
    name: str, runtime: str, session: Any, windows: list[list[int]], prompts: list[list[int]], wanted: Any
) -> None:
    import torch

    mean, largest, same, tokens = 0.0, 0.0, 0.0, 0
    for ids, row in zip(windows, wanted[0], strict=True):
        said = torch.log_softmax(torch.from_numpy(session.logits(ids)).double(), -1)
        apart = (row.exp() * (row - said)).sum(-1)
        mean, largest = mean + float(apart.sum()), max(largest, float(apart.max()))
        same, tokens = same + float((row.argmax(-1) == said.argmax(-1)).sum()), tokens + len(ids)
    answers = [session.generate(p, ANSWER)[0] for p in prompts]
    alike = sum(a == b for a, b in zip(answers, wanted[1], strict=True))
    print(
        f"| {name} | {runtime} | {tokens} | {mean / tokens:.1e} | {largest:.1e} | {same / tokens:.2%} | {alike} of {len(prompts)} |",
        flush=True,
    )


def _wanted(folder: Path, windows: list[list[int]], prompts: list[list[int]]) -> Any:
    """Log probabilities [tokens, vocab] in float64 for each window, and the greedy answers, in float32 on the GPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgeft.awq.weights import dequantized

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict({n: t.float() for n, t in dequantized(folder).items()}, strict=False)
    model.tie_weights()
    model = model.to("cuda").eval()
    rows, answers = [], []
    with torch.inference_mode():
        for ids in windows:
            logits = model(input_ids=torch.tensor([ids], device="cuda")).logits[0]
            rows.append(torch.log_softmax(logits.double(), -1).cpu())
        end = config.get_text_config().eos_token_id
        for prompt in prompts:
            said: list[int] = []
            while len(said) < ANSWER:
                logits = model(input_ids=torch.tensor([[*prompt, *said]], device="cuda")).logits[0, -1]
                if (best := int(logits.argmax())) == end:
                    break
                said.append(best)
            answers.append(said)
    return rows, answers


def _windows(folder: Path, text: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Windows of a text's tokens, and prompts: the beginning of each."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder).encode(
        text.read_text(encoding="utf-8"), add_special_tokens=False
    )
    windows = [ids[i : i + TOKENS] for i in range(0, len(ids) - TOKENS + 1, TOKENS)][:WINDOWS]
    return windows, [w[:48] for w in windows]


def _make(folder: Path, out: Path, layers: int) -> None:
    """A random model of Llama 3.2 3B's widths with another tokenizer's vocabulary."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=24, num_key_value_heads=8,
        head_dim=128, vocab_size=_config(folder)["vocab_size"], tie_word_embeddings=True, max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    del model
    _gpu_again()


def _gpu_again() -> None:
    """The memory that torch keeps goes back; its high-water mark begins anew."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
