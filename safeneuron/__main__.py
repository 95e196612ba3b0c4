"""``python -m safeneuron`` is the program ``safeneuron``, for launchers that start modules."""

from safeneuron.cli import main

main()
