from __future__ import annotations

import json

import pytest

from edgeft.errors import ToolError
from edgeft.llamacpp.web_notices import notices


def package(ui, name, text="", **about):
    folder = ui / "node_modules" / name
    folder.mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": name, "version": "1.0", **about}))
    if text:
        (folder / "LICENSE.md").write_text(text)
    return f"node_modules/{name}/dist/index.js"


def test_the_notices_name_every_package_once_with_its_licence(tmp_path):
    vendored = tmp_path / "src/lib/vendors/algebra"
    vendored.mkdir(parents=True)
    (vendored / "LICENCE").write_text("for algebra")
    (tmp_path / "LICENSE").write_text("for llama.cpp")
    files = [
        package(tmp_path, "one", "for both", license="MIT", repository={"url": "git+https://example.com/one.git"}),
        package(tmp_path, "@of/two", "for both", license="MIT"),
        package(tmp_path, "@of/two/node_modules/one", "for the old one", licenses=[{"type": "ISC"}]),
        package(tmp_path, "bare", license="BSD-3-Clause"),
        "src/app.css",
    ]  # fmt: skip
    text = notices(tmp_path, [*files, *files], licence=tmp_path / "LICENSE")
    assert text.count("one 1.0  MIT  https://example.com/one\n") == 1
    assert text.count("for both") == 1 and "@of/two/node_modules/one 1.0  ISC\n\nfor the old one" in text
    assert "for llama.cpp" in text and "for algebra" in text
    assert "bare 1.0  BSD-3-Clause\n\n(brings no text of its own)" in text


def test_a_package_without_any_licence_is_refused(tmp_path):
    (tmp_path / "src/lib/vendors").mkdir(parents=True)
    (tmp_path / "LICENSE").write_text("for llama.cpp")
    with pytest.raises(ToolError, match=r"npm package whose 1\.0 says nothing about its licence"):
        notices(tmp_path, [package(tmp_path, "whose")], licence=tmp_path / "LICENSE")
