"""A folder for Ollama whose template is proven to write the prompts that the model was trained on, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeft import bundle, estimates, llamacpp, staging
from edgeft.export import ollama
from edgeft.export.files import plain
from edgeft.export.go_template import Message
from edgeft.export.translate import Translation, translate
from edgeft.stage import Facts, Job, Params, Stage, digest

FILE = "ollama.tar"
_FURTHER: tuple[tuple[Message, ...], ...] = (
    tuple({"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(9)),
    ({"role": "user", "content": "Think."}, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."},
     {"role": "user", "content": "And?"}),
)  # fmt: skip
"""What the checks of a served prompt do not have: a long conversation, and an answer with thoughts."""


class Ollama(Params):
    pass


def run(job: Job[Ollama]) -> Facts:
    tree = staging.collect(job.inputs)
    found = translated(tree.model)
    ollama.quotable(found.template, "the template")
    ollama.quotable(tree.settings.system, "serve.system")
    written = bundle.modelfile(tree.settings, tree.stop, adapter=bool(tree.adapter), template=found.template)
    notes = "".join(f"# Note: {note}.\n" for note in found.notes).encode()
    contents = {**tree.models, **tree.papers, "Modelfile": notes + written}
    manifest = bundle.manifest_text(bundle.manifest_of(contents, tree.about))
    ollama.write(plain({**contents, "manifest.json": manifest}, tree.settings.name), job.out / FILE)
    size = (job.out / FILE).stat().st_size
    return {
        "summary": f"{size / 1e6:,.1f} MB; {found.compared} conversations rendered as the model's own template does"
        + "".join(f"; {note}" for note in found.notes),
        "file": FILE, "bytes": size, "sha256": digest(job.out / FILE), "compared": found.compared,
        "notes": list(found.notes), "template": found.template, "files": sorted(contents),
    }  # fmt: skip


def translated(gguf: Path) -> Translation:
    """The template inside a GGUF file, for Ollama. Raises StageError when it cannot be translated and proven equal."""
    llamacpp.activate()
    llamacpp.ensure("library")
    from edgeft.llamacpp.decode import Decoder
    from edgeft.parity.checks import prompts
    from edgeft.parity.checks.corpus import CONVERSATIONS

    with Decoder(gguf, vocab_only=True) as file:
        own = prompts.of_file(file)

        def render(messages: Sequence[Message], variables: Mapping[str, Any]) -> str | None:
            text = own.text(messages, variables=variables)
            return None if text is None else prompts.served_text(file, text)

        return translate(render, [*CONVERSATIONS, *_FURTHER])


STAGE = Stage(
    name="export", kind="ollama", params=Ollama, run=run, per_target=True, extra="train", needs=staging.NEEDS,
    makes=(FILE,), tools=(llamacpp.LIBRARY,), check=staging.check, estimate=estimates.bundle,
)  # fmt: skip
