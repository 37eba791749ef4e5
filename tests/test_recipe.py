"""What a user gets to read about a recipe or target file that cannot be used."""

from __future__ import annotations

import pytest

from edgeft.errors import RecipeError
from edgeft.plan import plan
from edgeft.recipe import find_target, load
from tests.toy import TOY


def problems(recipe, text):
    recipe.write_text(text)
    with pytest.raises(RecipeError) as e:
        load(recipe, stages=TOY)
    return str(e.value)


def test_every_mistake_is_named_at_once(recipe):
    text = problems(
        recipe,
        'traget = "x"\n[data]\nsource="rows.txt"\n[trian]\n[train]\nlr=3\nstep=1\n'
        '[[quantize]]\nkind="gguf"\ntype="Q9"\n[[quantize]]\nkind="gguff"\n',
    )
    for piece in (
        "traget: no such key at the top of the file; did you mean 'target'?",
        "[trian]: no such table; did you mean 'train'?",
        "train.lr: Input should be less than 1 (it is 3)",
        "train.step: there is no such key; did you mean 'steps'?",
        "quantize[0].type: Input should be 'Q4' or 'Q8' (it is 'Q9')",
        "quantize[1].kind: gguff; choose from gguf",
    ):
        assert piece in text


def test_a_missing_required_key_is_named(recipe):
    assert "data.source: is required" in problems(recipe, "[train]\n")


def test_a_missing_data_file_is_named(recipe):
    assert "nothere.txt does not exist" in problems(recipe, '[data]\nsource="nothere.txt"\n')


def test_a_file_that_is_not_toml_is_named_with_its_line(recipe):
    assert "line 2" in problems(recipe, "[data]\nsource = \n")


def test_a_missing_recipe_is_named_with_the_shipped_ones(tmp_path):
    with pytest.raises(RecipeError) as e:
        load(tmp_path / "nothere.toml", stages=TOY)
    assert "nothere.toml does not exist" in str(e.value) and "medical-qa.toml" in e.value.hint


def test_a_table_given_as_a_value_is_named(recipe):
    assert "train: no such key at the top" in problems(recipe, 'train = 3\n[data]\nsource="rows.txt"\n')


def test_two_variants_of_one_name_are_refused(recipe):
    recipe.write_text(recipe.read_text() + '\n[[quantize]]\nkind = "gguf"\ntype = "Q4"\n')
    with pytest.raises(RecipeError, match="given twice"):
        plan(load(recipe, stages=TOY), stages=TOY)


def test_upto_a_stage_that_is_not_there_is_refused(recipe):
    with pytest.raises(RecipeError, match="no stage 'exprot'"):
        plan(load(recipe, stages=TOY), stages=TOY, upto="exprot")


def test_an_unknown_target_is_named_with_the_nearest(tmp_path):
    with pytest.raises(RecipeError) as e:
        find_target("pi-5-8g", tmp_path)
    assert "there is no target 'pi-5-8g'; did you mean 'pi-5-8gb'?" in str(e.value)
    assert "laptop" in e.value.hint


def test_a_target_can_be_a_file_beside_the_recipe(recipe):
    assert find_target("board.toml", recipe.parent).name == "board.toml"
