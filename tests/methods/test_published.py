"""`published=True` gives what the authors' code gave on one linear, groups and weights."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from subbit.binarize.groups import Groups
from subbit.methods import METHODS, LinearStats, make_method

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("SUBBIT_REFERENCE") or ROOT.parent / "shared" / "reference")
FILES = sorted(FOLDER.glob("published_*.safetensors"))

pytestmark = pytest.mark.skipif(not FILES, reason=f"no published_*.safetensors in {FOLDER}")

# name in the file: method, its options, the file's label of every group of ours: ordinary groups
# from small to large, then the salient ones
CASES = {
    "billm": ("billm", {}, (0, 1, 2)),
    "arb": ("arb", {"variant": "arb"}, (2, 1, 0)),
    "arb_x": ("arb", {"variant": "arb-x"}, (2, 1, 0)),
    "arb_rc": ("arb", {"variant": "arb-rc"}, (2, 1, 0)),
    "arb_rc_cgb": ("arb", {"variant": "arb-rc", "cgb": True}, (3, 2, 1, 0)),
    "stbllm_dense": ("stbllm", {}, (0, 1, 2, 3)),
}


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def file(request):
    return load_file(request.param)


def build(case, level_dtype=torch.float16, groups_of=None):
    """The published form; as stored or in float32, its own groups or given ones.

    Returns the method and a list that fills with the groups of its blocks.
    """
    name, options, _ = CASES[case]
    seen = []

    class Watched(METHODS[name]):
        def _groups(self, block, keep):
            find = super()._groups if groups_of is None else groups_of
            seen.append(find(block, keep))
            return seen[-1]

    method = Watched({**options, "published": True})
    method.level_dtype = level_dtype
    return method, seen


def run(file, method):
    stats = LinearStats(file["H"], len(file["X"]), "golden")
    return method.compress(file["W"], stats).dequantize()


def distance(W_hat, reference):
    return float((W_hat - reference).norm() / reference.norm())


@pytest.mark.parametrize("case", CASES)
def test_groups_and_weights_are_the_published_ones(file, case):
    if f"{case}.W_hat" not in file:
        pytest.skip("not in this file")
    method, seen = build(case)
    W_hat = run(file, method)
    names = torch.tensor(CASES[case][2], dtype=torch.uint8)
    ours = [names[(g.labels + g.ordinary_count * g.salient).long()] for g in seen]
    same = (torch.cat(ours, 1) == file[f"{case}.group"]).float().mean()
    assert float(same) >= 0.999
    assert distance(W_hat, file[f"{case}.W_hat"]) <= 1e-3  # float16 levels alone: 2e-4 to 3e-4


@pytest.mark.parametrize("case", CASES)
def test_given_the_published_groups_only_rounding_is_left(file, case):
    if f"{case}.W_hat" not in file:
        pytest.skip("not in this file")
    names = CASES[case][2]
    salient_count = 2 if case.endswith("cgb") else 1
    ordinary_count = len(names) - salient_count
    ours = torch.tensor([names.index(i) for i in range(len(names))], dtype=torch.uint8)

    def published_groups(block, keep):
        labels = ours[file[f"{case}.group"][:, block.start : block.stop].long()]
        salient = labels[0] >= ordinary_count
        labels = torch.where(salient, labels - ordinary_count, labels)
        return Groups(salient, labels, ordinary_count, salient_count)

    method, _ = build(case, torch.float32, published_groups)
    assert distance(run(file, method), file[f"{case}.W_hat"]) <= 1e-5


def test_the_paper_form_is_another_one(file):
    stats = LinearStats(file["H"], len(file["X"]))
    for name, options, _ in CASES.values():
        paper = make_method(name, options).compress(file["W"], stats)
        published = make_method(name, {**options, "published": True}).compress(file["W"], stats)
        assert paper.record["loss"] < published.record["loss"]
