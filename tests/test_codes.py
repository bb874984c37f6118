"""What codes and levels mean, straight from the definition."""

import pytest
import torch

from subbit.codes import LEVEL_KINDS, CompressedLinear, LevelTable


def test_symmetric_residual_is_residual_without_a_mean():
    params = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0)).half()
    with_mean = torch.cat((params, torch.zeros(3, 5, 2).half()), -1)
    a, b = LevelTable("symmetric_residual", 2, params), LevelTable("residual", 2, with_mean)
    assert a.count == b.count == 8
    assert torch.equal(a.values(), b.values())


@pytest.mark.parametrize("scaled", [1, 2, 4])
@pytest.mark.parametrize("with_salient", [False, True])
def test_column_scales_multiply_the_parameters(scaled, with_salient):
    generator = torch.Generator().manual_seed(scaled)
    rows, cols, size = 3, 11, 4
    groups = -(-cols // size)
    ordinary = LevelTable("pairs", 1, torch.randn(rows, groups, 2, generator=generator).half())
    special = LevelTable(
        "symmetric_residual", 2, torch.randn(rows, groups, 4, generator=generator).half()
    )
    salient = torch.arange(cols) % 3 == 1
    if not with_salient:
        salient, special = None, None
    codes = torch.randint(0, 3, (rows, cols), generator=generator, dtype=torch.uint8)
    scale = torch.randn(scaled, cols, generator=generator).half()
    linear = CompressedLinear(codes, ordinary, size, None, salient, special, column_scale=scale)
    dense = linear.dequantize()
    for r in range(rows):
        for c in range(cols):
            table = special if with_salient and salient[c] else ordinary
            params = table.params[r, c // size].float().clone()
            count = min(scaled, len(params))
            params[:count] *= scale[:count, c].float()
            levels = LEVEL_KINDS[table.kind].expand(params, table.groups)
            code = int(codes[r, c])
            assert float(dense[r, c]) == (float(levels[code - 1]) if code else 0.0)
