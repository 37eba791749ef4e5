"""Base models in: a hub snapshot, a local folder, or a GGUF file, all out as one plain checkpoint folder."""
