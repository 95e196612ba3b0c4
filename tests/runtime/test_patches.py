"""What is changed of other libraries is there to be changed, and is put back."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from trl.trainer import utils

from safeneuron.runtime.patches import answers_scored_alone, warnings_told


class Told(UserWarning):
    """The kind that is asked for."""


def test_warnings_of_one_kind_are_told_and_others_shown():
    messages: list[str] = []
    shown = warnings.showwarning

    def work() -> None:
        warnings.warn("this", Told, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="else") as others, warnings_told(Told, messages.append):
        work()
    assert messages == ["this"]
    assert len(others) == 1
    assert warnings.showwarning is shown


def test_trl_asks_whether_there_is_triton():
    original = utils._use_triton
    with answers_scored_alone():
        assert utils._use_triton(torch.device("cpu"))
    assert utils._use_triton is original


def test_libraries_draw_no_bars():
    code = "from safeneuron.runtime.patches import without_progress_bars; without_progress_bars(); "
    code += "from tqdm import tqdm; assert tqdm([]).disable"
    subprocess.run([sys.executable, "-c", code], check=True)
