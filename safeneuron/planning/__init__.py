"""What a run needs in memory and time, before it runs.

Estimates only; what the machine has is in ``runtime``.
"""

from safeneuron._lazy import face

MODULES = {
    "duration": ("TimeRecord", "table_of_times"),
    "plan": ("device_asked", "plan_for", "plans_for", "table_of_needs"),
}
__all__, __getattr__, __dir__ = face(__name__, MODULES)
