"""The servers that read model folders rather than GGUF files: where they are installed, how they are started, what they say."""

from edgeft.servers.find import Found, available, clean_environment, find, find_hint, installed
from edgeft.servers.vllm import Session, open_vllm

__all__ = [
    "Found",
    "Session",
    "available",
    "clean_environment",
    "find",
    "find_hint",
    "installed",
    "open_vllm",
]
