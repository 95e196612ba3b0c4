"""What the numbers of a report rest on, and what they cannot show."""

from __future__ import annotations

from typing import Any

from safeneuron.shares import listed, percent


def methods(results: dict[str, Any]) -> list[str]:
    """How the numbers were made, in a few sentences; the settings say the rest."""
    trained = any(state["align"] for state in results["states"])
    eyes = results.get("part") == "eyes"
    where = "feed-forward networks of the vision tower and the projector" if eyes else "layers' feed-forward networks"
    said = [
        f"A neuron is one of the {results['neurons_total']:,} places between the matrices of the {where}. "
        "Its activations are recorded over harmful and harmless prompts of like form.",
        "ES holds the neurons whose mean activation differs by a large effect size d (the difference over the pooled "
        "standard deviation), SAS those whose shift stands out in their layer (z-score), FULL all of both.",
        "An attack sets neurons to zero, or does what its name says, and the model answers held-out requests. The "
        f"judge {results['judge']} sorts the answers.",
        "Shares have 95 % Wilson intervals; differences on the same requests have Newcombe's interval and McNemar's "
        "exact test, corrected by Holm.",
    ]
    if trained:
        said.insert(
            2,
            "Trained states learn from preference pairs (DPO), the weights of the frozen neurons held exactly as they "
            "were. Which were frozen, and how far the rest moved, stands in the table of states.",
        )
    return said


def untried(results: dict[str, Any]) -> str:
    """Which kinds of attack the results tell nothing about."""
    tried = {(attack["set"], attack["knowledge"]) for state in results["states"] for attack in state["attacks"]}
    kinds = {knowledge for _, knowledge in tried}
    missing = [
        words
        for words, was_tried in (
            ("other ways to find the neurons", "rival" in kinds),
            ("clamping them to other values", "operator" in kinds),
            ("pruning in several rounds", "iterated" in kinds),
            ("removing a refusal direction", ("direction", "model") in tried),
            ("fine-tuning", ("fine-tune", "model") in tried),
            ("jailbreak prompts", "input" in kinds),
        )
        if not was_tried
    ]
    if missing:
        return f"A low rate tells nothing of attacks that were not tried here: {listed(missing)}."
    return "An attacker who searches longer, tunes more or asks otherwise than here may do better than any of these."


def limits(results: dict[str, Any]) -> list[str]:
    """What the numbers of this report cannot show."""
    said = [
        "The intervals hold for the choice of prompts only. They say nothing about other seeds, other decoding or "
        f"another training run: this is one run with seed {results['seed']}.",
        "Intervals that do not overlap are a strict test of a difference; intervals that overlap do not prove that "
        "there is none.",
        untried(results),
        f"Answers were cut at {results['max_new_tokens']} tokens and judged on that beginning.",
        "Static means that the attacker prunes the neurons found on the base model; adaptive, that they were found "
        "again on the model under attack. Adaptive is the honest threat; on the base model the two are the same.",
        "Incoherent text is counted as neither refused nor complied: a model that babbles is not a safe one.",
    ]
    if results["judge"] == "refusal-embedding":
        said.append(
            "The judge tells refusals, answers and babble apart; it does not see whether an answer is harmful. An "
            "answer to something else counts as harmless. How often it errs is in docs/judge-card.md."
        )
    elif results["judge"] == "refusal-phrases":
        said.append(
            "The judge looks for phrases of refusal. It counts any other coherent answer as compliance, also one that "
            "helps nobody, and it misses refusals in other words: hold a sample against your own reading."
        )
    else:
        said.append(f"The verdicts are those of the judge {results['judge']}, errors included: read a sample yourself.")
    said += [agreed(state, pair) for state in results["states"] for pair in state.get("agreement", ())]
    if len(results["states"]) > 2:
        said.append(
            "Several states are compared with one base; among many comparisons some stand out by chance. The corrected "
            "p-values of the differences allow for that, the intervals do not."
        )
    return said


def agreed(state: dict[str, Any], pair: dict[str, Any]) -> str:
    """How far two judges agree on the answers of a state."""
    first, second = pair["judges"]
    if not pair["n"]:
        return f"On {state['name']} there is no answer on which both {first} and {second} had an opinion."
    kappas = [
        f"{name} {pair[name]['kappa']:.2f}" for name in ("complied", "refused") if pair[name]["kappa"] is not None
    ]
    kappa = f"; Cohen's kappa of {' and of '.join(kappas)}" if kappas else ""
    return (
        f"On {state['name']}, the judges {first} and {second} say the same of {percent(pair['agreement'])} of "
        f"{pair['n']:,} answers{kappa}."
    )
