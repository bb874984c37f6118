import math

import pytest
import torch

from subbit.linalg import factorize


def gram(tokens, features, seed=0):
    X = torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed))
    return X.T @ X


@pytest.mark.parametrize("features", [1, 24, 600])
def test_u_is_the_upper_factor_of_the_damped_inverse(features):
    H = gram(8 * features, features)
    factor = factorize(H, 0.01)
    damped = H.double() + 0.01 * H.diagonal().double().mean() * torch.eye(features)
    torch.testing.assert_close(
        (factor.U.T @ factor.U).double(), torch.linalg.inv(damped), rtol=1e-4, atol=1e-7
    )
    assert torch.equal(factor.U, factor.U.triu())
    assert factor.damping == 0.01
    assert torch.equal(factor.H, H)


def test_rank_deficient_matrices_are_factorised():
    for tokens in (1, 3):
        factor = factorize(gram(tokens, 48), 0.01)
        assert torch.isfinite(factor.U).all()
        assert factor.damping < math.inf


def test_the_ladder_climbs_and_says_so():
    H = gram(60, 8)
    H[0, 1] = H[1, 0] = 2 * float(H.diagonal().max())  # indefinite
    factor = factorize(H, 0.01)
    assert 0.01 < factor.damping < math.inf
    assert torch.isfinite(factor.U).all()


def test_without_damping_the_ladder_starts_just_above_nothing():
    X = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    factor = factorize(X.T @ X, 0.0)
    assert 0 < factor.damping < 1e-3
    assert not torch.equal(factor.U, factor.U.diagonal().diag())


def test_damping_is_never_less_than_float32_holds():
    H = gram(40, 16)
    H[1], H[:, 1] = H[0], H[:, 0]  # twice the same input: a solve in float32 needs a ridge
    H[1, 1] = H[0, 0]
    factor = factorize(H, 1e-12)
    assert factor.damping >= 1e-7
    solved = torch.linalg.solve(factor.damped(), torch.eye(16))
    assert torch.isfinite(solved).all()


def test_dead_columns_do_not_depend_on_the_scale_of_the_others():
    H = gram(100, 6)
    H[2], H[:, 2] = 0, 0
    small, large = factorize(H * 2.0**-20, 0.01), factorize(H, 0.01)
    torch.testing.assert_close(small.U * 2.0**-10, large.U)
    assert torch.equal(factorize(torch.zeros(3, 3), 0.01).H, torch.eye(3))


def test_the_last_rung_is_the_diagonal():
    H = torch.eye(4)
    H[0, 1] = H[1, 0] = 1e6
    factor = factorize(H, 0.01)
    assert factor.damping == math.inf
    torch.testing.assert_close(factor.U, torch.eye(4))


def test_dead_columns_are_set_apart():
    H = gram(100, 6)
    H[2] = 0
    H[:, 2] = 0
    factor = factorize(H, 0.01)
    assert factor.dead.tolist() == [False, False, True, False, False, False]
    live = factor.H.diagonal()[~factor.dead]
    assert float(factor.H[2, 2]) == pytest.approx(1e-4 * float(live.mean()))
    assert torch.isfinite(factorize(torch.zeros(4, 4), 0.01).U).all()
