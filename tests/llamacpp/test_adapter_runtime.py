"""A base and its LoRA adapter in llama.cpp: the sum that is computed, and the bases that are refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from edgeft.errors import DataError, ToolError
from edgeft.llamacpp import adapter, convert_lora, header
from edgeft.llamacpp.decode import Decoder

IDS = [5, 100, 2000, 31, 7, 40000, 8, 9, 10, 11]
WEIGHT, RANK, ALPHA = "blk.1.ffn_up.weight", 2, 6.0


def values(path, name):
    found = header.read(path)
    tensor = next(t for t in found.tensors if t.name == name)
    raw = path.read_bytes()[found.data_offset + tensor.offset :][: tensor.bytes]
    return np.frombuffer(raw, "<f4").reshape(tensor.shape[::-1])


def rewritten(path, out, change=lambda name, data: data, keys=None):
    """The same F32 file with its tensors changed; the metadata as they were, or `keys` added."""
    found, raw = header.read(path), path.read_bytes()
    tensors = {
        t.name: (t.shape, change(t.name, raw[found.data_offset + t.offset :][: t.bytes]))
        for t in found.tensors
    }
    header.write(out, keys or {}, tensors, [raw[start:end] for start, end in found.spans.values()])
    return out


def made_adapter(out, base, a, b, **keys):
    told = {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": ALPHA,
        adapter.BASE_KEY: adapter.base_hash(base), **keys,
    }  # fmt: skip
    pair = {"a": a, "b": b}
    tensors = {f"{WEIGHT}.lora_{k}": (v.shape[::-1], v.astype("<f4").tobytes()) for k, v in pair.items()}
    header.write(out, {key: value for key, value in told.items() if value != ""}, tensors)
    return out


@pytest.fixture
def pair(tiny, tmp_path):
    """A finished model of two files, and the halves of the adapter's one pair."""
    base = tmp_path / "model.gguf"
    shutil.copy(tiny(64), base)
    random = np.random.default_rng(0)
    a, b = random.standard_normal((RANK, 64)), random.standard_normal((128, RANK))
    made_adapter(tmp_path / "adapter.gguf", base, a, b)
    return base, tmp_path / "adapter.gguf", a, b


def logits(path, **more):
    with Decoder(path, n_ctx=32, threads=1, **more) as decoder:
        return decoder.logits(IDS)


def test_an_adapter_adds_alpha_by_rank_times_its_product_to_the_weight(pair, tmp_path):
    base, beside, a, b = pair

    def plus(name, data):
        merged = values(base, WEIGHT) + ALPHA / RANK * (b @ a)
        return merged.astype("<f4").tobytes() if name == WEIGHT else data

    plain, adapted = logits(base), logits(base, adapter=beside)
    assert np.abs(adapted - plain).max() > 1
    assert np.abs(adapted - logits(rewritten(base, tmp_path / "merged.gguf", plus))).max() < 2e-3
    assert np.array_equal(logits(base, adapter=beside, adapter_scale=0), plain)


def test_the_hash_is_of_the_weights_alone(pair, tmp_path):
    base, *_ = pair
    hashed = adapter.base_hash(base)
    retitled = rewritten(base, tmp_path / "retitled.gguf", keys={"general.description": "another"})
    assert retitled.read_bytes() != base.read_bytes() and adapter.base_hash(retitled) == hashed
    header.set_keys(retitled, {"general.description": "once more, longer"})
    assert adapter.base_hash(retitled) == hashed

    def one_bit(name, data):
        return bytes([data[0] ^ 1]) + data[1:] if name == "blk.1.attn_k.weight" else data

    assert adapter.base_hash(rewritten(base, tmp_path / "bit.gguf", one_bit)) != hashed
    turned = tmp_path / "turned.gguf"
    raw = base.read_bytes()
    name = b"blk.0.ffn_up.weight"
    turned.write_bytes(raw.replace(name, b"blk.0.ffn_xp.weight"))
    assert adapter.base_hash(turned) != hashed
    turned.write_bytes(raw[:-100])
    with pytest.raises(DataError, match="not a complete GGUF"):
        adapter.base_hash(turned)


def test_an_adapter_of_other_weights_is_refused_with_both_hashes(pair, tmp_path):
    base, beside, *_ = pair
    other = rewritten(base, tmp_path / "other.gguf", lambda name, data: data[:-1] + bytes([data[-1] ^ 1]))
    both = f"{adapter.base_hash(base)}.*{adapter.base_hash(other)}"
    with pytest.raises(DataError, match=both) as caught:
        Decoder(other, adapter=beside)
    assert "another quantization" in caught.value.hint
    assert adapter.check_base(base, beside) == adapter.base_hash(base)


def test_an_adapter_that_does_not_say_what_it_is_for_is_refused(pair, tmp_path):
    base, _, a, b = pair
    nameless = made_adapter(tmp_path / "nameless.gguf", base, a, b, **{adapter.BASE_KEY: ""})
    with pytest.raises(DataError, match="does not say which base"):
        Decoder(base, adapter=nameless)
    with pytest.raises(DataError, match=r"is no adapter: its general\.type is None"):
        Decoder(base, adapter=base)
    with pytest.raises(DataError, match=r"absent\.gguf does not exist"):
        Decoder(base, adapter=tmp_path / "absent.gguf")


def test_what_llama_cpp_cannot_add_is_a_sentence_with_its_reason(pair, tmp_path):
    base, _, a, b = pair
    narrow = made_adapter(tmp_path / "narrow.gguf", base, a[:, :32], b)
    with pytest.raises(DataError, match=r"narrow\.gguf: .*incorrect shape"):
        Decoder(base, adapter=narrow)
    foreign = made_adapter(tmp_path / "foreign.gguf", base, a, b, **{"general.architecture": "qwen2"})
    with pytest.raises(DataError, match=r"foreign\.gguf: .*arch mismatch"):
        Decoder(base, adapter=foreign)


def test_an_adapter_is_found_beside_a_model_of_the_agreed_name_only(pair, tmp_path):
    base, beside, *_ = pair
    assert adapter.adapter_beside(base) == beside
    assert adapter.lora_arguments(base) == ["--lora", str(beside)]
    assert adapter.tensor_bytes(beside) == 4 * RANK * (64 + 128)
    renamed = base.rename(tmp_path / "copy.gguf")
    assert adapter.adapter_beside(renamed) is None and adapter.lora_arguments(renamed) == []
    (tmp_path / "empty").mkdir()
    alone = shutil.copy(renamed, tmp_path / "empty" / "model.gguf")
    assert adapter.adapter_beside(alone) is None


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("ERROR:lora-to-gguf:Model FooForCausalLM is not supported", "adapters of the architecture Foo"),
        (
            "ERROR:lora-to-gguf:Unexpected name 'x.modules_to_save.weight': Not a lora_A",
            "cannot hold x.modules_to",
        ),
        ("ValueError: Can not map tensor 'model.h.9.weight'", "layer model.h.9.weight is none of the model"),
        ("Traceback\n    raise NotImplementedError\nNotImplementedError", "cannot do to a LoRA pair"),
        ("Traceback\nAssertionError: new", "failed on the adapter for .*: AssertionError: new"),
    ],
)
def test_the_adapter_converters_tracebacks_become_sentences(tmp_path, said, sentence):
    with pytest.raises(ToolError, match=sentence):
        raise convert_lora.explained(said, tmp_path)


def test_a_conversation_is_with_base_and_adapter(pair):
    from edgeft.chat import Chat

    base, beside, *_ = pair

    def answer():
        with Chat(base, context=128, threads=1) as talk:
            return "".join(talk.ask("Where is the heart?", 6))

    with_both = answer()
    aside = beside.rename(beside.with_name("aside.gguf"))
    assert answer() != with_both
    shutil.copy(aside, beside)
    header.set_keys(beside, {adapter.BASE_KEY: "0" * 64})
    with pytest.raises(DataError, match="was trained on other weights"):
        answer()


@pytest.mark.slow
def test_the_server_runs_the_adapter_beside_its_model(pair):
    from edgeft.llamacpp.server import running

    base, beside, *_ = pair
    arguments = ["--ctx-size", "128", "--parallel", "1", "--threads", "1", "--host", "127.0.0.1", "--port", "0"]  # fmt: skip
    with running(base, arguments) as server:
        (loaded,) = server._ask("GET", "/lora-adapters")
        assert (loaded["path"], loaded["scale"]) == (str(beside), 1)
    header.set_keys(beside, {adapter.BASE_KEY: "0" * 64})
    with pytest.raises(DataError, match="was trained on other weights"), running(base, arguments):
        pass
