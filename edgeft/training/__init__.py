"""Teaches a causal language model with low-rank adapters on a frozen base: QLoRA, LoRA on 16-bit weights, or
LoRA on the blocks of a GGUF file.

Importing this is cheap; torch comes in with the first call.
"""

from edgeft.training.model import Packed, load_base, load_trained
from edgeft.training.modules import resolve
from edgeft.training.settings import Outcome, Settings

__all__ = ["Outcome", "Packed", "Settings", "load_base", "load_trained", "resolve"]
