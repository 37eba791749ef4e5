from __future__ import annotations

import pytest

from edgeft.errors import SetupError
from edgeft.llamacpp import web


def test_without_npm_the_web_chat_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert web.built_web() is None
    with pytest.raises(SetupError, match="npm is not installed") as caught:
        web.ensure_web()
    assert "without the web page" in caught.value.hint
    assert not (tmp_path / "cache").exists()
