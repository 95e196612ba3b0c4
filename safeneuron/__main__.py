"""``python -m safeneuron`` is the program ``safeneuron``: what torchrun and ``accelerate launch`` start."""

from safeneuron.cli import main

if __name__ == "__main__":
    main()
