"""Fine-tune a small model, prove that it survived quantization, ship it to a device."""

__version__ = "0.1.0"
