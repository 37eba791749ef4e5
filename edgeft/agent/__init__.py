"""The program that updates a model on the device, safe against power loss at every instant.

It runs there alone, with Python 3.10 or later, its standard library, and `tuf`, `securesystemslib` and `cryptography`;
nothing of the rest of edgeft is with it. What it leaves behind is described in docs/updates.md.
"""
