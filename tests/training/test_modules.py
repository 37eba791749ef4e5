import pytest
import torch
from torch import nn

from edgeft.errors import RecipeError, StageError
from edgeft.training.modules import resolve
from tests.training import tiny


@pytest.mark.parametrize(
    ("family", "leaves"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("qwen2", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("bloom", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("gpt_neox", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("gemma3", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("glm4", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}),
    ],
)
def test_every_linear_layer_of_the_blocks_is_found_and_the_head_is_not(family, leaves):
    model = tiny.model(family)
    targets = resolve(model)
    assert set(targets.leaves) == leaves
    assert targets.blocks == 3
    assert len(targets.names) % 3 == 0
    assert all(any(part.isdigit() for part in name.split(".")) for name in targets.names)


class ChatGlmBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attention = nn.ModuleDict({"query_key_value": nn.Linear(8, 24), "dense": nn.Linear(8, 8)})
        self.mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(8, 32), "dense_4h_to_h": nn.Linear(32, 8)})


class ChatGlm(nn.Module):
    """The module tree of ChatGLM's own code, with the vision tower that GLM-4V has."""

    def __init__(self, blocks=2):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(ChatGlmBlock() for _ in range(blocks))
        self.transformer.vision = nn.Module()
        self.transformer.vision.layers = nn.ModuleList(ChatGlmBlock() for _ in range(2))
        self.transformer.output_layer = nn.Linear(8, 50)


def test_chatglm_gets_query_key_value_but_neither_output_layer_nor_vision_tower():
    targets = resolve(ChatGlm())
    assert targets.leaves == ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    assert len(targets.names) == 8
    assert not any("vision" in name for name in targets.names)


def test_routers_are_left_alone_and_a_dense_first_layer_explains_itself(caplog):
    model = tiny.model("qwen3_moe")
    targets = resolve(model)
    assert "gate" not in targets.leaves
    assert "q_proj" in targets.leaves
    with_mlp = {name.split(".")[2] for name in targets.names if name.endswith("up_proj")}
    assert with_mlp == {"0"}
    assert "fused expert tensors" in caplog.text


def test_layers_of_different_attention_kinds_may_differ():
    targets = resolve(tiny.model("qwen3_next"))
    assert {"q_proj", "in_proj_qkvz", "out_proj"} <= set(targets.leaves)


def test_a_block_that_lacks_a_layer_of_its_like_is_refused():
    model = ChatGlm(blocks=3)
    model.transformer.encoder.layers[1].mlp["dense_4h_to_h"] = nn.Identity()
    with pytest.raises(StageError, match=r"layers\.1 and .*layers\.0 .*dense_4h_to_h"):
        resolve(model)


def test_a_block_without_any_layer_is_refused():
    model = ChatGlm(blocks=3)
    block = model.transformer.encoder.layers[2]
    for part in (block.self_attention, block.mlp):
        for name in list(part):
            part[name] = nn.Identity()
    with pytest.raises(StageError, match="differ"):
        resolve(model)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(StageError, match="no linear layer"):
        resolve(nn.Sequential(nn.Linear(4, 4)))


def test_names_in_a_recipe_choose_and_a_wrong_one_is_answered_with_the_nearest():
    model = tiny.model("llama")
    assert len(resolve(model, ["q_proj", "mlp.up_proj"]).names) == 6
    with pytest.raises(RecipeError, match="'q_prj' matches no linear layer") as caught:
        resolve(model, ["q_prj"])
    assert "perhaps 'q_proj'" in caught.value.hint
    with pytest.raises(RecipeError):
        resolve(model, ["lm_head"])


def test_the_tree_can_be_read_without_weights():
    with torch.device("meta"):
        assert len(resolve(tiny.model("llama")).names) == 21
