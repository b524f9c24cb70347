"""Moments in few bits, against torchao's."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kdtune.optim import moments

CPU = torch.device("cpu")
CODED: list[moments.Name] = ["adamw_8bit", "adamw_4bit", "adamw_fp8"]
COUNT = 256 * 64


def torchao(module: str) -> Any:
    return importlib.import_module(f"torchao.optim.{module}")


def torchao_state(name: str, signed: bool) -> Any:
    if name == "adamw_fp8":
        return torchao("subclass_fp8").OptimStateFp8.zeros((COUNT,), 256)
    bits = 8 if name == "adamw_8bit" else 4
    kind = getattr(torchao(f"subclass_{bits}bit"), f"OptimState{bits}bit")
    return kind.zeros((COUNT,), signed, moments.BLOCK_SIZES[name])


def draw(signed: bool) -> Tensor:
    """Of every size, as moments are: 14 powers of ten within a block."""
    torch.manual_seed(0)
    value = torch.randn(COUNT) * 10 ** (2 * torch.randn(COUNT))
    return value if signed else value.square()


def write(name: moments.Name, value: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    moment, scale = moments.zeros(name, value, torch.float32, CPU)
    assert scale is not None
    moments.write(value, moment, scale, signed=signed, rounding=Tensor.copy_)
    return moment, scale


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", CODED)
def test_codes_and_values_are_those_of_torchao(name: moments.Name, signed: bool) -> None:
    value, theirs = draw(signed), torchao_state(name, signed)
    theirs.copy_(value)
    moment, scale = write(name, value, signed)
    found, expected = moments.read(moment, scale, signed=signed), theirs.dequantize()
    is_lifted = (expected == 0) & (value != 0) & (not signed)
    assert is_lifted.any() == (not signed and name != "adamw_4bit"), "the one difference"
    assert torch.equal(scale, theirs.scale)
    # Half way between two codes, the middle is rounded in another way.
    assert (found != expected)[~is_lifted].float().mean() < 1e-3
    torch.testing.assert_close(found[~is_lifted], expected[~is_lifted], rtol=0.2, atol=0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_code_that_is_looked_up_is_the_nearest(bits: int, signed: bool) -> None:
    """At the ends of all ranges that the table knows, at the middles between codes, and around both."""
    table = moments.table(bits, signed, CPU)
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    ends = torch.cat([upper, upper | (2**16 - 1)]).view(torch.float32)
    value = torch.cat([ends[ends.abs() <= 1], table.middles[:-1], table.values, torch.rand(10**5) * 2 - 1])
    value = torch.cat([value, value.nextafter(torch.ones(1)), value.nextafter(-torch.ones(1))])
    expected = torch.bucketize(value, table.middles[:-1], right=True)
    assert torch.equal(table.nearest(value).long(), expected)
    some = torch.randperm(len(value))[:5000]
    distance = (value[some, None].double() - table.values.double()).abs()
    chosen = distance.gather(1, expected[some, None])[:, 0]
    torch.testing.assert_close(chosen, distance.amin(dim=1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", CODED)
def test_a_second_moment_is_not_rounded_to_nothing(name: moments.Name) -> None:
    value = draw(signed=False)
    found = moments.read(*write(name, value, signed=False), signed=False)
    largest = value.view(-1, moments.BLOCK_SIZES[name]).amax(dim=1, keepdim=True)
    assert found.min() > 0
    assert (found.view_as(largest.expand(-1, moments.BLOCK_SIZES[name])) <= 1.001 * largest).all()


@pytest.mark.parametrize(("name", "error"), [("adamw_8bit", 0.02), ("adamw_4bit", 0.2), ("adamw_fp8", 0.04)])
@pytest.mark.parametrize("signed", [True, False])
def test_what_is_written_can_be_read(name: moments.Name, signed: bool, error: float) -> None:
    torch.manual_seed(0)
    value = torch.randn(COUNT) if signed else torch.randn(COUNT).square()
    found = moments.read(*write(name, value, signed), signed=signed)
    assert (found - value).norm() < error * value.norm()
    if not signed:  # the signed map of torchao has no -1
        assert torch.equal(found, moments.read(*write(name, found.clone(), signed), signed=signed)), "once is enough"


@pytest.mark.parametrize("name", CODED)
def test_nothing_is_nothing(name: moments.Name) -> None:
    moment, scale = moments.zeros(name, torch.empty(COUNT), torch.float32, CPU)
    assert (moments.read(moment, scale, signed=True) == 0).all()
    found = moments.read(*write(name, torch.zeros(COUNT), signed=False), signed=False)
    assert found.max() < 1e-12


@pytest.mark.parametrize(
    ("shape", "is_coded"), [((4096,), True), ((64, 64), True), ((64, 63), False), ((4095,), False), ((8, 513), False)]
)
@pytest.mark.parametrize("name", CODED)
def test_small_and_odd_parameters_have_floats(name: moments.Name, shape: tuple[int, ...], is_coded: bool) -> None:
    moment, scale = moments.zeros(name, torch.empty(shape, dtype=torch.bfloat16), torch.bfloat16, CPU)
    assert (scale is not None) == is_coded
    assert is_coded or (moment.dtype == torch.float32 and moment.shape == shape)
    assert not is_coded or moment.numel() * moments.CODES_PER_BYTE[name] == math.prod(shape)


@pytest.mark.parametrize("to", ["adamw", *CODED])
@pytest.mark.parametrize("name", ["adamw", *CODED])
def test_from_one_format_to_another(name: moments.Name, to: moments.Name) -> None:
    value = draw(signed=True).view(64, 256)
    saved, saved_scale = moments.zeros(name, value, torch.float32, CPU)
    moments.assign(saved, saved_scale, value, None, signed=True)
    moment, scale = moments.zeros(to, value, torch.float32, CPU)
    moments.assign(moment, scale, saved, saved_scale, signed=True)
    if name == to:
        assert torch.equal(moment.view(torch.uint8), saved.view(torch.uint8))
        assert scale is saved_scale is None or torch.equal(scale, saved_scale)
    found = moments.read(moment, scale, signed=True).view(64, 256)
    largest = value.abs().amax(dim=1, keepdim=True)
    assert ((found - value).abs() <= 0.2 * largest).all()
