"""The six errors of the worked example in the supplement of PBS2P (section C).

python benchmarks/worked_example.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch

import worked_example as example
from subbit.binarize.two_level import fit_alternating, fit_exact


def main() -> None:
    """Print ||W - W_hat||_F without and with the 6:8 mask: printed, alternating, exact."""
    everything = torch.ones_like(example.MASK)
    rows = [
        ("printed in the supplement", example.PRINTED_DENSE, example.PRINTED_PRUNED),
        ("alternating mu, alpha, signs", *_both(fit_alternating, everything)),
        ("exact two-level fit", *_both(fit_exact, everything)),
    ]
    print(f"{'':30} {'unpruned':>9} {'6:8':>9}")
    for name, *fitted in rows:
        errors = [float((example.W - W_hat).norm()) for W_hat in fitted]
        print(f"{name:30} {errors[0]:9.4f} {errors[1]:9.4f}")


def _both(fit, everything: torch.Tensor) -> list[torch.Tensor]:
    return [fit(example.W, everything), fit(example.W, example.MASK)]


if __name__ == "__main__":
    main()
