"""Which exact questions can be asked between the models of a chain, and their answers.

A checkpoint and the first GGUF file after it, that file and the shipped one, and the shipped one and its server: each
neighbours are compared, so that what differs names the step that made it differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft import progress
from edgeft.llamacpp.decode import Decoder
from edgeft.parity.checks import exact, folder, packed_weights, rendering, tokens, weights
from edgeft.parity.checks.check import Check
from edgeft.parity.opening import is_gguf

if TYPE_CHECKING:
    from edgeft.parity.certify import Request
    from edgeft.parity.served import Session

PLAIN_TYPES = {"F32", "F16", "BF16"}


def checks(request: Request, texts: Sequence[str]) -> list[Check]:
    """Every check that the request's models allow; `texts` are tokenized beside the built-in ones."""
    folders = [p for p in (request.reference, *request.via) if not is_gguf(p)]
    files = [p for p in (request.reference, *request.via, request.shipped) if is_gguf(p)]
    found: list[Check] = []
    merged = next((p for p in request.via if not is_gguf(p)), None)
    if request.adapter and merged:
        progress.report("check the merged weights")
        found += weights.merged(request.reference, request.adapter, merged)
    if folders:
        progress.report("check the conversion")
        found += _conversion(folders[-1], files[0], texts, whole=merged is not None or not request.adapter)
    for before, after in pairwise(files):
        progress.report(f"check {after.name}")
        if _is_plain(before):
            found += weights.quantized(before, after)
        with Decoder(before, vocab_only=True) as a, Decoder(after, vocab_only=True) as b:
            found += tokens.between_files(a, b, texts, step="quantized")
    progress.report("check the server")
    return [
        *found,
        *(
            rendering.against_checkpoint(folders[-1], files[-1])
            if folders
            else rendering.between_files(files[0], files[-1])
        ),
    ]


def of_folder(request: Request, kind: str, session: Session, texts: Sequence[str]) -> list[Check]:
    """Every check of a folder of the format `kind` that the request's checkpoints allow; `session` has it open."""
    checkpoint = [p for p in (request.reference, *request.via) if not is_gguf(p)][-1]
    merged = next((p for p in request.via if not is_gguf(p)), None)
    found: list[Check] = []
    if request.adapter and merged:
        progress.report("check the merged weights")
        found += weights.merged(request.reference, request.adapter, merged)
    base = request.reference if request.adapter and merged else request.base
    if merged or not request.adapter:
        progress.report("check the packed weights")
        base = base if base and not is_gguf(base) else None
        found += packed_weights.checks(kind, request.shipped, checkpoint, base)
    progress.report("check the folder and its runtime")
    return [*found, *folder.against_checkpoint(checkpoint, request.shipped, session, texts)]


def _conversion(checkpoint: Path, file: Path, texts: Sequence[str], *, whole: bool) -> list[Check]:
    """The checkpoint against the first GGUF file; `whole`: the file was made from just this checkpoint."""
    if whole and _is_plain(file):
        return [*exact.compare(checkpoint, file, texts).checks, *weights.gguf(checkpoint, file)]
    with Decoder(file, vocab_only=True) as decoder:
        return tokens.against_checkpoint(checkpoint, decoder, texts)


def _is_plain(file: Path) -> bool:
    from edgeft.llamacpp import tensor_types

    return set(tensor_types.types_in(file).counts) <= PLAIN_TYPES
