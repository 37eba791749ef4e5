from __future__ import annotations

from pathlib import Path

import pytest

from edgeft.corpus import template
from tests.corpus.models import save


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A folder with a ChatML tokenizer whose pad token is its end-of-turn token."""
    return save(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def chatml(model) -> template.Template:
    return template.load(model)
