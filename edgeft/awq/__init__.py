"""AWQ: a 16-bit checkpoint to a folder of 4-bit weights that vLLM, SGLang and transformers load, and back (docs/awq.md)."""

from edgeft.awq.groups import Loader, loaders
from edgeft.awq.quantize import Quantized, Settings, quantize

__all__ = ["Loader", "Quantized", "Settings", "loaders", "quantize"]
