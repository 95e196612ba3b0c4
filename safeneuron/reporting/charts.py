"""The numbers behind the live figures of a page, as plain values that ``templates/charts.js`` draws.

A figure is a dict of ``panels``, shown together or, with ``choose``, one at a time. A panel is of the kind ``bars`` or
``plot``; every mark carries the words that stand beside it when it is pointed at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safeneuron.reporting.results import attack_of, attack_title, columns_of, incoherent_share, percent, success_of

Chart = dict[str, Any]

RATE = {"title": "attack success rate", "percent": True, "min": 0, "max": 1}
_LEGEND = [{"text": "incoherent", "class": "hatched"}, {"text": "95 % interval", "class": "interval"}]
_CRITERIA = (("ES only", 1), ("ES and SAS", 4), ("SAS only", 2))
"""The parts of a set found by either criterion, with their colours."""


def charts_of(results: dict[str, Any], neurons: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Chart]:
    """Every live figure for which there are numbers; ``neurons`` are the strongest of each state (``neuron_chart``)."""
    states = results["states"]
    found = {
        "attack": attack_chart(results),
        "curve": curve_chart(states),
        "layers": layers_chart(states),
        "neurons": neuron_chart(neurons, results["layers"]),
        "training": training_chart(states),
    }
    return {name: chart for name, chart in found.items() if chart["panels"]}


def attack_chart(results: dict[str, Any]) -> Chart:
    """Attack success rate of every state under every attack, the incoherent share on top of it."""
    states = results["states"]
    columns = [c for c in columns_of(results) if any(success_of(attack_of(state, *c)) for state in states)]
    bars = []
    for group, column in enumerate(columns):
        for index, state in enumerate(states):
            attack = attack_of(state, *column)
            share = success_of(attack)
            if share is None or attack is None:
                continue
            broken = incoherent_share(attack) or 0.0
            lines = [
                f"{state['name']}, {attack_title(*column)}",
                f"complied: {share.words()}, {share.hits} of {share.total}",
                f"incoherent: {percent(broken)}",
                f"{attack['neurons']:,} neurons",
            ]
            parts = [{"value": share.rate}, {"value": broken, "hatched": True}]
            bar = {"group": group, "series": index, "low": share.low, "high": share.high}
            bars.append({**bar, "parts": parts if broken else parts[:1], "tip": "\n".join(lines)})
    panel = {
        "kind": "bars",
        "label": "Attack success rate of every state under every attack",
        "y": RATE,
        "groups": [attack_title(*column) for column in columns],
        "series": _series(states),
        "bars": bars,
        "notes": _LEGEND,
    }
    return {"panels": [panel] if bars else []}


def curve_chart(states: Sequence[dict[str, Any]]) -> Chart:
    """Attack success rate against the share of neurons pruned."""
    series, densities = [], set()
    for index, state in enumerate(states):
        judged = sorted((p for p in state["curve"] if p["rate"] is not None), key=lambda point: point["density"])
        densities |= {point["density"] for point in judged}
        points = [
            {
                "x": point["density"],
                "y": point["rate"],
                "low": point["low"],
                "high": point["high"],
                "tip": f"{state['name']}, {100 * point['density']:.3g} % pruned ({point['neurons']:,} neurons)\n"
                f"complied: {percent(point['rate'])} ({percent(point['low'])} to {percent(point['high'])})\n"
                f"incoherent: {percent(point['incoherent'])}",
            }
            for point in judged
        ]
        if points:
            series.append({"name": state["name"], "colour": index, "points": points})
    ticks = [[density, f"{100 * density:.3g} %"] for density in sorted(densities)]
    wide = bool(densities) and min(densities) > 0 and max(densities) >= 10 * min(densities)
    axis = {"title": "share of all neurons pruned, highest scores first", "log": wide, "ticks": ticks[:9]}
    label = "Attack success rate as more neurons are pruned"
    panel = {
        "kind": "plot",
        "lines": True,
        "label": label,
        "x": axis,
        "y": RATE,
        "series": series,
        "notes": _LEGEND[1:],
    }
    return {"panels": [panel] if series else []}


def layers_chart(states: Sequence[dict[str, Any]]) -> Chart:
    """Safety neurons in each layer, those found by both criteria apart; all panels on the same axes."""
    known = [state for state in states if state["neurons"]]
    top = max((max(state["neurons"]["per_layer"]["FULL"], default=0) for state in known), default=0)
    panels: list[dict[str, Any]] = []
    for state in known:
        counts = state["neurons"]["per_layer"]
        bars = []
        for layer, (es, sas, full) in enumerate(zip(counts["ES"], counts["SAS"], counts["FULL"], strict=True)):
            # The set is the union of both, so its size tells how many are in both.
            sizes = (full - sas, es + sas - full, full - es)
            parts = [
                {"value": size, "colour": colour}
                for size, (_, colour) in zip(sizes, _CRITERIA, strict=True)
                if size > 0
            ]
            tip = f"{state['name']}, layer {layer}: {full:,} neurons\nES {es:,}, SAS {sas:,}, both {sizes[1]:,}"
            bars.append({"group": layer, "series": 0, "parts": parts, "tip": tip})
        panels.append(
            {
                "kind": "bars",
                "title": f"{state['name']}: {state['neurons']['FULL']:,} neurons",
                "label": f"Safety neurons of {state['name']} in each layer",
                "sparse": True,
                "height": 130,
                "x": {"title": "layer"},
                "y": {"title": "neurons", "max": max(1, top)},
                "groups": [str(layer) for layer in range(len(bars))],
                "series": [{"name": state["name"]}],
                "bars": bars,
                "notes": [{"text": text, "colour": colour} for text, colour in _CRITERIA] if not panels else [],
            }
        )
    return {"panels": panels}


def neuron_chart(neurons: Mapping[str, Sequence[Sequence[float]]], layers: int) -> Chart:
    """The strongest neurons of a state, by depth and effect size.

    A neuron is its layer, its index, the layer's width, d, z, and 1 if ES found it, 2 if SAS did, or 3 for both.
    """
    panels = []
    for name, found in neurons.items():
        groups: dict[str, list[dict[str, Any]]] = {title: [] for title, _ in _CRITERIA}
        for layer, index, width, d, z, by in found:
            title = {1: "ES only", 2: "SAS only", 3: "ES and SAS"}[int(by)]
            tip = f"layer {layer:.0f}, neuron {index:.0f} ({title})\neffect size d {d:.2f}, shift z {z:.2f}"
            groups[title].append({"x": layer + index / width, "y": d, "tip": tip})
        panels.append(
            {
                "kind": "plot",
                "name": name,
                "title": f"{name}: the {len(found):,} strongest",
                "label": f"The strongest safety neurons of {name} by layer and effect size",
                "radius": 2.6,
                "x": {"title": "layer, and place of the neuron in it", "min": 0, "max": layers},
                "y": {"title": "effect size d"},
                "series": [{"name": t, "colour": c, "points": groups[t]} for t, c in _CRITERIA if groups[t]],
            }
        )
    return {"panels": [panel for panel in panels if panel["series"]], "choose": True}


def training_chart(states: Sequence[dict[str, Any]]) -> Chart:
    """Loss, preference accuracy and reward margin over the steps of each trained state."""
    panels = []
    for key, title in (("loss", "loss"), ("accuracy", "preference accuracy"), ("margin", "reward margin")):
        series = []
        for index, state in enumerate(states):
            steps = [step for step in state["training"] if step.get(key) is not None]
            points = [
                {"x": s["step"], "y": s[key], "tip": f"{state['name']}, step {s['step']}: {title} {s[key]:.3g}"}
                for s in steps
            ]
            if points:
                series.append({"name": state["name"], "colour": index, "points": points})
        limits = {"percent": True, "min": 0, "max": 1} if key == "accuracy" else {}
        panel = {"kind": "plot", "lines": True, "label": f"{title} over the steps", "radius": 1.6, "height": 150}
        axes = {"x": {"title": "step"}, "y": {"title": title, **limits}}
        if series:
            panels.append({**panel, **axes, "series": series})
    return {"panels": panels}


def scatter_chart(points: Sequence[Mapping[str, Any]], x: str, y: str) -> Chart:
    """Shares against shares: each point has a ``name``, and (share, low, high) as ``x`` and as ``y``."""
    series = []
    for index, point in enumerate(points):
        (across, left, right), (up, low, high) = point["x"], point["y"]
        tip = f"{point['name']}\n{x}: {percent(across)} ({percent(left)} to {percent(right)})"
        tip += f"\n{y}: {percent(up)} ({percent(low)} to {percent(high)})"
        place = {"x": across, "left": left, "right": right, "y": up, "low": low, "high": high}
        series.append({"name": point["name"], "colour": index, "points": [{**place, "tip": tip}]})
    axes = {"x": {"title": x, "percent": True, "min": 0, "max": 1}, "y": {**RATE, "title": y}}
    panel = {"kind": "plot", "label": f"{y} against {x}", "height": 300, "radius": 5.5, **axes, "series": series}
    return {"panels": [{**panel, "notes": _LEGEND[1:]}] if series else []}


def _series(states: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": state["name"]} for state in states]
