"""What all tests share: one thread, no network, tiny models."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Sums depend on the number of threads; runs in processes of their own are compared with runs in this one.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell starts what runs in the background with Ctrl-C switched off, which children would take over from here.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

from tests.helpers import tiny

torch.set_num_threads(1)


@pytest.fixture
def tiny_model():
    """A fresh tiny Llama chat model."""
    return tiny.model()


@pytest.fixture(params=list(tiny.CONFIGS))
def family(request):
    """The name of each supported family in turn."""
    return request.param


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A finished run on a tiny model, for reading only: ``(its folder, its config file, what its watcher saw)``."""
    from tests.helpers import tiny_run

    world = tmp_path_factory.mktemp("world")
    config = tiny_run.write_world(world)
    return world / "run", config, tiny_run.execute(config, world / "run")
