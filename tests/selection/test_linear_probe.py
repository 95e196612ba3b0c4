"""The logistic probe: its fit against a plain optimizer, its scores, its bounded memory, its mistakes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.exchanges import prompts_alone
from safeneuron.models.forward import MeasurementSettings, pooled
from safeneuron.selection.linear_probe import FREE, logistic_weights, probe
from tests.helpers import planted


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize("gap", [0.0, 1.0, 10.0])
def test_fit_is_the_minimum_of_the_loss(penalty, gap):
    draw = torch.Generator().manual_seed(1)
    vectors = torch.randn(30, 12, generator=draw, dtype=torch.float64) * 3
    signs = torch.cat([torch.ones(13), -torch.ones(17)]).double()
    vectors[:, 4] += gap * signs
    found = logistic_weights(vectors, signs, penalty)
    theirs = torch.zeros(13, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theirs], max_iter=5000, tolerance_grad=1e-11, tolerance_change=0,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        margins = signs * (vectors @ theirs[:12] + theirs[12])
        value = functional.softplus(-margins).mean()
        value = value + penalty / 2 * (theirs[:12].square().sum() + theirs[12].square() / FREE)
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(found, theirs.detach()[:12], rtol=1e-4, atol=1e-5)


def test_scores_are_zscores_of_positive_weights():
    model = planted.model()
    unsafe, safe = planted.twins(6)
    found = probe(model, unsafe, safe)
    vectors = pooled(model, [one.ids for one in prompts_alone(model, [*unsafe, *safe])], "last").double()
    signs = torch.cat([torch.ones(6), -torch.ones(6)]).double()
    for own, layer in zip(found.values.split(48), vectors.split(48, dim=1), strict=True):
        weights = logistic_weights(layer, signs, 1e-3)
        scores = (weights - weights.mean()) / weights.std(correction=0)
        positive = weights > 0
        torch.testing.assert_close(own[positive], scores[positive], rtol=1e-3, atol=1e-3)
        assert (own[~positive] <= 0).all()


def test_batches_do_not_matter():
    model = planted.model()
    unsafe, safe = planted.twins(6)
    once, single = probe(model, unsafe, safe), probe(model, unsafe, safe, MeasurementSettings(batch_tokens=1))
    torch.testing.assert_close(once.values, single.values, rtol=1e-3, atol=1e-3)


def test_no_more_prompts_are_kept_than_asked_for():
    model = planted.model()
    unsafe, safe = planted.twins(12)
    counts = []
    found = probe(model, unsafe, safe, most=4, progress=lambda done, total: counts.append((done, total)))
    assert counts[-1] == (8, 8)
    assert torch.equal(found.values, probe(model, unsafe, safe, most=4).values)
    assert not torch.equal(found.values, probe(model, unsafe, safe, most=4, seed=1).values)


def test_mistakes():
    model = planted.model()
    unsafe, safe = planted.twins(3)
    with pytest.raises(InputError, match="unsafe"):
        probe(model, unsafe[:1], safe)
    with torch.no_grad():
        model.network.model.layers[1].mlp.up_proj.weight[3] = torch.inf
    with pytest.raises(InputError, match="not finite on the prompt"):
        probe(model, [Prompt("hello"), *unsafe], safe)
