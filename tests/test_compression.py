"""The main job, end to end, on tiny models of every family."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import subbit
from subbit.errors import (
    CalibrationError,
    CheckpointError,
    ModelError,
    NonFiniteError,
    OutputError,
    RecipeError,
)
from subbit.hub.inspect import inspect_folder
from subbit.hub.quantizer import packed_modules
from tiny_models import FAMILIES, REFUSED, tiny_model, tiny_tokenizer

SMALL = ["calibration.nsamples=3", "calibration.seqlen=24"]


@pytest.fixture
def folder(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def compress(model, text, recipe="pbs2p-4-8", **kwargs):
    kwargs.setdefault("progress", False)
    overrides = [*SMALL, *kwargs.pop("overrides", [])]
    return subbit.compress(model, recipe, text, overrides=overrides, **kwargs)


def test_a_generation_config_that_cannot_be_saved_is_mended(text, tmp_path):
    model = tiny_model("llama")
    model.generation_config.temperature = 0.5  # without do_sample
    done = compress(model, text, tokenizer=tiny_tokenizer(), out=tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["temperature"] == 0.5 and saved["do_sample"] is True
    with pytest.raises(ModelError, match="already compressed"):
        compress(done.model, text, tokenizer=tiny_tokenizer())


def test_text_of_its_own_is_sampled_under_the_lock_and_kept(tmp_path, monkeypatch):
    from subbit.text import sample

    kwargs = {"tokenizer": tiny_tokenizer(), "out": tmp_path / "out", "nsamples": 20, "seqlen": 16}
    whole = compress(tiny_model("llama"), "self", **kwargs | {"out": None})
    real, batches = sample._continue, []

    def fail(*args):
        batches.append(args)
        if len(batches) == 3:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(sample, "_continue", fail)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_model("llama"), "self", **kwargs)
    monkeypatch.setattr(sample, "_continue", None)
    with pytest.raises(CheckpointError, match=r"options.tau was 10 and is 3"):
        compress(tiny_model("llama"), "self", overrides=["tau=3"], **kwargs)
    monkeypatch.setattr(sample, "_continue", lambda *args: (batches.append(args), real(*args)))
    resumed = compress(tiny_model("llama"), "self", resume="required", **kwargs)
    assert len(batches) == 4  # three batches, one of them twice
    assert resumed.calibration == whole.calibration
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def logits(model):
    ids = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        return model(ids).logits


def weights_of(path: Path) -> dict[str, bytes]:
    """Every file of a packed folder but the log, which holds times."""
    return {f.name: f.read_bytes() for f in path.iterdir() if f.name != "compression.jsonl"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_compressed_saved_and_loaded_bit_for_bit(family, text, tmp_path):
    model = tiny_model(family).float()
    dense = logits(model)
    result = compress(model, text, tokenizer=tiny_tokenizer())
    in_memory = logits(result.model)
    assert not torch.equal(dense, in_memory)
    result.save_pretrained(tmp_path / "packed")
    loaded = subbit.load(tmp_path / "packed")
    assert torch.equal(logits(loaded), in_memory)
    names = set(packed_modules(loaded))
    assert names == set(result.records) and len(names) >= 3 * 4
    left = [n for n, m in loaded.named_modules() if isinstance(m, torch.nn.Linear)]
    assert all("lm_head" in name or "embed_out" in name for name in left)


KINDS = {
    "rtn-3": [],
    "gptq-2": ["group=row"],
    "awq-2": [],
    "wanda-4-8": ["coarse.allocation=layer_importance"],
    "sparsegpt-4-8": ["pruning=unstructured"],
    "magnitude-4-8": ["pruning=structured"],
    "dsnot-wanda-4-8": [],
}


@pytest.mark.parametrize("recipe", KINDS)
def test_every_kind_of_result_is_written_told_and_loaded(recipe, folder, text, tmp_path):
    result = compress(folder, text, recipe, out=tmp_path / "packed", overrides=KINDS[recipe])
    loaded = subbit.load(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(result.model))
    total = inspect_folder(tmp_path / "packed")["total"]
    assert total["stored_bits"] == pytest.approx(result.report["stored_bits"])
    assert total["paper_bits"] == pytest.approx(result.report["paper_bits"])
    if recipe[-2:] == "-8":
        assert total["paper_bits"] == pytest.approx(8, rel=0.02)
        assert result.report["m"] == 8 and result.report["mean_kept"] <= 4
    else:
        assert total["paper_bits"] == int(recipe[-1])
        assert result.report["kept"] is None
        assert {record["nm"] for record in result.records.values()} == {None}
    again = compress(folder, text, recipe, overrides=KINDS[recipe])
    again.save_pretrained(tmp_path / "again")
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "packed")


def test_an_nm_that_the_method_cannot_follow_ends_early(folder, text):
    with pytest.raises(RecipeError, match=r"'rtn' does not prune.*nm: null"):
        compress(folder, text, "rtn-2", overrides=["nm=4:8"])
    with pytest.raises(RecipeError, match="'pbs2p' prunes"):
        compress(folder, text, overrides=["nm=null"])


@pytest.mark.parametrize("family", REFUSED)
def test_models_with_weights_that_would_be_skipped_are_refused(family, text):
    with pytest.raises(ModelError, match=r"skip"):
        compress(tiny_model(family), text, tokenizer=tiny_tokenizer())


def test_the_report_is_what_the_file_holds(folder, text, tmp_path):
    result = compress(folder, text, out=tmp_path / "packed")
    facts = inspect_folder(tmp_path / "packed")
    total = facts["total"]
    files = sum(f.stat().st_size for f in (tmp_path / "packed").glob("*.safetensors"))
    assert total["file_bytes"] == files
    assert total["stored_bits"] == pytest.approx(result.report["stored_bits"])
    assert total["paper_bits"] == pytest.approx(result.report["paper_bits"])
    assert total["paper_bits"] < 1.1 < 2 < total["stored_bits"]
    kept = [linear["nm"][0] for linear in facts["linears"]]
    assert set(kept) == {3, 4, 5}  # three blocks, one rank each
    assert result.report["mean_kept"] <= 4
    lines = [
        json.loads(x) for x in (tmp_path / "packed/compression.jsonl").read_text().split("\n")[:-1]
    ]
    assert len(lines) == len(facts["linears"]) + 1
    assert {"name", "loss", "damping", "seconds", "stored_bits", "paper_bits"} <= set(lines[0])
    assert not (tmp_path / "packed.partial").exists()


def test_the_loss_against_the_original_weight_is_told_apart_from_that_of_a_moved_target(text):
    def records(*overrides):
        done = compress(
            tiny_model("llama").float(), text, tokenizer=tiny_tokenizer(), overrides=overrides
        )
        return done.records, done.report

    plain, report = records()
    assert not any("loss_of_original" in record for record in plain.values())
    assert "mean_loss_of_original" not in report
    moved, report = records(
        "asymmetry.strength=1", "asymmetry.linears=all", "calibration.sequential=true"
    )
    of_original = [record["loss_of_original"] for record in moved.values()]
    assert report["mean_loss_of_original"] == pytest.approx(sum(of_original) / len(moved))
    for name, record in moved.items():
        differs = record["loss_of_original"] / record["loss"] - 1
        if "layers.0.self_attn.q_proj" in name:  # nothing is compressed before it
            assert abs(differs) < 1e-3, name
        elif "layers.1." in name:
            assert differs > 0, name


def test_each_block_is_calibrated_on_the_compressed_blocks_before_it(text):
    def second_block_loss(overrides):
        model = tiny_model(FAMILIES[0]).float()
        done = compress(
            model,
            text,
            tokenizer=tiny_tokenizer(),
            overrides=["coarse.allocation=uniform", *overrides],
        )
        return done.records

    whole = second_block_loss([])
    first_left_alone = second_block_loss(['skip=["*layers.0.*", "lm_head"]'])
    shared = sorted(set(whole) & set(first_left_alone))
    assert shared and not any(".0." in name for name in first_left_alone)
    assert whole[shared[0]]["loss"] != first_left_alone[shared[0]]["loss"]


def test_two_runs_write_the_same_bytes(folder, text, tmp_path):
    rng = torch.get_rng_state()
    for name in ("a", "b"):
        compress(folder, text, out=tmp_path / name)
    assert torch.equal(rng, torch.get_rng_state())
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")


_CUT = """
import os, signal, sys
from subbit.run import commits
import subbit
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored under nohup and `&`
committed = commits.Workdir.commit
def commit(self, index, tensors, meta):
    committed(self, index, tensors, meta)
    if index == 1:
        os.kill(os.getpid(), getattr(signal, sys.argv[4]))
commits.Workdir.commit = commit
subbit.compress(sys.argv[1], "pbs2p-4-8", sys.argv[2], out=sys.argv[3], overrides=sys.argv[5:],
                progress=False)
"""


def cut(folder, text, out, how="SIGKILL", recipe="pbs2p-4-8", overrides=()):
    """Start a run in a process of its own that is killed after its second block."""
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    script = _CUT.replace("pbs2p-4-8", recipe)
    args = [sys.executable, "-c", script, str(folder), text, str(out), how, *SMALL, *overrides]
    done = subprocess.run(args, env=env, capture_output=True, check=False)
    assert done.returncode == -getattr(signal, how), done.stderr
    assert not out.exists() and (out.with_name("cut.partial") / "block-0001.safetensors").is_file()


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_killed_run_resumes_to_the_same_bytes(how, folder, text, tmp_path):
    compress(folder, text, out=tmp_path / "whole")
    cut(folder, text, tmp_path / "cut", how)
    with pytest.raises(CheckpointError, match="nm"):
        compress(folder, text, recipe="pbs2p-6-8", out=tmp_path / "cut")
    with pytest.raises(CheckpointError, match="tau"):
        compress(folder, text, out=tmp_path / "cut", overrides=["tau=3"])
    with pytest.raises(CheckpointError, match="calibration"):
        compress(folder, text, out=tmp_path / "cut", nsamples=2)
    before = json.loads((tmp_path / "cut.partial" / "state-seconds.json").read_text())["value"]
    result = compress(folder, text, out=tmp_path / "cut", resume="required")
    seconds = result.report["seconds"]  # of both parts
    assert seconds["total"] > before["total"] > before["compress"] > 0
    assert seconds["compress"] > before["compress"]
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    assert len(result.log) == len(result.records)
    assert torch.equal(logits(result.model), logits(subbit.load(tmp_path / "cut")))


def test_gradients_choose_what_tokens_count(folder, text, tmp_path):
    change = ["calibration.tokens=gradient"]
    results = [compress(folder, text, out=tmp_path / name, overrides=change) for name in "ab"]
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    assert results[0].report["seconds"]["gradients"] > 0
    compress(folder, text, out=tmp_path / "plain")
    assert weights_of(tmp_path / "a") != weights_of(tmp_path / "plain")


def test_gradients_choose_which_outputs_count(folder, text, tmp_path):
    plus = {"recipe": "pbs2p-plus-6-8", "overrides": ["calibration.outputs=gradient"]}
    whole = compress(folder, text, out=tmp_path / "whole", **plus)
    assert whole.report["seconds"]["gradients"] > 0
    compress(folder, text, "pbs2p-plus-6-8", out=tmp_path / "plain")
    assert weights_of(tmp_path / "whole") != weights_of(tmp_path / "plain")
    cut(folder, text, tmp_path / "cut", **plus)
    compress(folder, text, out=tmp_path / "cut", resume="required", **plus)
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    with pytest.raises(RecipeError, match=r"calibration\.outputs"):
        compress(folder, text, out=tmp_path / "none", overrides=plus["overrides"])


def test_a_changed_model_does_not_resume(folder, text, tmp_path):
    cut(folder, text, tmp_path / "cut")
    tiny_model(FAMILIES[0], seed=5).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="model"):
        compress(folder, text, out=tmp_path / "cut")
    compress(folder, text, out=tmp_path / "cut", resume="never")
    assert (tmp_path / "cut").is_dir()


def test_a_changed_config_does_not_resume(folder, text, tmp_path, monkeypatch):
    from subbit.job import Job

    def fail(*args):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Job, "run", fail)
        compress(folder, text, out=out)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(CheckpointError, match=r"model\.config was"):
        compress(folder, text, out=out, resume="required")
    (folder / "config.json").write_text(json.dumps(config))
    compress(folder, text, out=out, resume="required")


def test_a_given_model_is_run_in_the_dtype_as_if_loaded_in_it(folder, text):
    given = tiny_model("llama")
    ours = compress(given, text, tokenizer=tiny_tokenizer(), dtype="bfloat16")
    theirs = compress(folder, text, dtype="bfloat16")
    rotary = ours.model.model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32 and ours.model.dtype == torch.bfloat16
    assert torch.equal(logits(ours.model), logits(theirs.model))
    assert not any(parameter.requires_grad for parameter in ours.model.parameters())


@pytest.mark.parametrize("name", ["my corpus #2.txt", "notes: 2024.txt", "@x.txt", "[a].txt"])
def test_the_path_of_a_text_is_taken_as_it_is(name, folder, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(Path(text).read_text())
    assert compress(folder, name).calibration["source"] == name


def test_a_text_that_is_not_there_is_missed_before_the_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr("subbit.compression.load_model", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(RecipeError, match="c4"):
        compress(folder, "c5")


def test_bad_input_ends_early_and_leaves_nothing(folder, text, tmp_path):
    out = tmp_path / "packed"

    def refused(error, words, model=folder, **kwargs):
        with pytest.raises(error, match=words):
            compress(model, kwargs.pop("text", text), out=kwargs.pop("out", out), **kwargs)
        assert not out.exists() and not list(tmp_path.glob("packed.partial/block*"))

    refused(ModelError, "no-such-folder", model=tmp_path / "no-such-folder")
    refused(RecipeError, "pbs2p-6-8", recipe="pbs2p-6-9")
    refused(RecipeError, "9:8", overrides=["nm=9:8"])
    refused(RecipeError, "blocksize", overrides=["blocksize=60"])
    refused(RecipeError, "did you mean 'tau'", overrides=["tua=3"])
    refused(RecipeError, "gpu", device="gpu")
    refused(CalibrationError, "tokens", overrides=["calibration.nsamples=100000"])
    refused(CalibrationError, "prose2", text=str(tmp_path / "prose2.txt"))
    (tmp_path / "taken").mkdir()
    refused(OutputError, "exists", out=tmp_path / "taken")
    refused(OutputError, "does not exist", out=tmp_path / "nowhere/packed")
    refused(CheckpointError, "no unfinished run", resume="required")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused(ModelError, "model.safetensors")
    weights.write_bytes(whole)
    model = tiny_model(FAMILIES[0])
    name, parameter = next(
        (n, p) for n, p in model.named_parameters() if "up_proj" in n or p.ndim == 2
    )
    with torch.no_grad():
        parameter[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=name):
        compress(model, text, tokenizer=tiny_tokenizer(), out=out)
    with pytest.raises(RecipeError, match="tokenizer"):
        compress(tiny_model(FAMILIES[0]), text)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "change",
    [
        [],
        ["refit.steps=2"],
        ["refit.model_steps=2", "refit.model_text=sampled"],
        ["refit.model_steps=2", "refit.model_seqlen=10"],
        ["calibration.outputs=gradient"],
        ["coarse.allocation=measured"],
    ],
)
def test_blocks_visit_the_gpu_and_come_back(change, folder, text, tmp_path):
    torch.cuda.reset_peak_memory_stats()
    out = tmp_path / "out"
    done = compress(folder, text, "pbs2p-plus-6-8", device="cuda", out=out, overrides=change)
    assert torch.cuda.max_memory_allocated() > 0
    assert {parameter.device.type for parameter in done.model.parameters()} == {"cpu"}
    assert torch.equal(logits(subbit.load(out, device="cpu")), logits(done.model))


def test_a_width_that_is_no_multiple_of_eight_keeps_the_rule(text, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320, hidden_size=60, intermediate_size=91, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=14, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    result = compress(
        model, text, tokenizer=tiny_tokenizer(), overrides=["coarse.allocation=uniform"]
    )
    for name, module in packed_modules(result.model).items():
        nonzero = module.compressed().codes != 0
        for start in range(0, nonzero.shape[1], 8):
            group = nonzero[:, start : start + 8]
            assert (group.sum(1) == min(4, group.shape[1])).all(), name
    result.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(subbit.load(tmp_path / "packed")), logits(result.model))


def test_the_report_times_every_stage(folder, text, tmp_path):
    begun = time.monotonic()
    seconds = compress(folder, text, out=tmp_path / "packed").report["seconds"]
    assert seconds["total"] <= time.monotonic() - begun
    assert {"coarse", "capture", "compress", "propagate", "commit"} <= set(seconds)


@pytest.mark.parametrize("allocation", ["relative_importance", "sin"])
def test_coarse_rules_that_need_no_look_at_the_text(allocation, folder, text):
    change = [f"coarse.allocation={allocation}"]
    result = compress(folder, text, "stbllm-4-8", overrides=change)
    assert all(len(set(block.values())) == 1 for block in result.report["kept"])
    kept = [next(iter(block.values())) for block in result.report["kept"]]
    assert "coarse" not in result.report["seconds"]
    assert len(kept) >= 2 and result.report["mean_kept"] <= 4
    assert kept == ([4] * len(kept) if allocation == "relative_importance" else sorted(kept)[::-1])
    assert {record["nm"][0] for record in result.records.values()} == set(kept)


@pytest.mark.parametrize("recipe", ["arb-rc-cgb", "billm-4-8", "pb-llm", "stbllm-6-8", "xnor"])
def test_binarised_models_are_written_and_loaded(recipe, folder, text, tmp_path):
    result = compress(folder, text, recipe, out=tmp_path / "packed")
    assert torch.equal(logits(subbit.load(tmp_path / "packed")), logits(result.model))
