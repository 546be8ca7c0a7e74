"""Odd inputs that once ended in PyTorch's or Python's own words, or in a page's HTML."""

import pytest
import torch

import msif_lab as msif
from msif_lab.memory import parse_bytes


def test_a_model_whose_outputs_have_no_batch_is_refused_by_that_name():
    class MeanOfTheBatch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x).mean(0)

    data = msif.Examples(torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1]))
    with pytest.raises(msif.UnsupportedModelError, match="with the batch around an example"):
        msif.Pipeline([msif.Stage("fit", MeanOfTheBatch(), data)])


@pytest.mark.parametrize("size", [float("inf"), float("nan"), -1, True, "lots"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match=r"memory=.* is not a size"):
        parse_bytes(size)


def test_class_names_are_text_in_a_page():
    data = msif.Examples(torch.zeros(2, 1), [0, 1], classes=("<b>bold</b>", "plain"))
    assert "<b>" not in data._repr_html_() and "&lt;b&gt;" in data._repr_html_()
