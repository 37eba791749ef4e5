"""The translated template writes what the Jinja writes, in Go itself too; what cannot be translated is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile

import pytest

from edgeft.errors import StageError
from edgeft.export import go_template, ollama
from edgeft.export.translate import EMPTY_SYSTEM, MERGED, TRIMMED, translate
from edgeft.llamacpp.source import llama_cpp_tree
from edgeft.parity.checks.corpus import CONVERSATIONS
from edgeft.stages.export_ollama import _FURTHER, Ollama
from tests.export.families import CHATML, FAMILIES, REFUSED

CHATS = [*CONVERSATIONS, *_FURTHER]
STRIPPED = [[{**m, "content": m["content"].strip()} for m in chat] for chat in CHATS]
NOTES = {
    "chatml": {EMPTY_SYSTEM}, "llama-2": {TRIMMED, EMPTY_SYSTEM}, "llama-3": {TRIMMED, EMPTY_SYSTEM},
    "gemma": {MERGED, TRIMMED}, "mistral": set(), "braces": {EMPTY_SYSTEM},
}  # fmt: skip


def jinja(source):
    """Renders as transformers does, without the BOS that a tokenizer adds."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def fail(message):
        raise ValueError(message)

    environment.globals.update(
        raise_exception=fail, strftime_now=lambda form: "21 Nov 2026", bos_token="<s>", eos_token="</s>"
    )
    template = environment.from_string(source)

    def render(messages, variables):
        try:
            text = template.render(
                messages=[dict(m) for m in messages], add_generation_prompt=True, **variables
            )
        except Exception:  # noqa: BLE001  as transformers' caller sees it
            return None
        return text.removeprefix("<s>")

    return render


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_template_is_translated_and_its_limits_are_said(family):
    found = translate(jinja(FAMILIES[family]), CHATS)
    assert found.compared == len(CHATS) and set(found.notes) == NOTES[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_white_space_at_the_ends_the_bytes_are_the_same(family):
    render = jinja(FAMILIES[family])
    template, same = translate(render, CHATS).template, 0
    for chat in STRIPPED:
        wanted = render(chat, {})
        if wanted is None or any(m["role"] == "system" and not m["content"] for m in chat):
            continue
        system, messages = go_template.collated(chat)
        if messages == chat:
            assert go_template.render(template, system=system, messages=messages) == wanted
            same += 1
    assert same >= 9  # of sixteen; Gemma refuses what has a system prompt


@pytest.mark.parametrize("why", REFUSED)
def test_what_has_no_counterpart_is_refused_with_the_reason(why):
    with pytest.raises(StageError, match=why) as error:
        translate(jinja(REFUSED[why]), CHATS)
    assert 'kind = "bundle"' in error.value.hint


def test_a_translation_that_is_wrong_for_one_conversation_is_refused():
    render = jinja(CHATML)

    def odd(messages, variables):
        text = render(messages, variables)
        return text.replace("<|im_end|>", "<|end|>", 1) if len(messages) == 9 else text

    with pytest.raises(StageError, match=r"user, assistant, user, .* it writes"):
        translate(odd, CHATS)


@pytest.mark.parametrize(
    "source",
    [
        "{{ .Nothing }}",
        "{{ if .System }}",
        "{{ end }}",
        "{{ trim .System }}",
        "{{ $x }}",
        "{{ .System",
        "{{ .System | len }}",
    ],
)
def test_what_the_evaluator_does_not_know_is_an_error(source):
    with pytest.raises((ValueError, KeyError)):
        go_template.render(source, system="", messages=[])


def test_a_value_that_no_modelfile_can_hold_is_refused():
    assert ollama.quotable('say "hi" to', "it") == 'say "hi" to'
    for value in ('a """ b', 'ends in "'):
        with pytest.raises(StageError, match="quotation marks"):
            ollama.quotable(value, "it")
    assert ollama.quotable("<｜User｜>▁\t\n 你好 😀", "it")
    with pytest.raises(StageError, match=r"U\+200B"):
        ollama.quotable("zero\u200bwidth", "it")


@pytest.mark.slow
def test_the_folder_holds_the_translation_of_the_template_in_the_file(job, smollm2):
    from dataclasses import replace

    from edgeft.stages import export_ollama

    made = []
    for name in ("first", "second"):
        done = job(name, Ollama())
        model = done.inputs["quantize/gguf"].path.parent / "real"
        model.mkdir(exist_ok=True)
        if not (model / "model.gguf").exists():
            (model / "model.gguf").symlink_to(smollm2)
        done = replace(
            done, inputs={**done.inputs, "quantize/gguf": replace(done.inputs["quantize/gguf"], path=model)}
        )
        facts = export_ollama.run(done)
        made.append((done.out / "ollama.tar").read_bytes())
    assert made[0] == made[1]
    with tarfile.open(done.out / "ollama.tar") as tar:
        names = tar.getnames()
        folder = names[0]
        modelfile = tar.extractfile(f"{folder}/Modelfile").read().decode()
    assert f"{folder}/model.gguf" in names and "FROM ./model.gguf\n" in modelfile
    assert (
        f'TEMPLATE """{facts["template"]}"""\n' in modelfile
        and "You are a helpful AI assistant named SmolLM" in modelfile
    )
    assert facts["compared"] == 16 and facts["notes"] == [EMPTY_SYSTEM]


GO = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
func main() {
    var cases []struct { Template, System string; Messages []*Message }
    if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
    out := []string{}
    for _, c := range cases {
        file, _ := os.CreateTemp("", "")
        t := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
        if err := t.Execute(file, map[string]any{"System": c.System, "Messages": c.Messages}); err != nil { panic(err) }
        text, _ := os.ReadFile(file.Name())
        os.Remove(file.Name())
        out = append(out, string(text))
    }
    json.NewEncoder(os.Stdout).Encode(out)
}
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("go"), reason="needs Go")
def test_go_itself_renders_every_translation_as_the_evaluator_does(tmp_path):
    from jinja2 import TemplateSyntaxError

    published = {
        p.stem: p.read_text() for p in sorted((llama_cpp_tree() / "models" / "templates").glob("*.jinja"))
    }
    cases, wanted = [], []
    translated = 0
    for source in [*FAMILIES.values(), *published.values()]:
        try:
            template = translate(jinja(source), CHATS).template
        except (StageError, TemplateSyntaxError):  # tags of transformers alone
            continue
        translated += 1
        for chat in CHATS:
            system, messages = go_template.collated(chat)
            wanted.append(go_template.render(template, system=system, messages=messages))
            capital = [{"Role": m["role"], "Content": m["content"]} for m in messages]
            cases.append({"Template": template, "System": system, "Messages": capital})
    assert translated > 30
    (tmp_path / "main.go").write_text(GO)
    environment = {
        "PATH": "/usr/bin:/bin:/usr/local/go/bin",
        "GOCACHE": str(tmp_path / "cache"),
        "GOFLAGS": "-mod=mod",
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        ["go", "run", tmp_path / "main.go"],
        input=json.dumps(cases),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == wanted
