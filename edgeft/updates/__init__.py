"""Signed updates, the side that makes them: keys, metadata, deltas, and the one file that goes to a device."""
