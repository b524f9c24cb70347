"""A float32 value as a bf16 weight and a rest, and as a bf16 weight by chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdtune.optim.rounding import join, round_stochastically, split

NEVER_NUMBERS = [0x7FFFFFFF, 0x7FC00000, -0x400000]  # CUDA's, C's, x86's
SPECIAL = [0, -(2**31), 1, 0x7F800000, -0x800000, 0x7F7FFFFF, 0x3F800000]  # zeros, a denormal, infinities, the largest


def as_float(bits: list[int] | Tensor) -> Tensor:
    return torch.as_tensor(bits, dtype=torch.int32).view(torch.float32)


def split_of(value: Tensor) -> tuple[Tensor, Tensor]:
    weight, rest = torch.empty_like(value, dtype=torch.bfloat16), torch.empty_like(value, dtype=torch.int16)
    split(value, weight, rest)
    return weight, rest


def every_rest() -> Tensor:
    """All lower halves below some upper ones: of any sign and size, next to a power of two, and denormal."""
    upper = torch.tensor([0x3F80, 0x3FFF, 0x4049, -0x4080, -0x3FB7, 0x0001, 0x0000, -0x8000, 0x7F7F, 0x0080, -0x0081])
    return as_float(((upper << 16)[:, None] + torch.arange(2**16)).view(-1).to(torch.int32))


def test_nothing_is_lost() -> None:
    value = torch.cat([every_rest(), torch.randn(10**5), as_float(SPECIAL)])
    assert torch.equal(join(*split_of(value)).view(torch.int32), value.view(torch.int32))


def test_weights_are_the_nearest_and_ties_go_away_from_zero() -> None:
    value = every_rest()
    weight, _ = split_of(value)
    is_tie = value.view(torch.int32) & 0xFFFF == 2**15
    assert torch.equal(weight[~is_tie], value[~is_tie].bfloat16())
    assert torch.equal(weight[is_tie].view(torch.int16), (value[is_tie].view(torch.int32) >> 16).to(torch.int16) + 1)


def test_the_rest_is_small() -> None:
    """So that it may be left out: the model that is saved has the nearest weights."""
    value = torch.randn(10**5)
    weight, rest = split_of(value)
    assert ((value - weight.float()).abs() <= value.abs() * 2**-8).all()
    assert rest.float().mean().abs() < 300, "and has either sign"
    assert rest.float().std() == pytest.approx(2**16 / 12**0.5, rel=0.02)


@pytest.mark.parametrize("bits", NEVER_NUMBERS)
def test_what_is_no_number_stays_none(bits: int) -> None:
    value = as_float([bits])
    weight, rest = split_of(value)
    assert weight.isnan().all()
    assert join(weight, rest).isnan().all()
    round_stochastically(value, weight.zero_(), torch.Generator().manual_seed(0))
    assert weight.isnan().all()


def stochastically(value: Tensor, seed: int = 0) -> Tensor:
    weight = torch.empty_like(value, dtype=torch.bfloat16)
    round_stochastically(value, weight, torch.Generator().manual_seed(seed))
    return weight


@pytest.mark.parametrize("value", [1.0 + 2**-10, -1.0 - 2**-8, 3.14159, 1e-3, -1e-39, 0.99999])
def test_the_mean_of_chance_is_the_value(value: float) -> None:
    many = torch.full((10**6,), value)
    rounded = stochastically(many).double()
    upper = many[:1].view(torch.int32) >> 16
    around = (torch.stack([upper, upper + 1]) << 16).view(torch.float32).double()
    assert set(rounded.unique().tolist()) == set(around.view(-1).tolist()), "the two neighbours"
    step = (around[1] - around[0]).abs().item()
    assert rounded.mean().item() == pytest.approx(many[0].item(), abs=5 * 0.5 * step / 10**3)


def test_a_bf16_number_is_not_moved() -> None:
    value = torch.cat([torch.randn(10**5).bfloat16().float(), as_float([0, -(2**31), 0x7F800000, -0x800000])])
    assert torch.equal(stochastically(value).float(), value)


def test_chance_has_a_seed() -> None:
    value = torch.randn(1000)
    assert torch.equal(stochastically(value, 1), stochastically(value, 1))
    assert not torch.equal(stochastically(value, 1), stochastically(value, 2))
