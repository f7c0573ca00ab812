"""A large kernel by blocks of rows is the kernel; its sketch is the sum that it is said to be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxrep import kernel as K
from fxrep.evaluation import Doubles, evaluate
from fxrep.rows import BLOCK, blocks
from fxrep.sketch import rows_sketched, signs, sketched

M, N = 96, 400


def leaf(*shape: int, seed: int = 0) -> K.Leaf:
    return K.Leaf.of(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


W3, W1 = leaf(M, N, 3, 3), leaf(M, N, 1, 1, seed=1)
PLACED = K.Place((M, N, 3, 3), W1, (1, 1), (1, 1))
KERNELS = {
    "leaf": W3,
    "permuted columns": K.Leaf.of(torch.randn(M, 3, 3, N), (0, 3, 1, 2)),
    "permuted rows": K.Leaf.of(torch.randn(N, M, 3, 3), (1, 0, 2, 3)),
    "scaled rows": K.ScaleRows(W3.shape, W3, leaf(M)),
    "scaled by one number": K.ScaleRows(W3.shape, W3, leaf()),
    "scaled columns": K.ScaleColumns(W3.shape, W3, leaf(N), 1),
    "scaled columns in groups": K.ScaleColumns((M, N, 3, 3), W3, leaf(4 * N), 4),
    "sum of three": K.Sum(W3.shape, (W3, PLACED, K.Place((M, N, 3, 3), K.Dirac((M, N, 1, 1)), (1, 1), (1, 1)))),
    "sum of the same twice": K.Sum(W3.shape, (W3, W3)),
    "sum with a number": K.Sum(W3.shape, (leaf(), W3)),
    "sum with what is read whole": K.Sum(W3.shape, (K.take(W3, tuple(range(M - 1, -1, -1))), W3)),
    "sum of one": K.Sum(W3.shape, (W3,)),
    "composed": K.Compose((M, N, 3, 3), leaf(M, 30, 1, 1), leaf(30, N, 3, 3), 1, (1, 1), (1, 1)),
    "composed in groups": K.Compose((M, N, 3, 3), leaf(M, 10, 1, 1), leaf(20, N, 3, 3), 2, (1, 1), (1, 1)),
    "stacked": K.StackRows((2 * M + 5, N, 3, 3), (W3, leaf(5, N, 3, 3), PLACED)),
    "rows taken": K.take(W3, tuple(range(M - 1, -1, -1))),
    "columns taken": K.TakeColumns((M, 380, 3, 3), W3, 10, 390),
    "columns placed": K.PlaceColumns((M, 500, 3, 3), W3, tuple(range(50, 450))),
    "mapped": K.Map(W3.shape, torch.tanh, (W3,)),
    "dirac": K.Dirac((600, 600, 1, 1)),
    "regrouped": K.Regroup((M, 4 * 50, 3, 3), leaf(M, 50, 3, 3), 4, 1),
    "regrouped to groups": K.Regroup((M, 2 * 200, 3, 3), leaf(M, 200, 3, 3), 4, 2),
    "constant": K.Constant((M, N, 3, 3), 2.5),
}  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_blocks_are_the_kernel(name: str):
    kernel = KERNELS[name]
    expected = evaluate(kernel)
    found = list(blocks(kernel, Doubles()))
    assert len(found) > 1
    assert max(block.numel() for _, block in found) <= BLOCK
    assert [start for start, _ in found] == [sum(len(b) for _, b in found[:i]) for i in range(len(found))]
    got = torch.cat([block for _, block in found])
    assert got.dtype == torch.float64
    assert torch.allclose(got, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))


def test_a_small_kernel_is_one_block():
    kernel = leaf(4, 3, 3, 3)
    [(start, block)] = blocks(kernel, Doubles())
    assert start == 0
    assert torch.equal(block, kernel.tensor.double())


def test_a_deep_kernel_is_evaluated_without_recursion():
    kernel: K.Kernel = W3
    for _ in range(3000):
        kernel = K.ScaleRows(W3.shape, kernel, K.Constant((), 1.0))
    [(_, block)] = blocks(kernel, Doubles())
    assert torch.equal(block, W3.tensor.double())


@pytest.mark.parametrize("groups", [1, 2, 6, 12])
def test_a_sketch_of_an_operator_is_the_sketch_of_what_it_gives(groups: int):
    torch.manual_seed(0)
    weight, x = torch.randn(12, 12 // groups, 3, 3).double(), torch.randn(2, 12, 5, 6).double()
    sketch = torch.zeros(groups, 12 // groups, 3, 3).double()
    for start in range(0, 12, 5):
        rows_sketched(weight[start : start + 5], start, 12, sketch)
    expected = (F.conv2d(x, weight, groups=groups) * signs(12).reshape(-1, 1, 1)).unflatten(1, (groups, -1)).sum(2)
    assert torch.allclose(F.conv2d(x, sketch, groups=groups), expected, rtol=0, atol=1e-12)
    assert torch.allclose(sketched(F.conv2d(x, weight, groups=groups), groups, -3, 12), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channel", [0, 5, 11])
def test_one_wrong_channel_is_seen_in_a_sketch(channel: int):
    x = torch.randn(1, 12, 4, 4).double()
    wrong: Tensor = x.clone()
    wrong[0, channel, 1, 2] += 1e-6
    assert float((sketched(x, 1, -3, 12) - sketched(wrong, 1, -3, 12)).abs().max()) > 4e-7
    assert float(signs(12).abs().min()) >= 0.5
    assert len(set(signs(12).sign().tolist())) == 2
