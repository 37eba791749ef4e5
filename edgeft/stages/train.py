"""Train an adapter on the base with the tokenized conversations of the data stage."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from edgeft import estimates
from edgeft.errors import RecipeError
from edgeft.stage import Facts, Job, Params, Stage
from edgeft.training.settings import Optimizer, Settings

log = logging.getLogger(__name__)

_NOT_ADAPTED = ("lm_head", "embed_tokens", "embed_out", "output_layer", "wte", "word_embeddings", "embed_in")


class Train(Params):
    method: Literal["qlora", "lora", "grid-adapter", "grid-merged"] = "qlora"
    """`qlora` holds the base in 4 bits (NF4, double quantization) while training; `lora` in the compute dtype.
    `grid-adapter` holds it in the very file that [[quantize]] names, and ships that file with the adapter beside it.
    `grid-merged` begins as `lora` and then trains on through the rounding of each [[quantize]] file: one plain file."""
    grid_share: float = Field(default=0.75, gt=0, lt=1)
    """With `grid-merged`: the share of the steps that goes through the rounding."""
    rank: int = Field(default=16, ge=1, le=1024)
    """Width of the adapter: its capacity, and its size."""
    alpha: float = Field(default=32, gt=0)
    """The adapter counts alpha / rank times (with `rslora`, alpha / sqrt(rank))."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs that is dropped while training."""
    rslora: bool = False
    """Rank-stabilized scaling, for ranks of 64 and more."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """The layers that get an adapter: all linear layers of the decoder blocks, or names such as ["q_proj"]."""
    learning_rate: float = Field(default=2e-4, gt=0, lt=1)
    """At its highest, after the warm-up; it falls to zero along a cosine."""
    epochs: float = Field(default=2.0, gt=0)
    """Passes over the training rows."""
    max_steps: int = Field(default=0, ge=0)
    """Stop after so many optimizer steps; 0: when the epochs are through."""
    batch_size: int = Field(default=8, ge=1)
    """Rows that go through the model together."""
    accumulation: int = Field(default=1, ge=1)
    """Batches a step: a step sees batch_size x accumulation rows."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Pulls the adapter towards zero."""
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between two measurements of the held-out loss; 0: five in the run."""
    patience: int = Field(default=3, ge=0)
    """Stop after so many measurements without a better held-out loss; 0: never. The best adapter is kept."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Steps between checkpoints, from which a killed run goes on; 0: one a minute."""
    seed: int = 0
    """Of the adapter's first values, the order of the rows and the dropout."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the matrix products; auto: bfloat16 where the hardware has it, else float32."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Compute activations again instead of keeping them: less memory, a third more time. auto: on a GPU, and on a
    CPU from a billion parameters."""
    optimizer: Optimizer = "auto"
    """auto: paged 8-bit AdamW on a GPU, torch's AdamW on a CPU."""

    @field_validator("target_modules")
    @classmethod
    def _no_embeddings(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list):
            if not value:
                raise ValueError('name at least one layer, or write "all-linear"')
            for name in value:
                if name.rpartition(".")[2] in _NOT_ADAPTED:
                    raise ValueError(
                        f"{name} cannot be adapted: embeddings and output layer are often one tensor, "
                        "and an adapter file for llama.cpp cannot hold them"
                    )
        return value

    @model_validator(mode="after")
    def _fits_the_method(self) -> Train:
        if self.method != "grid-merged" and "grid_share" in self.model_fields_set:
            raise ValueError(f'grid_share is the share of method = "grid-merged", not of {self.method!r}')
        if self.method == "grid-merged" and self.dropout:
            raise ValueError(
                f'dropout = {self.dropout:g} cannot go with method = "grid-merged": there the adapter is part of the '
                "weights that are rounded, and has no inputs of its own to drop; leave dropout out"
            )
        return self

    @model_serializer(mode="wrap")
    def _what_applies(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A share that the method does not know is not part of the step's key."""
        found: dict[str, Any] = dump(self)
        if self.method != "grid-merged":
            del found["grid_share"]
        return found

    def wants_table(self) -> str:
        return "quantize" if self.method.startswith("grid") else ""


def run(job: Job[Train]) -> Facts:
    from edgeft import merging
    from edgeft.training import Packed, loop, model, modules, rows, specials

    params, base = job.params, job.inputs["base"].path / "model"
    data, end_of_turn = job.inputs["data"], int(job.inputs["data"].facts["end_of_turn_id"])
    train, heldout = (rows.read_rows(data.path / f"{split}.jsonl") for split in ("train", "heldout"))
    device = model.pick_device()
    empty = model.skeleton(base)
    context = int(getattr(empty.config.get_text_config(), "max_position_embeddings", 0) or 0)
    rows.check_rows(train, end_of_turn=end_of_turn, split="train", context=context)
    rows.check_rows(heldout, end_of_turn=end_of_turn, split="held-out", context=context)
    targets = modules.resolve(empty, params.target_modules)
    merging.check_bindable(base, empty, targets.names)
    whole = _settings(params, device=device, size=sum(p.numel() for p in empty.parameters()))
    settings = _first_part(params, whole, len(train))

    packed, started = None, "base"
    if params.method == "grid-adapter":
        grid = job.inputs["quantize/grid"]
        packed = Packed(file=grid.path / "model.gguf", plain=job.inputs["gguf/base"].path / "model.gguf")
        started = f"base in {grid.facts['type']}"
    method: model.Method = "lora" if params.method == "grid-merged" else params.method
    bare = model.load_base(
        base, method=method, device=device, compute_dtype=params.compute_dtype, packed=packed
    )
    tuned = model.attach(
        bare, targets, rank=params.rank, alpha=params.alpha, dropout=params.dropout, rslora=params.rslora,
        seed=params.seed,
    )  # fmt: skip
    if packed:
        _refuse_unwritable(tuned, base, packed.file)
    suspects = specials.untrained(bare, base, train)
    dtype = str(model.pick_dtype(params.compute_dtype, device=device)).removeprefix("torch.")
    log.info(
        "%s on %s, compute %s, optimizer %s, %d rows, %d steps",
        method, model.device_name(device), dtype, settings.resolved_optimizer(), len(train),
        settings.steps(len(train)),
    )  # fmt: skip
    outcome = loop.train(tuned, train, heldout, settings=settings, end_of_turn=end_of_turn, out=job.out)
    if outcome.end_of_turn_probability < 0.5:
        log.warning(
            "the tuned model ends a held-out answer with probability %.2f only: it may run on (C-22)",
            outcome.end_of_turn_probability,
        )
    return {
        "summary": f"held-out loss {outcome.heldout_loss_base:.3f} ({started}) → {outcome.heldout_loss:.3f}, "
        f"{outcome.steps} steps",
        **asdict(outcome),
        "curve": thin(outcome.curve, 60),
        "tokens_per_second": round(outcome.tokens / max(outcome.seconds, 1e-9), 1),
        "epochs": round(outcome.steps * params.batch_size * params.accumulation / len(train), 3),
        "rows": len(train),
        "heldout_rows": len(heldout),
        "method": method,
        "started_from": started,
        "rest": _rest(params, whole, settings, len(train)),
        "device": model.device_name(device),
        "device_kind": device.split(":")[0],
        "compute_dtype": dtype,
        "optimizer": settings.resolved_optimizer(),
        "gradient_checkpointing": settings.gradient_checkpointing,
        "target_modules": list(targets.leaves),
        "adapted_layers": len(targets.names),
        "adapted": list(targets.names),
        "trainable_parameters": sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        "untrained_special_tokens": suspects,
    }


def _refuse_unwritable(tuned: Any, base: Path, file: Path) -> None:
    """Write the adapter that has learnt nothing yet: what llama.cpp's format cannot hold is refused now, not after the
    training."""
    from tempfile import TemporaryDirectory

    from edgeft.grid import adapter
    from edgeft.training import model

    with TemporaryDirectory(prefix="edgeft-adapter-") as name:
        model.save_adapter(tuned, model.adapter_weights(tuned), Path(name))
        adapter.write(Path(name), base, file, Path(name) / "adapter.gguf")


def _first_part(params: Train, whole: Settings, rows: int) -> Settings:
    """The settings of what happens here: all of it, or for `grid-merged` the steps before those through the rounding."""
    if params.method != "grid-merged":
        return whole
    steps = whole.steps(rows)
    first = round(steps * (1 - params.grid_share))
    if not 0 < first < steps:
        raise RecipeError(
            f"train.grid_share is {params.grid_share:g}, which leaves {first} of {steps} steps for the first part",
            hint="train for more steps, or share them otherwise",
        )
    return replace(whole, max_steps=first)


def _rest(params: Train, whole: Settings, first: Settings, rows: int) -> Facts | None:
    """What `tune` has to know to go on: the whole run's settings, and how many of its rows were seen here."""
    if params.method != "grid-merged":
        return None
    return {
        "settings": asdict(whole), "rows": whole.rows(rows), "seen": first.rows(rows), "rslora": params.rslora,
    }  # fmt: skip


def thin(curve: list[dict[str, float]], most: int) -> list[dict[str, float]]:
    """At most about `most` points of a curve: those with a held-out loss, and evenly spaced others."""
    stride = max(1, len(curve) // max(1, most - sum("heldout_loss" in point for point in curve)))
    return [point for at, point in enumerate(curve) if "heldout_loss" in point or at % stride == 0]


def _settings(params: Train, *, device: str, size: int) -> Settings:
    if params.optimizer == "paged_adamw_8bit" and device == "cpu":
        raise RecipeError(
            "train.optimizer is paged_adamw_8bit, which needs a CUDA GPU", hint='leave it at "auto"'
        )
    wanted = params.gradient_checkpointing
    recompute = (device != "cpu" or size >= 10**9) if wanted == "auto" else wanted
    shared = set(Settings.__dataclass_fields__) & set(Train.model_fields)
    fields = {name: getattr(params, name) for name in shared}
    return Settings(**{**fields, "gradient_checkpointing": recompute, "device": device})


STAGE = Stage(
    name="train",
    params=Train,
    run=run,
    needs=("base", "preflight", "data"),
    takes=("quantize/grid", "gguf/base"),
    makes=("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "curve.jsonl"),
    extra="train",
    resumable=True,
    estimate=estimates.train,
)
