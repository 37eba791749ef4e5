"""The real llama-server on files with planted faults."""

from __future__ import annotations

import re

import pytest

from edgeft.errors import DataError, ToolError
from edgeft.parity.checks import rendering
from edgeft.parity.checks.check import failed
from tests.conftest import ensure

pytestmark = pytest.mark.slow

TEMPLATE, ADD_BOS, BOS = (
    "tokenizer.chat_template",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.bos_token_id",
)
PLAIN = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|im_end|>' }}{% endfor %}"


@pytest.fixture(scope="session", autouse=True)
def server(library):

    return ensure("server")


@pytest.fixture
def both(copied, planted):
    """A checkpoint and a file with the same template, the file with further keys."""

    def make(template, **keys):
        (copied / "chat_template.jinja").write_text(template, newline="")
        return copied, planted(**{TEMPLATE: template, **keys})

    return make


def wrong(checks):
    assert {c.step for c in checks} == {"served"}
    return {c.name: c.said for c in failed(checks)}


def test_a_faithful_file_is_served_as_trained(tiny_checkpoint, tiny_gguf):
    checks = rendering.against_checkpoint(tiny_checkpoint, tiny_gguf)
    assert {c.ok for c in checks} == {True} and {c.step for c in checks} == {"served"}
    assert {code for c in checks for code in c.codes} == {"C-17", "C-19", "C-20", "C-24", "C-26"}
    assert "28 prompts have the trained bytes, 0 chats are refused" in checks[1].said
    assert {c.ok for c in rendering.between_files(tiny_gguf, tiny_gguf)} == {True}


def test_a_wrong_template_is_found_in_what_is_served(tiny_checkpoint, tiny_gguf, planted):
    gguf = planted(**{TEMPLATE: PLAIN})
    for found in (
        wrong(rendering.against_checkpoint(tiny_checkpoint, gguf)),
        wrong(rendering.between_files(tiny_gguf, gguf)),
    ):
        assert set(found) == {"served template", "served prompts", "served tokens"}
        assert "differs at character 2: '<|user|>What is anemia?" in found["served prompts"]


def test_a_file_without_a_template_falls_back_in_silence_and_is_found(tiny_checkpoint, planted):
    found = wrong(rendering.against_checkpoint(tiny_checkpoint, planted(**{TEMPLATE: ""})))
    assert "llama-server uses another template than the trained one" in found["served template"]
    assert "server warnings" not in found


def test_a_broken_template_is_a_failure_with_the_reason(tiny_checkpoint, planted):
    for template, reason in (
        ("{% for m in messages %}{{ m['content'] }", "Parser Error: Expected }}"),
        (PLAIN.replace("m['content']", "m['content'] | nosuch"), "Unknown (built-in) filter 'nosuch'"),
    ):
        found = wrong(rendering.against_checkpoint(tiny_checkpoint, planted(**{TEMPLATE: template})))
        assert list(found) == ["served template"] and reason in found["served template"]


def test_a_warning_about_a_template_is_a_failure_even_if_every_prompt_is_right(tiny_checkpoint, planted):
    gguf = planted(**{f"{TEMPLATE}.tool_use": "{% if %}"})
    found = wrong(rendering.against_checkpoint(tiny_checkpoint, gguf))
    assert list(found) == ["server warnings"]
    assert "failed to parse tool use chat template (ignoring it)" in found["server warnings"]


def test_every_warning_about_a_template_in_the_pinned_source_is_heard(library):
    from edgeft.llamacpp.source import llama_cpp_tree

    tree = llama_cpp_tree()
    sources = [*sorted((tree / "common").glob("chat*.cpp")), tree / "tools" / "server" / "server-context.cpp"]
    statement = re.compile(r"\b(?:LOG|SRV)_(?:WRN|ERR)\((.*?)\);", re.DOTALL)
    said = [
        "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', found))
        for s in sources
        for found in statement.findall(s.read_text())
    ]
    about = [text for text in said if re.search("template|jinja|chatml|system prompt", text, re.IGNORECASE)]
    assert len(about) >= 12
    unheard = [t for t in about if not rendering.COMPLAINT.search(f"0.00.1 W x: {t}")]
    assert [t for t in unheard if "for example: --no-jinja" not in t and "disabling jinja" not in t] == []


def test_a_double_bos_is_found_where_it_is_served(both):
    later = "\n\n{{ bos_token }}" + PLAIN
    found = wrong(rendering.against_checkpoint(*both(later, **{ADD_BOS: True})))
    assert list(found) == ["served tokens"] and "(1 BOS as trained, 2 as served)" in found["served tokens"]
    found = wrong(rendering.against_checkpoint(*both(PLAIN, **{ADD_BOS: True})))
    assert list(found) == ["served tokens"] and "(0 BOS as trained, 1 as served)" in found["served tokens"]


def test_a_file_whose_template_writes_bos_twice_is_found(both, planted):
    checkpoint, _ = both("{{ bos_token }}" + PLAIN)
    gguf = planted(**{TEMPLATE: "{{ bos_token }}{{ bos_token }}" + PLAIN, ADD_BOS: True})
    found = wrong(rendering.against_checkpoint(checkpoint, gguf))
    assert set(found) == {"served template", "served prompts", "served tokens"}
    assert "(1 BOS as trained, 2 as served)" in found["served tokens"]


def test_a_bos_that_the_server_takes_away_before_its_tokenizer_adds_it_is_no_fault(both):
    assert wrong(rendering.against_checkpoint(*both("{{ bos_token }}" + PLAIN, **{ADD_BOS: True}))) == {}


def test_a_file_that_writes_another_bos_is_found(both):
    template = "{{ bos_token }}" + PLAIN
    found = wrong(rendering.against_checkpoint(*both(template, **{BOS: 0})))
    assert set(found) == {"served prompts", "served tokens"}


def test_chats_that_the_template_refuses_must_be_refused_by_the_server(both):
    strict = "{% if messages[-1]['content'] | length == 0 %}{{ raise_exception('empty') }}{% endif %}" + PLAIN
    checks = rendering.against_checkpoint(*both(strict))
    assert wrong(checks) == {} and "2 chats are refused on both sides" in checks[1].said
    checkpoint, _ = both(strict)
    _, lenient = both(PLAIN)
    (checkpoint / "chat_template.jinja").write_text(strict)
    said = wrong(rendering.against_checkpoint(checkpoint, lenient))["served prompts"]
    assert said == "llama-server answers the chat user, which the trained template refuses (1 more)"


def test_a_system_prompt_that_no_template_takes_goes_where_the_server_puts_it(both):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
    checks = rendering.against_checkpoint(*both(strict))
    assert wrong(checks) == {} and "goes into the first question" in checks[1].said


def test_thoughts_that_the_server_asks_for_and_training_did_not_are_found_with_the_option_that_helps(both):
    from edgeft.llamacpp.source import llama_cpp_tree

    bielik = (llama_cpp_tree() / "models" / "templates" / "Bielik-11B-v3.0-Instruct.jinja").read_text()
    said = wrong(rendering.against_checkpoint(*both(bielik)))["served prompts"]
    assert "<think>" in said
    assert said.split(" (")[0].endswith("with --reasoning off it would be the trained one")


def test_a_fixed_date_that_the_server_replaces_by_today_is_allowed_and_said(both):
    dated = (
        "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}"
        + PLAIN
    )
    checks = rendering.against_checkpoint(*both(dated))
    assert wrong(checks) == {} and "with today's date" in checks[1].said


def test_tools_are_a_check_of_their_own(both):
    tools = "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}" + PLAIN
    checks = rendering.against_checkpoint(*both(tools))
    assert wrong(checks) == {} and checks[-1].name == "served tools" and checks[-1].ok
    found = wrong(rendering.against_checkpoint(*both(tools.replace("tojson", "tojson | e"))))
    assert list(found) == ["served tools"] and "the chat user with tools" in found["served tools"]


def test_windows_line_ends_and_a_last_newline_are_no_difference(both):
    assert (
        wrong(rendering.against_checkpoint(*both(PLAIN.replace("{% endfor %}", "\r\n{% endfor %}\n")))) == {}
    )


def test_a_checkpoint_without_a_template_is_not_asked_about(copied, tiny_gguf):
    (copied / "chat_template.jinja").unlink()
    (check,) = rendering.against_checkpoint(copied, tiny_gguf)
    assert check.ok is None and check.said == "the checkpoint has no chat template"


def test_a_file_that_cannot_be_served_at_all_is_an_error_and_no_verdict(tiny_checkpoint, tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises((ToolError, DataError)):
        rendering.against_checkpoint(tiny_checkpoint, tmp_path / "no.gguf")
