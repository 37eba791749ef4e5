"""The model and the tokens, once a machine: SmolLM2 as its GGUF stands for it, or the same function 768 wide."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers

CHUNK, SEEDS, EPOCHS = 256, 3, 3


def prepare(gguf: Path, train: Path, heldout: Path, general: Path, out: Path) -> None:
    """Write state.pt, config.json and tokens.pt: held-out chunks [200, 256], general ones, training ones per seed."""
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    out.mkdir(parents=True, exist_ok=True)
    _save(model, out)

    rows = [tokenizer(_chat(r), add_special_tokens=False).input_ids for r in _rows(train)]
    held = [i for r in _rows(heldout) for i in tokenizer(_chat(r), add_special_tokens=False).input_ids]
    plain = tokenizer(general.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    seeds = []
    for seed in range(SEEDS):
        rng, ids = random.Random(seed), []
        for _ in range(EPOCHS):
            shuffled = rows[:]
            rng.shuffle(shuffled)
            ids += [i for row in shuffled for i in row]
        seeds.append(_chunks(ids))
    torch.save({"heldout": _chunks(held)[:200], "general": _chunks(plain), "train": seeds}, out / "tokens.pt")


def widen(source: Path, out: Path, *, heads: int = 12, kv_heads: int = 4, hidden: int = 768) -> None:
    """The Llama model in `source` with wider rows, multiples of 256, and the same outputs.

    The residual stream is put into more dimensions by a random matrix with orthonormal columns, into which the norms'
    gains are folded first (rotations commute with RMSNorm: Ashkboos et al. 2024, SliceGPT, arXiv:2401.15024); RMSNorm
    of the longer vector is corrected by one factor. The added heads have random weights and an output of zero. Embedding
    and output layer become two tensors.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    state = {k: v.double() for k, v in torch.load(source / "state.pt").items()}
    narrow, dim = (
        config["hidden_size"],
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
    )
    rng = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(hidden, narrow, generator=rng, dtype=torch.float64)).Q
    shrink = narrow / hidden
    gain = torch.full((hidden,), shrink**0.5, dtype=torch.float64)
    wide: dict[str, torch.Tensor] = {}
    wide["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] @ q.T
    wide["lm_head.weight"] = (state["model.embed_tokens.weight"] * state["model.norm.weight"]) @ q.T
    wide["model.norm.weight"] = gain

    def more(weight: torch.Tensor, rows: int, std: float) -> torch.Tensor:
        extra = torch.randn(rows - len(weight), weight.shape[1], generator=rng, dtype=torch.float64) * std
        return torch.cat([weight, extra])

    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        before, after = (state[f"{at}{n}.weight"] for n in ("input_layernorm", "post_attention_layernorm"))
        wide[f"{at}input_layernorm.weight"] = wide[f"{at}post_attention_layernorm.weight"] = gain
        for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
            weight = (state[f"{at}self_attn.{name}.weight"] * before) @ q.T
            wide[f"{at}self_attn.{name}.weight"] = more(weight, count * dim, float(weight.std()))
        o = q @ state[f"{at}self_attn.o_proj.weight"]
        wide[f"{at}self_attn.o_proj.weight"] = torch.cat(
            [o, o.new_zeros(hidden, heads * dim - o.shape[1])], 1
        )
        for name in ("gate_proj", "up_proj"):
            wide[f"{at}mlp.{name}.weight"] = (state[f"{at}mlp.{name}.weight"] * after) @ q.T
        wide[f"{at}mlp.down_proj.weight"] = q @ state[f"{at}mlp.down_proj.weight"]
    config |= {
        "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim,
        "tie_word_embeddings": False, "rms_norm_eps": config["rms_norm_eps"] * shrink,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    torch.save({k: v.float() for k, v in wide.items()}, out / "state.pt")
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (out / "tokens.pt").unlink(missing_ok=True)
    (out / "tokens.pt").symlink_to((source / "tokens.pt").resolve())


def settle(folder: Path, steps: int = 300, rate: float = 1e-4) -> tuple[float, float]:
    """Train all weights of the widened model on general text, so that the added dimensions come into use.

    Returns the loss on the last 20 general chunks before and after; those are not trained on.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.AutoConfig.from_pretrained(folder / "config.json")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(torch.load(folder / "state.pt"))
    model.to(device)
    tokens = torch.load(folder / "settle.pt")
    general = torch.load(folder / "tokens.pt")["general"][-20:].to(device)

    @torch.no_grad()
    def loss() -> float:
        return float(model(input_ids=general, labels=general).loss)

    before = loss()
    adam = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - step / steps)
        batch = tokens[torch.randint(len(tokens), (16,), generator=torch.Generator().manual_seed(step))].to(
            device
        )
        with torch.autocast(device, dtype=torch.bfloat16):
            batch_loss = model(input_ids=batch, labels=batch).loss
        batch_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
    after = loss()
    torch.save({k: v.detach().cpu() for k, v in model.state_dict().items()}, folder / "state.pt")
    return before, after


def text_chunks(gguf: Path, files: list[Path], out: Path) -> None:
    """Chunks of plain text files, and of question-answer rows as chats, into settle.pt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    ids: list[int] = []
    for file in files:
        texts = map(_chat, _rows(file)) if file.suffix == ".jsonl" else [file.read_text(encoding="utf-8")]
        for text in texts:
            ids += tokenizer(text, add_special_tokens=False).input_ids
    torch.save(_chunks(ids), out / "settle.pt")


def _save(model: Any, out: Path) -> None:
    torch.save({k: v.half() for k, v in model.state_dict().items()}, out / "state.pt")
    model.config.dtype = torch.float32
    model.config.to_json_file(out / "config.json", use_diff=False)


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _chat(row: dict[str, str]) -> str:
    question = f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{row['output']}<|im_end|>\n"


def _chunks(ids: list[int]) -> torch.Tensor:
    count = len(ids) // CHUNK
    return torch.tensor(ids[: count * CHUNK]).view(count, CHUNK)
