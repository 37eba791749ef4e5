"""Training on the very numbers of a quantized GGUF file: its block types, and models whose weights stay in them."""
