"""Exact checks on weights, step by step: each names the step and the tensor at fault.

| function | step | compares |
|---|---|---|
| `merged` | merged | a 16-bit checkpoint with base + scale · B A |
| `gguf` | gguf | a 16-bit GGUF file with the checkpoint it was converted from |
| `quantized` | quantized | a quantized GGUF file with the 16-bit one it was made from |

No model is run and no tensor is held whole.
"""

from edgeft.parity.checks.converted_weights import gguf
from edgeft.parity.checks.file_weights import quantized
from edgeft.parity.checks.merged_weights import merged

__all__ = ["gguf", "merged", "quantized"]
