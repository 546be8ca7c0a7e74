"""Reduced precision is asked for, measured, and gone afterwards."""

import pytest
import torch
from oracles import LINKS, random_pipeline

import msif_lab as msif


def test_settings_change_inside_and_return(capsys):
    pipeline = random_pipeline("mlp", link=LINKS["proximal"], fit=False).adopt().to(torch.float32)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for kind, inside in (("tf32", "high"), ("bf16", "medium"), ("float32", "highest")):
        with (
            pytest.raises(KeyboardInterrupt),
            msif.reduced_precision(kind, pipeline) as errors,
        ):
            assert torch.get_float32_matmul_precision() == inside
            assert torch.backends.cudnn.allow_tf32 == (kind != "float32")
            assert set(errors) == {"stage0", "stage1"}
            assert all(0 <= error < 0.05 for error in errors.values())
            raise KeyboardInterrupt
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
        assert f"stage1: {kind} changes a ggn product by" in capsys.readouterr().out


def test_what_cannot_be_faster_is_refused():
    pipeline = random_pipeline("mlp", link=LINKS["proximal"], fit=False).adopt()
    with pytest.raises(ValueError, match="float32"), msif.reduced_precision("tf32", pipeline):
        pass
    with pytest.raises(ValueError, match="kind='fp8'"), msif.reduced_precision("fp8", pipeline):
        pass
