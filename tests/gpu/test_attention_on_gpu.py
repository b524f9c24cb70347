"""Packed rows on a CUDA device: the kernel for documents of any length gives each what it has alone, without a square.

pytest -m gpu tests/gpu
"""

import pytest
import torch
import torch.nn.functional as F

from kdtune.documents import Documents
from kdtune.models.attention import attend, block_causal, has_varlen_kernel

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LENGTHS = [[300, 5, 1, 700, 18], [1024], [513, 511]]  # of three rows


def make_heads(dtype, groups=2, head_dim=64, length=1024, rows=3):
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, heads, length, head_dim) for heads in (4, 4 // groups, 4 // groups)]
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def make_ids():
    ids = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS]
    return torch.stack(ids).to(DEVICE)


def attend_apart(heads, rows, window=None):
    documents = Documents.in_rows(rows).to(DEVICE)
    return attend(*heads, block_causal(documents, window, heads[0], heads[0].size(-1)))


def exact(heads, ids, window):
    """In float64, with a mask of the whole row."""
    queries, keys, values = (one.detach().double().requires_grad_() for one in heads)
    index = torch.arange(ids.size(1), device=DEVICE)
    distance = index[:, None] - index
    allowed = (distance >= 0) & (distance < (window or ids.size(1))) & (ids[:, :, None] == ids[:, None, :])
    repeats = queries.size(1) // keys.size(1)
    wide = [one.repeat_interleave(repeats, dim=1) for one in (keys, values)]
    out = F.scaled_dot_product_attention(queries, *wide, attn_mask=allowed[:, None])
    return out, torch.autograd.grad(out.sin().sum(), (queries, keys, values))


@pytest.mark.parametrize("window", [None, 100, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_each_document_sees_itself(dtype, bound, groups, window):
    heads, ids = make_heads(dtype, groups), make_ids()
    out = attend_apart(heads, LENGTHS, window)
    grads = torch.autograd.grad(out.float().sin().sum(), heads)
    expected, expected_grads = exact(heads, ids, window)
    for found, wanted in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert (found.double() - wanted).norm() / wanted.norm().clamp(min=1e-6) < bound


def test_neighbours_do_not_matter_to_the_bit():
    heads = make_heads(torch.bfloat16)
    with torch.no_grad():
        whole = attend_apart(heads, LENGTHS)
        one = [head[:1, :, 306:1006].contiguous() for head in heads]  # the fourth document of the first row
        alone = attend_apart(one, [[700]])
    torch.testing.assert_close(whole[:1, :, 306:1006], alone, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        for head in heads:
            head[:, :, :306] += 1
            head[:, :, 1006:] -= 1
        again = attend_apart(heads, LENGTHS)
    assert torch.equal(again[:1, :, 306:1006], whole[:1, :, 306:1006])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_waits_for_the_device(dtype):
    heads = make_heads(dtype)
    attend_apart(heads, LENGTHS, 100).sum().backward()  # whatever is asked once
    documents = Documents.in_rows(LENGTHS).to(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for window in (None, 100):
            attend(*heads, block_causal(documents, window, heads[0], heads[0].size(-1))).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_linear_in_the_row():
    peaks = []
    for length in (4_096, 16_384):
        heads = make_heads(torch.bfloat16, length=length, rows=1)
        rows = [[300] * (length // 300) + [length % 300]]
        assert has_varlen_kernel(heads[0], heads[0].size(-1))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend_apart(heads, rows).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 5 * peaks[0]
    assert peaks[1] < 16_384**2, "bytes of one mask"
