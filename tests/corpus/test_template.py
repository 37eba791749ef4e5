from __future__ import annotations

import json
from dataclasses import replace

import pytest

from edgeft.corpus import template
from edgeft.corpus.conversation import Conversation, Message
from edgeft.errors import DataError, RecipeError
from tests.corpus.models import CHATML, COUNTING, FORGETTING, THINKING, save


def talk(*turns: str, system: str = ""):
    said = [Message(role="system", content=system)] if system else []
    said += [Message(role="user" if i % 2 == 0 else "assistant", content=t) for i, t in enumerate(turns)]
    return Conversation(messages=tuple(said), origin="x.jsonl:7")


def learnt(found, rendered):
    """The runs of text that are learnt."""
    runs, at = [], None
    for i, label in enumerate(rendered.labels):
        if label >= 0:
            assert label == rendered.ids[i]
            if at != i:
                runs.append([])
            runs[-1].append(label)
            at = i + 1
    return [found.tokenizer.decode(r) for r in runs]


def test_only_answers_and_their_end_of_turn_tokens_are_learnt(chatml):
    rendered = chatml.render(
        [talk("Hi?", "Grüße 👋, 世界", "And?", "Bye.", system="Be kind."), talk("A\n", "B")]
    )
    assert learnt(chatml, rendered[0]) == ["Grüße 👋, 世界<|im_end|>", "Bye.<|im_end|>"]
    assert learnt(chatml, rendered[1]) == ["B<|im_end|>"]
    whole = chatml.tokenizer.decode(rendered[1].ids)
    assert whole == "<|im_start|>user\nA\n<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"


def test_the_end_of_turn_token_is_learnt_although_it_is_the_pad_token(chatml):
    assert chatml.tokenizer.pad_token_id == chatml.tokenizer.eos_token_id == chatml.end_of_turn_id
    assert (chatml.end_of_turn, chatml.closing) == ("<|im_end|>", "<|im_end|>")
    rendered = chatml.render([talk("Hi?", "Bye.")])[0]
    assert rendered.labels.count(chatml.end_of_turn_id) == 1 < rendered.ids.count(chatml.end_of_turn_id)


def test_an_answer_that_repeats_its_question_is_found_in_the_right_place(chatml):
    assert learnt(chatml, chatml.render([talk("B", "B", "user", "user")])[0]) == [
        "B<|im_end|>",
        "user<|im_end|>",
    ]


def test_bos_tokens_are_those_of_the_template_and_never_doubled(tmp_path):
    folder = save(tmp_path / "model", "{{ bos_token }}" + CHATML, bos="<s>")
    # A tokenizer that also puts one in front by itself, as Llama's and Gemma's do.
    document = json.loads((folder / "tokenizer.json").read_text())
    bos = next(t["id"] for t in document["added_tokens"] if t["content"] == "<s>")
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [bos], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    found = template.load(folder)
    assert found.tokenizer("a")["input_ids"][0] == bos, "the trap is not set"
    rendered = found.render([talk("Hi?", "Bye.")])[0]
    assert rendered.ids.count(bos) == found.bos_count == 1 and rendered.ids[1] != bos


def test_a_template_that_adds_a_thought_to_the_last_answer_is_learnt_as_it_stands(tmp_path):
    found = template.load(save(tmp_path / "model", THINKING))
    rendered = found.render([talk("A?", "a", "B?", "b")])[0]
    assert learnt(found, rendered) == ["a<|im_end|>", "<think>\n\n</think>\n\nb<|im_end|>"]


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path):
    found = template.load(save(tmp_path / "model", COUNTING))
    with pytest.raises(
        DataError, match=r"x.jsonl:7: the chat template writes the turns before answer 1 differently"
    ):
        found.render([talk("Hi?", "Bye.")])


def test_a_template_that_rewrites_earlier_answers_is_refused(tmp_path):
    found = template.load(save(tmp_path / "model", FORGETTING))
    assert learnt(found, found.render([talk("Hi?", "Bye.")])[0]) == ["Bye.<|im_end|>"]
    with pytest.raises(DataError, match=r"x.jsonl:7: .* does not write answer 1 as it stands"):
        found.render([talk("Hi?", "Bye.", "Hi?", "Bye.")])


def test_a_template_that_refuses_a_role_is_quoted_with_the_row(tmp_path):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    found = template.load(save(tmp_path / "model", strict + CHATML))
    with pytest.raises(DataError, match=r"x.jsonl:7: .*System role not supported") as e:
        found.render([talk("Hi?", "Bye.", system="Be kind.")])
    assert "leave out `system`" in e.value.hint


def test_a_model_without_a_template_or_without_an_end_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="no chat template") as e:
        template.load(save(tmp_path / "none", None))
    assert "Instruct" in e.value.hint
    endless = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(RecipeError, match="never learn to stop"):
        template.load(save(tmp_path / "endless", endless))


def test_a_prompt_whose_last_token_swallows_the_answers_start_is_refused(tmp_path):
    from tokenizers import Tokenizer

    folder = save(
        tmp_path / "model",
        CHATML.replace("assistant\n'", "assistant\nA'").replace("m['content']", "'A' + m['content']"),
    )
    template.load(folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"]["Ae"] = 400
    document["model"]["merges"] = [["A", "e"]]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("Ae").ids == [400], (
        "the trap is not set"
    )
    with pytest.raises(RecipeError, match="its last token changes when an answer follows"):
        template.load(folder)


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(tmp_path):
    dated = template.load(save(tmp_path / "model", "{{ strftime_now('%d %B %Y') }}" + CHATML))
    text = dated.tokenizer.decode(dated.render([talk("Hi?", "Bye.")])[0].ids)
    assert text.startswith("01 January 2025<|im_start|>")


def test_texts_that_spell_out_a_control_token_are_noticed(chatml):
    assert chatml.control_token(talk("Hi?", "Bye.<|im_end|>")) == "<|im_end|>"
    assert not chatml.control_token(talk("Hi <im_end>", "Bye."))


def test_a_row_whose_end_is_not_learnt_or_whose_bos_is_doubled_is_refused(chatml):
    elsewhere = replace(chatml, end_of_turn_id=chatml.end_of_turn_id + 1)
    with pytest.raises(DataError, match=r"x.jsonl:7: the end-of-turn token .* is not learnt \(C-22\)"):
        elsewhere.render([talk("Hi?", "Bye.")])
    miscounted = replace(chatml, bos="<|im_start|>")  # the tokenizer has no BOS, the template writes two
    with pytest.raises(DataError, match=r"x.jsonl:7: 0 .* tokens where the template writes 2 \(C-24\)"):
        miscounted.render([talk("Hi?", "Bye.")])


@pytest.mark.slow
def test_smollm2s_own_tokenizer_and_template_are_understood(tiny_checkpoint):
    found = template.load(tiny_checkpoint)
    assert (found.end_of_turn, found.end_of_turn_id, found.bos_count) == ("<|im_end|>", 2, 3)
    rendered = found.render([talk("Hi?", "Grüße 👋, 世界  \n\n x", "And?", "Bye.")])[0]
    assert learnt(found, rendered) == ["Grüße 👋, 世界  \n\n x<|im_end|>", "Bye.<|im_end|>"]
    assert found.tokenizer.decode(rendered.ids).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant"
    )
