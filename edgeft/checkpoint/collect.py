"""Checkpoint folders: which files belong to one, and how they come into the store from a folder or the hub."""

from __future__ import annotations

import json
import logging
import os
import shutil
import urllib.request
from pathlib import Path

from edgeft import progress
from edgeft.errors import RecipeError, SetupError

log = logging.getLogger(__name__)

WANTED = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "*.tiktoken", "*.model",
    "LICENSE*", "NOTICE*", "README.md",
)  # fmt: skip
"""Everything a checkpoint needs to be trained, merged and converted. Pickled weights (*.bin) are never read."""


def copy_checkpoint(source: Path, out: Path) -> None:
    """Copy a local checkpoint folder's files. Raises RecipeError when it is not one."""
    names = sorted({p for pattern in WANTED for p in source.glob(pattern) if p.is_file()})
    out.mkdir(parents=True, exist_ok=True)
    for i, path in enumerate(names):
        progress.report("copy the base", i, len(names), unit="files")
        shutil.copyfile(path, out / path.name)
    refuse_unusable(out, str(source))


def download_checkpoint(repo: str, revision: str, out: Path) -> None:
    """Fetch a hub repository at a pinned commit. Honours HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.

    Raises SetupError with the hub's own reason when it cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    progress.report(f"download {repo}")
    try:
        found = snapshot_download(repo, revision=revision, allow_patterns=list(WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise SetupError(
            f"{repo}@{revision[:8]} could not be downloaded: {reason}",
            hint="check the name, the revision and the network; a gated model needs HF_TOKEN; a machine without "
            "network can give [base] path = a folder that holds the checkpoint",
        ) from e
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(found).iterdir()):
        if path.is_file():
            _link_or_copy(path.resolve(), out / path.name)
    refuse_unusable(out, repo)


def _link_or_copy(source: Path, target: Path) -> None:
    """The hub's cache never changes a file in place, so a hard link saves a second copy of the weights."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def fetch_config(repo: str, revision: str, folder: Path) -> bool:
    """Bring a hub model's config.json into `folder`, so that its size is known before its download.

    One short request without retries; returns whether the file is there. A missing network, name or permission is
    no error here: the download will say it.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    request = urllib.request.Request(
        hf_hub_url(repo, "config.json", revision=revision), headers=build_hf_headers()
    )
    try:
        with urllib.request.urlopen(request, timeout=3) as response:
            text = response.read(1 << 20).decode()
        json.loads(text)
    except (OSError, ValueError) as e:
        log.debug("no config.json of %s: %s", repo, e)
        return False
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".config.{os.getpid()}"
    aside.write_text(text, encoding="utf-8")
    aside.replace(folder / "config.json")
    return True


def refuse_unusable(folder: Path, name: str) -> None:
    """Raise RecipeError when the folder cannot be trained, merged and converted."""
    if not (folder / "config.json").is_file():
        raise RecipeError(f"{name} has no config.json, so it is not a checkpoint folder")
    if not any(folder.glob("*.safetensors")):
        raise RecipeError(
            f"{name} has no *.safetensors weights",
            hint="convert pickled weights first: model.save_pretrained(folder)",
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise RecipeError(
            f"{name} is already quantized ({method}); quantizing twice loses more than the file's name says",
            hint="give the 16-bit original",
        )
    if not any(
        (folder / f).is_file()
        for f in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        raise RecipeError(f"{name} has no tokenizer files")
