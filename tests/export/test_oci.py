"""The image is the same bytes twice, every digest is true, and only the layer that changed moves."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import shutil
import subprocess
import tarfile

import pytest

from edgeft.export import web
from edgeft.export.files import Entry
from edgeft.stages import export_oci
from edgeft.stages.export_oci import Oci

_COUNT = itertools.count()


def image(job, params=Oci(), **serve):  # noqa: B008  frozen
    done = job(f"image-{next(_COUNT)}", params, **serve)
    facts = export_oci.run(done)
    with tarfile.open(done.out / "image.oci.tar") as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}
    return done, facts, files


@pytest.fixture(scope="module")
def one(job):
    return image(job)


def blob(files, digest):
    return files["blobs/" + digest.replace(":", "/")]


def parts(files):
    """Manifest and config, each found by the digest that the document above it gives."""
    index = json.loads(files["index.json"])
    manifest = json.loads(blob(files, index["manifests"][0]["digest"]))
    return index, manifest, json.loads(blob(files, manifest["config"]["digest"]))


def members(files, layer):
    with tarfile.open(fileobj=io.BytesIO(blob(files, layer["digest"]))) as tar:
        return {m.name: m for m in tar}


def test_two_builds_give_the_same_image(job, one):
    first, facts, _ = one
    second, again, _ = image(job)
    assert (first.out / "image.oci.tar").read_bytes() == (second.out / "image.oci.tar").read_bytes()
    assert facts == again
    assert [p.name for p in first.out.iterdir()] == ["image.oci.tar"]


def test_every_blob_has_the_digest_and_size_that_is_said_of_it(one):
    _, facts, files = one
    index, manifest, config = parts(files)
    for at in (index["manifests"][0], manifest["config"], *manifest["layers"]):
        content = blob(files, at["digest"])
        assert at["digest"] == "sha256:" + hashlib.sha256(content).hexdigest() and at["size"] == len(content)
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]
    assert len(config["history"]) == len(manifest["layers"]) == len(facts["layers"])
    assert len(files) == 4 + len(manifest["layers"])  # nothing that no document names
    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}


def test_a_change_of_the_settings_moves_no_programs_and_no_model(job, one):
    _, before, _ = one
    _, after, _ = image(job, context=256)
    moved = [a != b for a, b in zip(before["layers"], after["layers"], strict=True)]
    assert moved == [False, True, False]


def test_the_image_runs_as_nobody_and_answers_its_own_machine_alone(one):
    _, _, files = one
    _, manifest, config = parts(files)
    run = config["config"]
    assert config["architecture"] == "arm64" and config["variant"] == "v8"
    assert run["User"] == "65532:65532" and "LLAMA_ARG_HOST=127.0.0.1" in run["Env"]
    assert run["Entrypoint"][:3] == ["/usr/lib/edgeft/llama-server", "--model", "/models/model.gguf"]
    assert not {"--host", "--port", "--api-key-file"} & set(run["Entrypoint"])
    found = [members(files, layer) for layer in manifest["layers"]]
    assert found[0]["usr/lib/edgeft/llama-server"].mode == 0o755 and found[0]["tmp"].mode == 0o1777
    assert set(found[-1]) == {"models", "models/model.gguf"}
    assert all((m.uid, m.gid, m.uname) == (0, 0, "") for layer in found for m in layer.values())


def test_the_web_chat_lies_beside_the_server_and_is_served(job, one, tmp_path, monkeypatch):
    (tmp_path / "index.html").write_text("page")
    entries = {f"{web.FOLDER}/index.html": Entry(content=tmp_path / "index.html")}
    monkeypatch.setattr(web, "entries", lambda wanted: entries if wanted else {})
    _, facts, files = image(job, Oci(web_chat=True))
    _, manifest, config = parts(files)
    entry = config["config"]["Entrypoint"]
    assert entry[entry.index("--path") + 1] == "/usr/lib/edgeft/web"
    assert "usr/lib/edgeft/web/index.html" in members(files, manifest["layers"][0])
    moved = [a != b for a, b in zip(one[1]["layers"], facts["layers"], strict=True)]
    assert moved == [True, False, False]
    assert "--path" not in parts(one[2])[2]["config"]["Entrypoint"]


def test_an_image_that_the_network_shall_reach_demands_a_key(job):
    _, _, files = image(job, host="0.0.0.0")
    _, _, config = parts(files)
    entry = config["config"]["Entrypoint"]
    assert entry[entry.index("--api-key-file") + 1] == "/run/secrets/edgeft-api-key"


@pytest.mark.skipif(not shutil.which("umoci"), reason="needs umoci")
def test_umoci_unpacks_what_was_packed(one, tmp_path):
    done, _, _ = one
    with tarfile.open(done.out / "image.oci.tar") as tar:
        tar.extractall(tmp_path / "layout")
    command = [
        "umoci",
        "unpack",
        "--rootless",
        "--image",
        f"{tmp_path}/layout:edgeft/tiny-model:latest",
        tmp_path / "bundle",
    ]
    subprocess.run(command, check=True, capture_output=True)
    model = tmp_path / "bundle/rootfs/models/model.gguf"
    assert model.read_bytes() == (done.inputs["quantize/gguf"].path / "model.gguf").read_bytes()
