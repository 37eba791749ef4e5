"""What counts as an answer, and where the question goes."""

from __future__ import annotations

import json

import pytest

from edgeft.agent.description import Canary
from edgeft.agent.errors import Unready
from edgeft.agent.health import QUESTION, fault
from edgeft.agent.places import Places, address, settings


@pytest.mark.parametrize("text", ["Paris.", "The capital of France is Paris.", "42", "巴黎", "是", "the the cat", "no no no no"])  # fmt: skip
def test_any_sensible_text_is_an_answer(text):
    assert fault(text, QUESTION) == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"), (" \n\t", "empty"), ("???!!!", "no letter"), ("G" * 24, "one sign"), ("0 0 0 0 0 0 0 0 0 0 0 0 0", "one sign"),
        ("ababababababab", "one sign"), ("the cat " * 8, "one word"), ("a\ufffd\ufffd\ufffd", "not text"),
    ],
)  # fmt: skip
def test_what_broken_weights_say_is_none(text, why):
    assert why in fault(text, QUESTION)


def test_a_canary_may_demand_one_of_several_words():
    canary = Canary(prompt="?", contains=("Paris", "巴黎"))
    assert fault("it is PARIS", canary) == "" and "none of Paris" in fault("it is Rome", canary)


@pytest.mark.parametrize(
    ("lines", "host", "port"),
    [
        ("", "127.0.0.1", 8080),
        ("EDGEFT_HOST=0.0.0.0\nEDGEFT_PORT=9\n", "127.0.0.1", 9),
        ("# EDGEFT_PORT=1\nEDGEFT_HOST=::\nEDGEFT_OPTIONS=--x=1", "::1", 8080),
        ("EDGEFT_HOST=192.168.1.5\nEDGEFT_PORT=\n", "192.168.1.5", 8080),
    ],
)
def test_the_question_goes_where_the_settings_let_the_server_listen(tmp_path, lines, host, port):
    (tmp_path / "etc/edgeft").mkdir(parents=True)
    (tmp_path / "etc/edgeft/m.env").write_text(lines)
    found = address(Places(root=tmp_path), "m")
    assert (found.host, found.port, found.key) == (host, port, "")
    (tmp_path / "var/lib/edgeft").mkdir(parents=True)
    (tmp_path / "var/lib/edgeft/api-key").write_text("secret\n")
    assert address(Places(root=tmp_path), "m").key == "secret"


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"restart": "x"}', '{"restart": [1]}', '{"reboot": ["x"]}', '{"start_seconds": 0}', '{"answer_seconds": "9"}', '{"start_seconds": true}'],
)  # fmt: skip
def test_a_mistake_in_the_agents_settings_is_named(tmp_path, content):
    (tmp_path / "etc/edgeft").mkdir(parents=True)
    (tmp_path / "etc/edgeft/agent.json").write_text(content)
    with pytest.raises(Unready, match=r"agent\.json"):
        settings(Places(root=tmp_path))


def test_without_a_file_the_agent_has_settings_and_with_one_those(tmp_path):
    assert settings(Places(root=tmp_path)).restart == ()
    (tmp_path / "etc/edgeft").mkdir(parents=True)
    (tmp_path / "etc/edgeft/agent.json").write_text(
        json.dumps({"restart": ["a", "{name}"], "start_seconds": 9})
    )
    found = settings(Places(root=tmp_path))
    assert (found.restart, found.start_seconds, found.answer_seconds) == (("a", "{name}"), 9, 120)
