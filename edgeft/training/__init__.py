"""Teaches a causal language model with low-rank adapters on a frozen base: QLoRA, or LoRA on 16-bit weights.

Importing this is cheap; torch comes in with the first call.
"""

from edgeft.training.model import load_base, load_trained
from edgeft.training.modules import resolve
from edgeft.training.settings import Outcome, Settings

__all__ = ["Outcome", "Settings", "load_base", "load_trained", "resolve"]
