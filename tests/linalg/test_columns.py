"""The column sweep is OBQ in the given order, and one with the block loop."""

import torch

from subbit.linalg import BlockView, factorize, run_blocks, sweep_columns


def _problem(rows=6, cols=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(200, cols, generator=g) @ torch.randn(cols, cols, generator=g)
    return torch.randn(rows, cols, generator=g), X.T @ X


def _textbook(W, H, ridge, replace):
    """OBQ, column by column: H^-1 of what is left after every step, in float64."""
    W = W.double().clone()
    Hinv = torch.linalg.inv(H.double() + ridge * torch.eye(len(H), dtype=torch.float64))
    Q = torch.empty_like(W)
    for j in range(W.shape[1]):
        Q[:, j] = replace(W[:, j])
        W -= ((W[:, j] - Q[:, j]) / Hinv[j, j])[:, None] * Hinv[j]
        Hinv = Hinv - torch.outer(Hinv[:, j], Hinv[j]) / Hinv[j, j]
    return Q


class _Block:
    def __init__(self, W):
        self.W = W

    def dequantize(self):
        return self.W


def _sweep(block, replace):
    out = torch.empty_like(block.W)

    def step(W, j):
        out[:, j] = replace(W[j])
        return out[:, j]

    sweep_columns(block, step)
    return _Block(out)


def test_sweeping_blocks_is_textbook_obq():
    W, H = _problem()
    factor = factorize(H, 0.01)
    expected = _textbook(W, H, 0.01 * float(H.diagonal().mean()), torch.round)
    for blocksize in (20, 8, 1):
        blocks = run_blocks(
            W, factor, blocksize, lambda b: _sweep(b, torch.round), compensation="exact"
        )
        assert torch.equal(torch.cat([b.W for b in blocks], 1).double(), expected)
    assert not torch.equal(expected, W.double().round())


def test_the_block_is_not_modified_and_columns_come_in_order():
    W, H = _problem(3, 5)
    block = BlockView(W.clone(), factorize(H, 0.01).U, H, 0, 5, torch.ones(5, dtype=torch.bool))
    seen = []

    def keep(columns, j):
        seen.append(j)
        assert torch.allclose(columns, W.T)  # nothing changes, so nothing is passed on
        return columns[j]

    sweep_columns(block, keep)
    assert seen == [0, 1, 2, 3, 4]
    assert torch.equal(block.W, W)
