"""The description of the figures has the numbers of the results."""

from __future__ import annotations

from tests.helpers.sample_results import inside, rendered, sample_results


def test_live_figures_have_the_numbers_of_the_results() -> None:
    results = sample_results()
    charts = inside(rendered(results)["report.html"], "charts")
    (panel,) = charts["attack"]["panels"]
    bar = next(bar for bar in panel["bars"] if "T1, FULL adaptive" in bar["tip"])
    success = results["states"][1]["attacks"][6]["harmful"]
    assert (bar["parts"][0]["value"], bar["low"], bar["high"]) == (success["rate"], success["low"], success["high"])
    assert bar["parts"][1] == {"value": 3 / 47, "hatched": True}
    layers = charts["layers"]["panels"][1]
    counts = results["states"][1]["neurons"]["per_layer"]
    for layer, bar in enumerate(layers["bars"]):
        es, both, sas = (sum(p["value"] for p in bar["parts"] if p["colour"] == colour) for colour in (1, 4, 2))
        full = counts["FULL"][layer]
        assert (both, sas) == (
            max(0, counts["ES"][layer] + counts["SAS"][layer] - full),
            max(0, full - counts["ES"][layer]),
        )
        assert es == max(0, full - counts["SAS"][layer])
