"""Tiny models whose block linears were replaced by random packed ones, and how to save them."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from subbit.codes import LEVEL_KINDS, CompressedLinear, LevelTable, on_int8_grid
from subbit.hub.save import save_packed
from subbit.packed.linear import PackedLinear
from tiny_models import tiny_model, tiny_tokenizer

RECIPE = {
    "name": "pbs2p-6-8",
    "method": "pbs2p",
    "nm": "6:8",
    "blocksize": 32,
    "percdamp": 0.01,
    "calibration": {"source": "stdlib", "nsamples": 2, "seqlen": 16},
}
CALIBRATION = {"source": "stdlib", "nsamples": 2, "seqlen": 16, "sha256": "0" * 64}


def _levels(kind: str, groups: int, rows: int, ngroups: int, rng: torch.Generator) -> LevelTable:
    width = groups * LEVEL_KINDS[kind].params_per_group
    params = torch.rand(rows, ngroups, width, generator=rng) * 0.2 + 0.01
    return LevelTable(kind, groups, params.half())


def _mask(rows: int, cols: int, n: int, m: int, rng: torch.Generator) -> Tensor:
    """Bool `(rows, cols)`, N of every M columns; of a last group of r columns min(N, r)."""
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    for start in range(0, cols, m):
        width = min(m, cols - start)
        order = torch.rand(rows, width, generator=rng).argsort(-1)
        mask[:, start : start + width] = order < min(n, width)
    return mask


def random_linear(rows: int, cols: int, rng: torch.Generator, nm=(6, 8)) -> CompressedLinear:
    """A random compressed linear as PBS2P makes them: three groups, some salient columns."""
    group_size, groups = 32, -(-cols // 32)
    salient = torch.zeros(cols, dtype=torch.bool)
    salient[torch.randperm(cols, generator=rng)[: cols // 10]] = True
    codes = torch.randint(1, 7, (rows, cols), generator=rng)
    codes[:, salient] = torch.randint(1, 5, (rows, int(salient.sum())), generator=rng)
    codes[~_mask(rows, cols, *nm, rng)] = 0
    return CompressedLinear(
        codes=codes.to(torch.uint8),
        levels=_levels("pairs", 3, rows, groups, rng),
        group_size=group_size,
        nm=nm,
        salient=salient,
        salient_levels=_levels("residual", 1, rows, groups, rng),
    )


def packed_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model with every linear of its decoder blocks packed; head and embeddings dense."""
    model = tiny_model(family, seed).to(dtype)
    rng = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if not isinstance(module, (nn.Linear, Conv1D)) or module is head:
            continue
        shape = tuple(module.weight.shape)
        rows, cols = shape[::-1] if isinstance(module, Conv1D) else shape
        packed = PackedLinear.from_compressed(random_linear(rows, cols, rng), module.bias, dtype)
        model.set_submodule(name, packed)
    return model.eval()


def int8_model(family: str) -> torch.nn.Module:
    """A packed model whose linears fit the kernel: one record a row, int8 levels."""
    model = packed_model(family)
    for name in packed_names(model):
        module = model.get_submodule(name)
        linear = module.compressed()
        tables = [
            LevelTable(table.kind, table.groups, table.params[:, :1].contiguous())
            for table in (linear.levels, linear.salient_levels)
        ]
        levels, salient_levels = on_int8_grid(*tables)
        size = max(256, -(-module.in_features // 128) * 128)
        linear = replace(
            linear, group_size=size, levels=levels, salient_levels=salient_levels, record={}
        )
        dtype = torch.float32
        model.set_submodule(name, PackedLinear.from_compressed(linear, module.bias, dtype))
    return model.eval()


def packed_names(model: PreTrainedModel) -> list[str]:
    """Dotted names of the packed linears."""
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


def record(i: int) -> dict[str, float]:
    """Facts about a fit, different for each linear."""
    return {"loss": 0.5 + i, "salient_share": 0.1, "damping": 0.01, "paper_bits": 0.8}


def save(model: PreTrainedModel, out: Path, recipe: dict | None = None, **options) -> Path:
    """Save a packed model as the main job would."""
    records = {name: record(i) for i, name in enumerate(packed_names(model))}
    save_packed(
        model,
        tiny_tokenizer(),
        out,
        recipe=recipe or RECIPE,
        calibration=CALIBRATION,
        records=records,
        base_model="someone/tiny",
        **options,
    )
    return out


def tokens(seed: int = 0) -> Tensor:
    """Token ids `(2, 12)` that every tiny model knows."""
    return torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Logits `(2, 12, vocabulary)` of `tokens()`."""
    return model(tokens()).logits
