"""What tests of neurons share."""

import pytest

from tests.helpers.tiny_experts import MIXTURES


@pytest.fixture(params=list(MIXTURES))
def mixture(request):
    """The name of each mixture of experts in turn."""
    return request.param
