"""Formats that carry a finished model onto a device: Debian packages, container images, Ollama's folders.

Pure functions from files to a file: the same contents give the same bytes. What the contents are is `edgeft.staging`'s.
"""
