"""Scores against numpy, scipy and plain loops; thresholds and the sets they choose."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from safeneuron.errors import InputError
from safeneuron.neurons.statistics import ActivationStats, Moments
from safeneuron.selection.scores import (
    Scores,
    SelectionSettings,
    Thresholds,
    activation_shift,
    choose,
    effect_size,
    pooled_deviation,
    q_values,
    resolve_thresholds,
    score,
    select,
    shift_zscore,
    t_statistic,
    thresholds_for,
)

quick = settings(max_examples=40, deadline=None)
WIDTHS = (30, 50, 20)
TOTAL = sum(WIDTHS)


def samples(seed: int = 0, unsafe: int = 23, safe: int = 31, total: int = TOTAL) -> tuple[np.ndarray, np.ndarray]:
    """Activations ``[prompt, neuron]`` of two classes that differ more and more from the first neuron to the last."""
    generator = np.random.default_rng(seed)
    scale = generator.uniform(0.1, 3, total)
    gap = np.linspace(-1, 2, total) * scale
    return generator.normal(size=(unsafe, total)) * scale + gap, generator.normal(size=(safe, total)) * scale


def stats_of(unsafe: np.ndarray, safe: np.ndarray, widths: tuple[int, ...] = WIDTHS) -> ActivationStats:
    moments = [Moments.of(torch.from_numpy(values)) for values in (unsafe, safe)]
    return ActivationStats(*moments, widths, "abc", "last")


def scores_of(seed: int = 0) -> Scores:
    return score(stats_of(*samples(seed)))


def test_effect_size_is_cohens_d_neuron_by_neuron():
    unsafe, safe = samples()
    stats = stats_of(unsafe, safe)
    d, s = effect_size(stats.unsafe, stats.safe), pooled_deviation(stats.unsafe, stats.safe)
    for neuron in range(TOTAL):
        u, v = unsafe[:, neuron].tolist(), safe[:, neuron].tolist()
        mean_u, mean_v = math.fsum(u) / len(u), math.fsum(v) / len(v)
        var_u = math.fsum((x - mean_u) ** 2 for x in u) / (len(u) - 1)
        var_v = math.fsum((x - mean_v) ** 2 for x in v) / (len(v) - 1)
        pooled = math.sqrt(((len(u) - 1) * var_u + (len(v) - 1) * var_v) / (len(u) + len(v) - 2))
        assert s[neuron].item() == pytest.approx(pooled, rel=1e-12)
        assert d[neuron].item() == pytest.approx((mean_u - mean_v) / pooled, rel=1e-12)
    assert (d < 0).any()
    assert (d > 0).any()


def test_t_and_its_p_are_those_of_scipy():
    unsafe, safe = samples()
    found = score(stats_of(unsafe, safe))
    expected = scipy.stats.ttest_ind(unsafe, safe, equal_var=True, alternative="greater")
    np.testing.assert_allclose(found.t.numpy(), expected.statistic, rtol=1e-10)
    np.testing.assert_allclose(t_statistic(found.d, len(unsafe), len(safe)).numpy(), expected.statistic, rtol=1e-10)
    counts = torch.full((TOTAL,), len(unsafe)), torch.full((TOTAL,), len(safe))
    np.testing.assert_allclose(t_statistic(found.d, *counts).numpy(), expected.statistic, rtol=1e-10)
    np.testing.assert_allclose(found.q.numpy(), by_hand_bh(expected.pvalue.tolist()), rtol=1e-9)
    assert found.significant == sum(q < 0.05 for q in by_hand_bh(expected.pvalue.tolist()))
    assert 0 < found.significant < TOTAL


def by_hand_bh(p: list[float]) -> list[float]:
    """Benjamini and Hochberg 1995: q of p is the least m p' / rank(p') over all p' >= p, at most 1."""
    ranked = sorted(p)
    return [
        min(1.0, min(len(p) * other / (rank + 1) for rank, other in enumerate(ranked) if other >= one)) for one in p
    ]


@quick
@given(st.lists(st.floats(-8, 8), min_size=1, max_size=12), st.integers(2, 60))
def test_q_values_by_hand(t, degrees):
    p = [float(scipy.stats.t.sf(value, degrees)) for value in t]
    found = q_values(torch.tensor(t, dtype=torch.float64), degrees)
    np.testing.assert_allclose(found.numpy(), by_hand_bh(p), rtol=1e-8, atol=1e-12)


def test_q_keeps_false_discoveries_rare_when_nothing_differs():
    generator = np.random.default_rng(1)
    unsafe, safe = generator.normal(size=(2, 40, TOTAL))
    assert score(stats_of(unsafe, safe)).significant == 0


def test_huge_t_gives_a_q_of_zero_not_nan():
    assert q_values(torch.tensor([1e9, 0.0, -1e9], dtype=torch.float64), 200).tolist() == [0.0, 0.75, 1.0]


def test_shift_and_its_z_layer_by_layer():
    unsafe, safe = samples()
    stats = stats_of(unsafe, safe)
    shift = activation_shift(stats.unsafe, stats.safe)
    np.testing.assert_allclose(shift.numpy(), unsafe.mean(axis=0) - safe.mean(axis=0), rtol=1e-10, atol=1e-13)
    expected = [scipy.stats.zscore(part) for part in np.split(shift.numpy(), np.cumsum(WIDTHS)[:-1])]
    np.testing.assert_allclose(shift_zscore(shift, WIDTHS).numpy(), np.concatenate(expected), rtol=1e-10)


def test_z_of_a_layer_does_not_depend_on_the_others():
    shift = activation_shift(*(Moments.of(torch.from_numpy(values)) for values in samples()))
    scaled = shift.clone()
    scaled[30:80] *= 1000
    torch.testing.assert_close(shift_zscore(scaled, WIDTHS), shift_zscore(shift, WIDTHS))


def test_layer_of_equal_shifts_gets_zero():
    z = shift_zscore(torch.tensor([0.5, 0.5, 0.5, 1.0, 3.0], dtype=torch.float64), (3, 2))
    assert z.tolist() == [0.0, 0.0, 0.0, -1.0, 1.0]


def test_a_neuron_that_never_varies_gets_zero():
    unsafe, safe = samples()
    unsafe[:, 4] = safe[:, 4] = 0.5
    # Not even if its two constants differ: its effect would be infinite.
    unsafe[:, 7], safe[:, 7] = 2.0, 1.0
    found = score(stats_of(unsafe, safe))
    for values in (found.d, found.t):
        assert values[[4, 7]].tolist() == [0.0, 0.0]
        assert torch.isfinite(values).all()
    assert found.shift[[4, 7]].tolist() == [0.0, 1.0]
    assert found.q[4] > 0.4


@quick
@given(st.integers(0, 10**6), st.sampled_from([1e-3, 7.0]), st.sampled_from([-1e6, 3.0]))
def test_scores_do_not_change_with_unit_or_offset(seed, unit, offset):
    unsafe, safe = samples(seed)
    plain, changed = score(stats_of(unsafe, safe)), score(stats_of(unsafe * unit + offset, safe * unit + offset))
    torch.testing.assert_close(changed.d, plain.d, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(changed.z, plain.z, rtol=1e-4, atol=1e-5)


def test_exchanging_the_classes_turns_the_sign():
    unsafe, safe = samples()
    there, back = score(stats_of(unsafe, safe)), score(stats_of(safe, unsafe))
    for name in ("d", "shift", "z", "t"):
        torch.testing.assert_close(vars(there)[name], -vars(back)[name])


def test_choose_follows_the_rules_neuron_by_neuron():
    found = scores_of()
    selection = choose(found, Thresholds(1.0, 0.5))
    es, sas = set(), set()
    for neuron in range(TOTAL):
        if found.d[neuron].item() > 1.0:
            es.add(neuron)
        if found.z[neuron].item() > 0.5 and found.shift[neuron].item() > 0:
            sas.add(neuron)
    assert es - sas
    assert sas - es
    assert set(selection.es.flat.tolist()) == es
    assert set(selection.sas.flat.tolist()) == sas
    assert set(selection.union.flat.tolist()) == es | sas
    assert [chosen.label for chosen in selection[:3]] == ["ES", "SAS", "FULL"]
    assert {chosen.fingerprint for chosen in selection[:3]} == {"abc"}
    assert selection.union.widths == WIDTHS


def test_shift_that_is_negative_is_never_chosen():
    # All shifts are negative, so that the least negative one has a high z.
    unsafe, safe = samples()
    selection = choose(score(stats_of(unsafe - 100, safe)), Thresholds(-1e9, 0.0))
    assert len(selection.es) == TOTAL
    assert len(selection.sas) == 0


def test_thresholds_are_exceeded_strictly():
    found = scores_of()
    exact = Thresholds(found.d.max().item(), found.z.max().item())
    assert len(choose(found, exact).union) == 0


@quick
@given(st.integers(0, 10**6), st.sampled_from([0.01, 0.05, 0.1, 0.2]))
def test_thresholds_for_a_density(seed, density):
    found = scores_of(seed)
    selection = choose(found, thresholds_for(found, density))
    target = round(density * TOTAL)
    # One more neuron for each criterion adds at most two; and one for each is the least that is taken.
    assert target - 1 <= len(selection.union) <= max(target, 2)
    assert len(selection.es) == len(selection.sas) >= 1
    assert (found.d[selection.es.flat] > 0).all()
    assert (found.shift[selection.sas.flat] > 0).all()


def test_density_takes_the_top_of_both_rankings():
    found = scores_of()
    selection = choose(found, thresholds_for(found, 0.1))
    taken = len(selection.es)
    assert set(selection.es.flat.tolist()) == set(found.d.topk(taken).indices.tolist())
    allowed = torch.where(found.shift > 0, found.z, -torch.inf)
    assert set(selection.sas.flat.tolist()) == set(allowed.topk(taken).indices.tolist())


def test_density_that_few_neurons_can_reach():
    unsafe, safe = samples()
    unsafe[:, 5:] -= 100
    unsafe[:, :5] += 10
    found = score(stats_of(unsafe, safe))
    selection = choose(found, thresholds_for(found, 0.5))
    assert set(selection.union.flat.tolist()) == set(range(5))


def test_smallest_density_still_takes_a_neuron_for_each_criterion():
    # The target of one neuron cannot be met exactly, as the two rankings have different tops.
    found = scores_of()
    assert found.d.argmax() != found.z.argmax()
    selection = choose(found, thresholds_for(found, 1e-9))
    assert selection.es.flat.tolist() == [found.d.argmax().item()]
    assert selection.sas.flat.tolist() == [found.z.argmax().item()]


def test_density_of_a_model_of_one_neuron():
    found = score(stats_of(np.array([[1.0], [2.0]]), np.array([[0.0], [0.5]]), (1,)))
    assert len(choose(found, thresholds_for(found, 0.5)).union) <= 1


@pytest.mark.parametrize("density", [0, 1, -0.1, 1.5, math.nan])
def test_density_out_of_range(density):
    with pytest.raises(InputError, match="between 0 and 1"):
        thresholds_for(scores_of(), density)


@pytest.mark.parametrize(
    "arguments",
    [
        {"effect_size": 3.0},
        {"shift": 2.0},
        {"effect_size": 3.0, "density": 0.01},
        {"shift": 2.0, "density": 0.01},
        {"effect_size": 3.0, "shift": 2.0, "density": 0.01},
    ],
)
def test_mixed_arguments(arguments):
    with pytest.raises(InputError, match="both thresholds"):
        select(stats_of(*samples()), **arguments)
    with pytest.raises(InputError, match="both thresholds"):
        SelectionSettings(**arguments)


def test_settings_are_an_object_or_keywords_not_both():
    stats = stats_of(*samples())
    assert select(stats, SelectionSettings(density=0.1)) == select(stats, density=0.1)
    with pytest.raises(InputError, match="not both"):
        select(stats, SelectionSettings(density=0.1), density=0.2)


def test_select_by_thresholds_by_density_and_by_default():
    stats = stats_of(*samples())
    found = score(stats)
    assert resolve_thresholds(found, SelectionSettings(effect_size=1.0, shift=0.5)) == Thresholds(1.0, 0.5)
    assert select(stats, effect_size=1.0, shift=0.5) == choose(found, Thresholds(1.0, 0.5)).union
    assert select(stats, density=0.1) == choose(found, thresholds_for(found, 0.1)).union
    assert select(stats) == choose(found, thresholds_for(found, 0.01)).union
    # Zero is a threshold, not an absent one.
    assert resolve_thresholds(found, SelectionSettings(effect_size=0.0, shift=0.0)) == Thresholds(0.0, 0.0)


@quick
@given(st.floats(-2, 4), st.floats(-2, 4), st.floats(0, 1))
def test_higher_thresholds_choose_a_subset(d, z, step):
    assume(step > 0)
    found = scores_of()
    low, high = choose(found, Thresholds(d, z)).union, choose(found, Thresholds(d + step, z + step)).union
    assert len(high - low) == 0


def test_scores_round_trip(tmp_path):
    found = scores_of()
    found.save(tmp_path / "scores.safetensors")
    back = Scores.load(tmp_path / "scores.safetensors")
    for name in ("d", "shift", "z", "t", "q"):
        assert torch.equal(vars(back)[name], vars(found)[name])
    assert (back.widths, back.fingerprint) == (WIDTHS, "abc")
    assert choose(back, Thresholds(1, 1)).union == choose(found, Thresholds(1, 1)).union


def test_scores_file_that_cannot_be_used(tmp_path):
    path = tmp_path / "scores.safetensors"
    with pytest.raises(InputError, match="does not exist"):
        Scores.load(path)
    stats_of(*samples()).save(path)
    with pytest.raises(InputError, match="should hold scores"):
        Scores.load(path)
    found = scores_of()
    found.z[3] = torch.nan
    found.save(path)
    with pytest.raises(InputError, match="not finite in 'z'"):
        Scores.load(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="not a whole"):
        Scores.load(path)
