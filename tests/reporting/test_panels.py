"""Charts as values: what has its default is not in their JSON."""

from __future__ import annotations

from safeneuron.reporting.panels import Axis, Bar, BarPart, Chart, ChartPanel, Mark, Note, Series


def test_the_script_gets_only_what_is_known() -> None:
    bar = Bar(group=0, series=0, parts=(BarPart(0.5), BarPart(0.25, hatched=True)), low=0.0, high=1.0, tip="a")
    bars = ChartPanel(kind="bars", label="b", y=Axis("y", min=0), series=(Series("T0"),), groups=("g",), bars=(bar,))
    plot = ChartPanel(
        kind="plot", label="p", y=Axis("y"), x=Axis("x"), series=(Series("s", 0, (Mark(x=1, y=2, tip="t"),)),)
    )
    record = Chart(panels=(bars, plot), stacked=True).to_json()
    assert record == {
        "panels": [
            {
                "kind": "bars",
                "label": "b",
                "y": {"title": "y", "min": 0},
                "series": [{"name": "T0"}],
                "groups": ["g"],
                "bars": [
                    {
                        "group": 0,
                        "series": 0,
                        "parts": [{"value": 0.5}, {"value": 0.25, "hatched": True}],
                        "low": 0.0,
                        "high": 1.0,
                        "tip": "a",
                    }
                ],
            },
            {
                "kind": "plot",
                "label": "p",
                "x": {"title": "x"},
                "y": {"title": "y"},
                "series": [{"name": "s", "colour": 0, "points": [{"x": 1, "y": 2, "tip": "t"}]}],
            },
        ],
        "stacked": True,
    }
    assert Note("n", "interval") == Note("n", look="interval")
