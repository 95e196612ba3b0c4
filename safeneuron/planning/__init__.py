"""What a run needs in memory and time, before it runs.

Estimates only; what the machine has is in ``runtime``.
"""

from safeneuron._lazy import face

MODULES = {
    "duration": ("clock_for", "table_of_times"),
    "plan": ("ModelSpec", "device_asked", "plan_for", "plans_for", "table_of_needs"),
}
__all__, __getattr__, __dir__ = face(__name__, MODULES)
