"""One worker: trains and scores the arms of a plan, those first whose starting point is there."""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shipping.network import Network

BATCH = 16


class Worker:
    """A model on one GPU, and the arms that it is given."""

    def __init__(self, folder: Path, ggml: str, deadline: float) -> None:
        self.folder, self.deadline = folder, deadline
        self.net = Network(folder, ggml)
        self.tokens = torch.load(folder / "tokens.pt")
        self.done = folder / "done"
        self.done.mkdir(exist_ok=True)
        self.graphs = self.net.device == "cuda"

    def work(self, plan: list[dict[str, Any]]) -> None:
        """Every arm is taken by the first worker that creates its claim."""
        left = plan[:]
        while left and time.time() < self.deadline:
            left = [a for a in left if not self._hopeless(a)]
            ready = next(
                (a for a in left if not a.get("start") or (self.done / f"{a['start']}.pt").exists()), None
            )
            if ready is None:
                time.sleep(0.5)
                continue
            left.remove(ready)
            try:
                os.close(os.open(self.done / f"{ready['name']}.claim", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            try:
                getattr(self, ready["way"])(ready)
            except Exception:  # noqa: BLE001  one arm that fails must not end the others
                (self.done / f"{ready['name']}.failed").touch()
                print(f"FAILED {ready['name']}\n{traceback.format_exc()}", flush=True)

    def _hopeless(self, arm: dict[str, Any]) -> bool:
        """Its starting point is not there, and the arm that makes it failed; the importance matrix is the base's."""
        start = arm.get("start", "")
        maker = "base" if start == "imatrix" else start
        return (self.done / f"{maker}.failed").exists() and not (self.done / f"{start}.pt").exists()

    def base(self, arm: dict[str, Any]) -> None:
        """The base itself, and quantized."""
        net = self.net
        net.use(net.base)
        self.score(arm, "base")
        imatrix = net.imatrix(self.tokens["train"][0][:40])
        self._save("imatrix", imatrix)
        for label in arm["types"]:
            net.use(net.dequantized(net.quantized(net.base, label, imatrix), label))
            self.score(arm, f"base {label}")

    def lora(self, arm: dict[str, Any]) -> None:
        """A LoRA on the 16-bit base, and the same merged and quantized with an importance matrix of its own: mode A."""
        net, rng = self.net, torch.Generator().manual_seed(arm["seed"] + 1)
        net.use(net.base, "adapted")
        parameters = [
            p for layer in net.layers.values() for p in layer.fresh_adapter(arm.get("rank", 16), rng)
        ]
        seconds = self.train(arm, [(parameters, arm["lr"])])
        start = {
            "a": {n: x.a for n, x in net.layers.items()}, "b": {n: x.b for n, x in net.layers.items()}, "scaling": 2.0,
        }  # fmt: skip
        merged = net.merged(start)
        net.use(merged)
        start["imatrix"] = net.imatrix(self.tokens["train"][arm["seed"]][:40])
        self.score(arm, arm["name"], seconds=seconds, keep=arm.get("keep", False))
        self._save(arm["name"], start)
        for label in arm.get("types", []):
            net.use(net.dequantized(net.quantized(merged, label, start["imatrix"]), label))
            self.score(arm, f"A {label} of {arm['name']}")

    def adapter(self, arm: dict[str, Any]) -> None:
        """Mode B: a LoRA on the quantized base, shipped beside it."""
        net, rng = self.net, torch.Generator().manual_seed(arm["seed"] + 1)
        packed = net.quantized(
            net.base, arm["type"], torch.load(self.done / "imatrix.pt", map_location=net.device)
        )
        net.use(net.dequantized(packed, arm["type"]), "adapted")
        parameters = [
            p for layer in net.layers.values() for p in layer.fresh_adapter(arm.get("rank", 16), rng)
        ]
        seconds = self.train(arm, [(parameters, arm["lr"])])
        self._await_reference(arm["seed"])
        self.score(arm, arm["name"], seconds=seconds)

    def merged(self, arm: dict[str, Any]) -> None:
        """Mode C: mode A's file of the starting point, trained on through its rounding."""
        net, rng = self.net, torch.Generator().manual_seed(arm["seed"] + 1)
        start = torch.load(self.done / f"{arm['start']}.pt", map_location=net.device)
        weights, kinds = net.merged(start), net.kinds(arm["type"])
        packed = net.quantized(weights, arm["type"], start["imatrix"])
        net.use(weights, "rounded")
        parameters, scales = [], []
        for name, layer in net.layers.items():
            parameters += layer.fresh_adapter(arm.get("rank", 64), rng)
            scales += layer.through(packed[name], kinds[name], learn=arm.get("learn", True))
        seconds = self.train(arm, [(parameters, arm["lr"]), (scales, arm.get("scale_lr", arm["lr"]))])
        self._await_reference(arm["seed"])
        self.score(arm, arm["name"], seconds=seconds)

    def train(self, arm: dict[str, Any], groups: list[tuple[list[torch.Tensor], float]]) -> float:
        """AdamW, warm-up over 20 steps and a cosine to zero. Returns seconds."""
        device, skip = self.net.device, arm.get("skip", 0)
        # On the device: from the host, every copy of a batch waits for the step before.
        data = self.tokens["train"][arm["seed"]].to(device)
        groups = [(parameters, rate) for parameters, rate in groups if parameters]
        every = [p.requires_grad_(True) for parameters, _ in groups for p in parameters]
        rates = [torch.tensor(0.0, device=device) for _ in groups]
        adam = torch.optim.AdamW(
            [{"params": p, "lr": r} for (p, _), r in zip(groups, rates, strict=True)],
            weight_decay=0.0, capturable=device == "cuda", foreach=device == "cuda",
        )  # fmt: skip
        batch = data[:BATCH].clone()

        def step() -> None:
            with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False):
                logits = self.net.model(input_ids=batch, use_cache=False).logits[:, :-1]
            torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(every, 1.0)
            adam.step()

        run = self._graph(step, adam) if self.graphs else None
        started = time.time()
        for i in range(arm["steps"]):
            at = (skip + i) * BATCH % (len(data) - BATCH)
            batch.copy_(data[at : at + BATCH])
            pace = min(1, (i + 1) / 20) * 0.5 * (1 + math.cos(math.pi * i / arm["steps"]))
            for rate, (_, highest) in zip(rates, groups, strict=True):
                rate.fill_(highest * pace)
            if run:
                run.replay()
            else:
                adam.zero_grad()
                step()
        if device == "cuda":
            torch.cuda.synchronize()
        for p in every:
            p.requires_grad_(False)
            p.grad = None
        del run
        return time.time() - started

    def _graph(self, step: Any, adam: Any) -> Any:
        """The step as one CUDA graph: thousands of small kernels without waiting for Python. The three trial steps that
        it takes run at a learning rate of zero, and the optimizer forgets them."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                adam.zero_grad()
                step()
        torch.cuda.current_stream().wait_stream(side)
        adam.zero_grad()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step()
        except RuntimeError as error:
            print(f"no CUDA graph: {error}", flush=True)
            self.graphs, graph = False, None
        for state in adam.state.values():
            for value in state.values():
                value.zero_()
        return graph

    def _await_reference(self, seed: int) -> None:
        """Until the 16-bit LoRA of this seed has said its probabilities, when a worker is at it: two minutes at most."""
        until, about = time.time() + 120, f"lora-{seed}"
        while (self.done / f"{about}.claim").exists() and time.time() < until:
            if any((self.done / name).exists() for name in (f"said-{seed}.pt", f"{about}.failed")):
                return
            time.sleep(0.5)

    def score(self, arm: dict[str, Any], name: str, *, seconds: float = 0.0, keep: bool = False) -> None:
        """Held-out and general losses of the weights in use, into a file of their own."""
        found: dict[str, Any] = {}
        reference = self.done / f"said-{arm['seed']}.pt"
        said = torch.load(reference) if reference.exists() and not keep else {}
        kept = {}
        for text in ("heldout", "general"):
            nll, kld, kept[text] = self.net.losses(self.tokens[text], said.get(text), keep)
            found[text] = nll.astype(np.float32)
            if kld is not None:
                found[f"{text}_kld"] = kld.astype(np.float16)
        if keep:
            self._save(f"said-{arm['seed']}", kept)
        np.savez(self.done / f"{name.replace(' ', '_')}.npz", **found)
        line = {k: round(float(v.mean()), 5) for k, v in found.items()}
        print(
            json.dumps({"name": name, **line, "steps": arm.get("steps", 0), "seconds": round(seconds, 1)}),
            flush=True,
        )

    def _save(self, name: str, what: Any) -> None:
        aside = self.done / f"{name}.{os.getpid()}"
        torch.save(what, aside)
        aside.replace(self.done / f"{name}.pt")
