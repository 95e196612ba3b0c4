"""The command line."""

from safeneuron.cli.app import main

__all__ = ("main",)
