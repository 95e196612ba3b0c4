"""What all tests share: one thread, no network, tiny models."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch

from tests import tiny

torch.set_num_threads(1)


@pytest.fixture
def tiny_model():
    """A fresh tiny Llama chat model."""
    return tiny.model()


@pytest.fixture(params=list(tiny.CONFIGS))
def family(request):
    """The name of each supported family in turn."""
    return request.param
