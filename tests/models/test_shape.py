"""The sizes of models from their configs alone, held against their weights."""

from __future__ import annotations

import pytest
import torch

from safeneuron.errors import InputError
from safeneuron.models.shape import Shape
from safeneuron.neurons.anatomy import decoder_of
from tests.helpers import tiny, tiny_experts
from tests.helpers.large import seventy_billion


def shape(family: str = "llama", **changes: object) -> Shape:
    return Shape.of(tiny.network(family, **changes), family)


def test_the_shape_is_read_from_a_config_alone(tmp_path):
    large = Shape.read(str(seventy_billion(tmp_path)))
    assert large.parameters == 70_553_706_496
    assert (large.layers, large.hidden, large.width, large.vocabulary) == (80, 8192, 28672, 128256)
    assert (large.queries, large.keys, large.heads, large.stored) == (8192, 1024, 64, 2)
    assert large.linear == 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)
    assert large.layer == large.linear + 2 * 8192
    assert (large.norms, large.inputs) == (2 * 8192, 6 * 8192 + 28672)
    assert not large.tied


def test_a_network_on_the_meta_device_has_the_same_shape(family):
    with torch.device("meta"):
        empty = tiny.network(family)
    assert Shape.of(empty, family) == shape(family)


def test_a_tied_head_is_seen():
    assert shape(tie_word_embeddings=True).tied
    assert not shape(tie_word_embeddings=False).tied


def test_a_config_that_is_not_there_is_explained(tmp_path):
    with pytest.raises(InputError, match=r"config of the model '.*' cannot be read .* expected 'embedded', a folder"):
        Shape.read(str(tmp_path / "nothing"))


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "olmoe", "gpt-oss", "deepseek-v3"])
def test_of_experts_only_those_count_that_a_token_is_routed_to(family):
    """A token of this model goes to two of four experts, and through what is shared."""
    network = tiny_experts.network(family)
    shape = Shape.of(network, family)
    routed = [one for name, one in network.named_parameters() if ".experts." in name]
    assert len(routed) > 0
    assert shape.weights == sum(one.numel() for one in network.model.layers.parameters())
    assert shape.weights - shape.active == sum(one.numel() for one in routed) / 2


def test_a_dense_model_is_active_as_a_whole(family):
    shape = Shape.of(tiny.network(family), family)
    assert (
        shape.active
        == shape.weights
        == sum(one.numel() for one in decoder_of(tiny.network(family)).layers.parameters())
    )
