"""The web chat beside the server: in the key as what it is, refused before anything runs, in its place on the device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from edgeft.errors import SetupError
from edgeft.export import web
from edgeft.llamacpp import web as page
from edgeft.stage import Params, Stage, Step
from edgeft.stages import export_oci


class Table(Params):
    web_chat: web.WebChat = False


def key(**given):
    return Step(Stage(name="export", params=Table, run=lambda job: {}), Table(**given)).key


@pytest.fixture
def built(tmp_path, monkeypatch):
    """A page in the cache's place."""
    for name in (*page.PAGE, page.LICENCES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(page, "ensure_web", lambda: tmp_path)
    return tmp_path


def test_another_page_is_another_step_where_it_is_wanted_and_there_alone(monkeypatch):
    with_page, without = key(web_chat=True), key()
    monkeypatch.setattr(page, "pin", lambda: "another")
    assert key(web_chat=True) != with_page
    assert key() == key(web_chat=False) == without


def test_without_npm_the_export_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(export_oci.staging, "runnable", lambda step, artifacts: None)
    wanted = SimpleNamespace(params=export_oci.Oci(web_chat=True))
    with pytest.raises(SetupError, match="npm is not installed") as caught:
        export_oci.STAGE.check(wanted, {})
    assert "Node.js" in caught.value.hint
    export_oci.STAGE.check(SimpleNamespace(params=export_oci.Oci()), {})


def test_the_page_and_its_licences_lie_beside_the_server(built):
    assert web.entries(False) == {}
    found = web.entries(True)
    assert set(found) == {
        f"usr/lib/edgeft/web/{name}"
        for name in ("index.html", "build.json", "_app/version.json", "LICENSES.txt")
    }
    assert found["usr/lib/edgeft/web/index.html"].content == built / "index.html"
