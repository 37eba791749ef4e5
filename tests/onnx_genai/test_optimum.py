"""What edgeft's planner reads from a configuration, against Optimum's normalised configurations."""

from __future__ import annotations

import pytest

from edgeft.fit.families import dimensions

FAMILIES = [
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "phi", "phi3", "gpt2", "gpt_neox", "bloom", "olmo",
    "olmo2", "granite", "smollm3", "falcon", "opt",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_planner_reads_a_family_as_optimum_does(family):
    optimum = pytest.importorskip("optimum.utils", reason="Optimum is not installed: pip install optimum")
    from transformers import AutoConfig

    config = AutoConfig.for_model(family)
    normal = optimum.NormalizedConfigManager.get_normalized_config_class(family)(config)
    ours = dimensions(config.to_dict())
    assert (ours.layers, ours.hidden, ours.heads) == (
        normal.num_layers, normal.hidden_size, normal.num_attention_heads,
    )  # fmt: skip
    assert ours.vocab == normal.vocab_size
