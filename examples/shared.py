"""What the examples share: options, neurons to freeze, a few harmless rows to train on, and the proof at the end."""

import argparse
from typing import Any

import torch

import safeneuron as sn

REFUSAL, CONSENT = "I can't help with that.", "Sure, let us begin."


def options(description: str) -> argparse.Namespace:
    """What can be said on the command line of every example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="embedded", help="'embedded', a folder, or a name on the Hub")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps")
    parser.add_argument("--out", default="runs/example", help="folder for what the trainer writes")
    return parser.parse_args()


def safety_neurons(model: sn.Model) -> sn.NeuronSet:
    """The hundredth of the model's neurons that tell harmful from harmless requests best."""
    unsafe = sn.read_prompts("twins:unsafe", split="discovery", count=24)
    safe = sn.read_prompts("twins:safe", split="discovery", count=24)
    return sn.select(sn.measure(model, unsafe=unsafe, safe=safe), density=0.01)


def preferences() -> list[dict[str, Any]]:
    """Sixteen rows ``prompt``, ``chosen``, ``rejected``: refuse what is harmful, and nothing else."""
    rows = []
    for source, chosen, rejected in (("unsafe", REFUSAL, CONSENT), ("safe", CONSENT, REFUSAL)):
        for prompt in sn.read_prompts(f"twins:{source}", split="training", count=8):
            rows.append(
                {
                    "prompt": [{"role": "user", "content": prompt.text}],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                }
            )
    return rows


def weights_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all weights, to compare with after training."""
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def show_proof(before: dict[str, torch.Tensor], network: torch.nn.Module, neurons: sn.NeuronSet) -> None:
    """Compare every weight with what it was, and say what stayed and what moved."""
    frozen = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in before.items()}
    for piece in sn.owned_slices(network, neurons):
        frozen[piece.name].index_fill_(piece.dim, piece.index.cpu(), True)
    held = moved = free = 0
    for name, parameter in network.named_parameters():
        same = (parameter == before[name]).cpu()
        assert same[frozen[name]].all(), f"{name}: a frozen weight has changed"
        held += int(frozen[name].sum())
        free += int((~frozen[name]).sum())
        moved += int((~same).sum())
    print(f"{len(neurons):,} frozen neurons: all of their {held:,} weights are identical")
    print(f"{moved:,} of the {free:,} other weights have moved ({moved / free:.1%})")
