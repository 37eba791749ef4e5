"""A checkpoint as an ONNX Runtime GenAI folder: made by its model builder, checked file by file, and run by its runtime."""
