"""The bundle that goes to a board: one deterministic tar.zst that says of every file what it is and whence it came."""

from edgeft.bundle.archive import Content, manifest_of, manifest_text, verify_bundle, write_bundle
from edgeft.bundle.launch import Settings, modelfile, run_script, server_arguments

__all__ = [
    "Content",
    "Settings",
    "manifest_of",
    "manifest_text",
    "modelfile",
    "run_script",
    "server_arguments",
    "verify_bundle",
    "write_bundle",
]
