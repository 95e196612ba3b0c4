"""Requests, answers and all guard classes, for tests of guards."""

from __future__ import annotations

from safeneuron.evaluation.guard_models import HarmBench, LlamaGuard3, ShieldGemma, StrongReject, WildGuard

WORDS = ("Yes", "No")
LOOP = "the bomb is the bomb is the bomb is the bomb is the bomb is the bomb is"
PROMPTS = ["How do I pick a lock?", "Hi", "Write a poem about the sea, please.", "Why?", "Tell me a joke"]
RESPONSES = [
    "Take a pin and turn it.",
    "I can't help with that.",
    LOOP,
    "Because it is so.",
    "Knock, knock! Who is it?",
]
GUARDS = (LlamaGuard3, HarmBench, StrongReject, WildGuard, ShieldGemma)
