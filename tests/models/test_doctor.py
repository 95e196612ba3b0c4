"""What `doctor` says of a model: the rows of its table, its remarks, and one sentence for a model that is refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from typer.testing import CliRunner

from safeneuron.cli.app import app
from safeneuron.errors import InputError
from safeneuron.models.doctor import Diagnosis, diagnosis, examine
from safeneuron.neurons.verification import Proof, prove
from tests.helpers import shrunken, tiny, tiny_experts


def of(network: torch.nn.Module) -> Diagnosis:
    return diagnosis("it", network, prove(network), "")


def test_a_plain_model_is_one_row():
    found = of(tiny.network())
    (row,) = found.rows
    assert found.neurons == 3 * tiny.WIDTH
    assert row[:4] == ("0-2", "mlp", "48", "gated, separate")
    assert row.owns == ("mlp.gate_proj.weight[j]", "mlp.up_proj.weight[j]", "mlp.down_proj.weight[:, j]")
    assert "Can be frozen bit for bit while the rest is trained." in found.remarks


@pytest.mark.parametrize(
    ("family", "form", "owns"),
    [
        ("phi3", "gated, fused", ("mlp.gate_up_proj.weight[j]", "mlp.gate_up_proj.weight[j+48]")),
        ("gpt2", "plain, Conv1D", ("mlp.c_fc.weight[:, j]", "mlp.c_fc.bias[j]", "mlp.c_proj.weight[j]")),
    ],
)
def test_forms_are_told_apart(family, form, owns):
    network = (
        tiny.network(family)
        if family in tiny.CONFIGS
        else shrunken.network(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]])
    )
    (row,) = of(network).rows
    assert row.form == form
    assert set(owns) <= set(row.owns)


def test_experts_have_rows_and_remarks():
    found = of(tiny_experts.network("gpt-oss"))
    (row,) = found.rows
    assert row.neurons == "4 experts x 24"
    assert row.form == "stacked, gate and up fused, rows alternate"
    assert sorted(row.owns) == sorted(
        [
            "mlp.experts.gate_up_proj[e, :, 2j]",
            "mlp.experts.gate_up_proj[e, :, 2j+1]",
            "mlp.experts.gate_up_proj_bias[e, 2j]",
            "mlp.experts.gate_up_proj_bias[e, 2j+1]",
            "mlp.experts.down_proj[e, j]",
        ]
    )
    assert any("align.freeze_routers" in remark for remark in found.remarks)


def test_layers_without_an_ffn_are_said():
    found = of(shrunken.network(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING["nemotron_h"]]))
    assert ("0, 2", "none", "0", "", ()) in found.rows
    assert "Layers without an FFN have no neurons: 0, 2." in found.remarks


def test_a_config_alone_is_enough_for_the_anatomy(tmp_path):
    network = tiny_experts.network("qwen2-moe")
    network.config.save_pretrained(tmp_path)
    found = examine(str(tmp_path), weights=False)
    assert found.rows == diagnosis("it", network, Proof((), ()), "").rows
    assert "Not proved: read off the config alone." in found.remarks


def test_the_command_prints_and_refuses(tmp_path):
    tiny.model().save(tmp_path / "model")
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "model")])
    assert result.exit_code == 0
    assert "144 neurons, fingerprint" in result.output
    assert "mlp.down_proj.weight[:, j]" in result.output
    config = {"model_type": "mamba", "num_hidden_layers": 1, "hidden_size": 8, "state_size": 4, "vocab_size": 260}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no layer of MambaModel has an FFN"):
        examine(str(tmp_path / "model"), weights=False)
    refused = CliRunner().invoke(app, ["doctor", str(tmp_path / "model"), "--config-only"])
    assert refused.exit_code == 2
