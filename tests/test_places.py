"""Devices and dtypes as users name them."""

import pytest
import torch

from subbit.errors import RecipeError
from subbit.places import parse_device, parse_dtype


@pytest.mark.parametrize("device", ["cpu", "auto", torch.device("cpu")])
def test_devices_that_are_there(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_device(device) == torch.device("cpu")


@pytest.mark.parametrize("device", ["foo", "meta", "cuda", "cuda:7", "xpu", 1.5])
def test_devices_that_are_not(device, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    with pytest.raises(RecipeError, match=r"unknown device|not available"):
        parse_device(device)


def test_only_so_many_gpus(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: cuda)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert parse_device("cuda:1").index == 1
    with pytest.raises(RecipeError, match=r"cuda:2.*not available"):
        parse_device("cuda:2")


def test_dtypes():
    assert parse_dtype("auto") == "auto"
    assert parse_dtype("bfloat16") == parse_dtype(torch.bfloat16) == torch.bfloat16
    assert parse_dtype(torch.float64) == torch.float64
    for wrong in ("bf16", "int8", torch.int8, None):
        with pytest.raises(RecipeError, match="unknown dtype"):
            parse_dtype(wrong)
