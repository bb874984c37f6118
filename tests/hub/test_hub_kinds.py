"""Every kind of result survives the folder: grids, column scales, single weights, values."""

import itertools

import pytest
import torch
from packed_models import logits, packed_names, save
from safetensors.torch import load_file, save_file

from subbit.codes import CompressedLinear, LevelTable
from subbit.errors import FormatError
from subbit.hub.inspect import inspect_folder
from subbit.hub.load import load
from subbit.methods import LinearStats, make_method
from subbit.packed import PackedLinear
from tiny_models import tiny_model

KINDS = {
    "grid": ("rtn", {"bits": 3}, None),
    "column_scale": ("awq", {"bits": 2}, None),
    "nm": ("wanda", {}, (4, 8)),
    "unstructured": ("magnitude", {"pruning": "unstructured"}, (4, 8)),
    "structured": ("wanda", {"pruning": "structured"}, (4, 8)),
}


def single_salient(W):
    """A tenth of the weights in 8 bits, the others by their sign, as in PB-LLM."""
    salient = W.abs() >= W.abs().flatten().quantile(0.9)
    low, high = W.amin(1), W.amax(1)
    scale = ((high - low) / 254).half()
    zero = (-low / scale.float()).round().clamp(0, 254)
    index = ((W / scale.float()[:, None]).round() + zero[:, None]).clamp(0, 254)
    codes = torch.where(salient, index + 1, 1 + (W > 0))
    alpha = W.abs().masked_fill(salient, 0).mean(1).half()
    return CompressedLinear(
        codes=codes.to(torch.uint8),
        levels=LevelTable("symmetric", 1, alpha[:, None, None]),
        group_size=W.shape[1],
        salient=salient,
        salient_levels=LevelTable("grid", 255, torch.stack((scale, zero.half()), -1)[:, None]),
    )


def mixed_model(dtype=torch.float32):
    """A tiny OPT whose linears take the kinds in turn."""
    model = tiny_model("opt").to(dtype)
    kinds = itertools.cycle([*KINDS, "single"])
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        W = module.weight.detach().float()
        kind = next(kinds)
        if kind == "single":
            result = single_salient(W)
        else:
            method, options, nm = KINDS[kind]
            stats = LinearStats(torch.diag(torch.arange(1.0, W.shape[1] + 1)), 9, name)
            result = make_method(method, options).compress(W, stats, nm)
        model.set_submodule(name, PackedLinear.from_compressed(result, module.bias, dtype))
    return model.eval()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def saved(request, tmp_path_factory):
    model = mixed_model(request.param)
    return model, save(model, tmp_path_factory.mktemp("kinds") / "out")


def test_logits_are_bit_equal_after_loading(saved):
    model, folder = saved
    assert torch.equal(logits(load(folder)), logits(model))


def test_fields_keep_their_dtype_whatever_the_model_runs_in(saved):
    model, folder = saved
    loaded = load(folder, dtype="float32")
    for name in packed_names(model):
        for field, tensor in model.get_submodule(name).fields().items():
            assert getattr(loaded.get_submodule(name), field).dtype == tensor.dtype
            assert torch.equal(getattr(loaded.get_submodule(name), field), tensor)


def test_what_is_told_is_what_the_file_holds(saved):
    model, folder = saved
    facts = inspect_folder(folder)
    total = facts["total"]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert total["linear_bytes"] + total["other_bytes"] + total["header_bytes"] == size
    for linear in facts["linears"]:
        module = model.get_submodule(linear["name"])
        report = module.bits()
        assert linear["bytes"] == report.nbytes == sum(t.nbytes for t in module.fields().values())
        assert linear["stored_bits"] == report.stored_bits
        assert linear["salient_share"] == report.salient_share
    shares = {round(linear["salient_share"], 2) for linear in facts["linears"]}
    assert shares == {0.0, 0.1}


def test_saved_again_it_is_the_same(saved, tmp_path):
    model, folder = saved
    load(folder).save_pretrained(tmp_path / "again")
    with pytest.warns(UserWarning, match="has no subbit.json"):
        assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("field", ["salient_codes", "bitmap", "columns", "code"])
@pytest.mark.filterwarnings("ignore:.*has no subbit.json")
def test_impossible_bytes_are_refused_without_a_manifest(field, tmp_path):
    folder = save(mixed_model(), tmp_path / "out")
    (folder / "subbit.json").unlink()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(f".{field}"))
    tensors[key].fill_(255)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=f"{key.removesuffix('.' + field)}.*'{field}'"):
        load(folder)
