"""How the finished model is served: context, KV cache, sampling. Its only product is its facts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgeft.bundle.launch import CHECKPOINTS
from edgeft.fit.memory import Serving
from edgeft.stage import Facts, Job, Params, Stage


class Serve(Params):
    context: int = Field(2048, ge=256)
    """Tokens of one conversation: question, answer, and all before them."""
    kv_type: Literal["f16", "q8_0", "q4_0"] = "f16"
    """How keys and values of the context are stored."""
    parallel: int = Field(1, ge=1)
    """Conversations served at once; each has a context of its own."""
    mmap: bool = False
    """Map the model file instead of reading it. Starts faster, but weights that llama.cpp repacks then lie in
    memory twice."""
    prompt_cache_mb: int = Field(0, ge=0)
    """Memory for earlier conversations, so that they need not be read again."""
    temperature: float = Field(0.0, ge=0)
    """0 always takes the most probable token."""
    top_k: int = Field(40, ge=0)
    """Draw among this many tokens; 0 for all."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Draw among the tokens that together have this probability."""
    min_p: float = Field(0.05, ge=0, le=1)
    """Leave out tokens less probable than this share of the first."""
    repeat_penalty: float = Field(1.0, gt=0)
    """Above 1, tokens said already become less probable."""
    system: str = ""
    """The system prompt; empty for the template's own."""
    host: str = "127.0.0.1"
    """Where the bundle's server listens. Anything else is open to the network: give it a key."""
    port: int = Field(8080, ge=1, le=65535)

    def serving(self) -> Serving:
        """What of it costs memory, as the fit package takes it."""
        given = self.model_dump(include=set(Serving.__dataclass_fields__))
        return Serving(**given, checkpoints=CHECKPOINTS)


def run(job: Job[Serve]) -> Facts:
    p = job.params
    many = f", {p.parallel} at once" if p.parallel > 1 else ""
    return {"summary": f"context {p.context}{many}, KV cache {p.kv_type}", **p.model_dump(mode="json")}


STAGE = Stage(name="serve", params=Serve, run=run)
