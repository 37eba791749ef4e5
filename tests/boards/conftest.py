from tests.llamacpp.conftest import tiny

__all__ = ["tiny"]
