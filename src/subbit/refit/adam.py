"""Adam as refitting uses it; where it stands can be kept and taken up again."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["Adam", "power_of_two"]


class Adam:
    """Adam whose step moves a number by its tensor's own size times a rate.

    The rate rises to `rate` over the first tenth of the steps, since Adam's first steps are as long
    as any whatever the gradients, and falls to 0 along a cosine.

    Args:
        learning: the parameters, as they start.
        rate: the highest rate.
        steps: how many steps there will be.
        scale: what the loss is multiplied by before gradients are taken of it, a power of two:
            those of a mean over thousands of numbers are too small for float16.

    Attributes:
        done: steps taken.
    """

    def __init__(
        self, learning: Iterable[nn.Parameter], rate: float, steps: int, scale: float = 1.0
    ) -> None:
        self.learning, self.steps, self.done = list(learning), steps, 0
        self.scale = scale
        self._rates = [rate * _size(parameter) for parameter in self.learning]
        groups = [{"params": [parameter]} for parameter in self.learning]
        self._adam = torch.optim.Adam(groups, betas=(0.9, 0.95))

    def step(self) -> None:
        """Take a step along the gradients that there are, and clear them."""
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.share
        for parameter in self.learning:
            if parameter.grad is not None:
                parameter.grad /= self.scale
        self._adam.step()
        self._adam.zero_grad()
        self.done += 1

    @property
    def share(self) -> float:
        """How much of the highest rate the next step has."""
        warm = max(1, self.steps // 10)
        falling = 0.5 + 0.5 * math.cos(math.pi * self.done / self.steps)
        return min((self.done + 1) / warm, falling)

    def state(self) -> dict[str, Tensor]:
        """All that `take_up` needs besides `done`: the parameters and Adam's averages."""
        found = {f"{i}.value": p.detach() for i, p in enumerate(self.learning)}
        for i, averages in self._adam.state_dict()["state"].items():
            found |= {f"{i}.{name}": tensor for name, tensor in averages.items()}
        return found

    @torch.no_grad()
    def take_up(self, state: dict[str, Tensor], done: int) -> None:
        """Go on, to the same numbers, where another one with the same arguments gave `state`."""
        averages: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            i, name = key.split(".")
            if name == "value":
                self.learning[int(i)].copy_(tensor)
            else:
                averages.setdefault(int(i), {})[name] = tensor
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": averages, "param_groups": groups})
        self.done = done


def power_of_two(number: int) -> float:
    """The one nearest to a number, at least 1: to multiply with it changes no digit."""
    return 2.0 ** round(math.log2(max(1, number)))


def _size(parameter: Tensor) -> float:
    return float(parameter.detach().square().mean().sqrt()) or 1.0
