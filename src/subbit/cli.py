"""The command line. Every command imports what it needs when it runs, so that `--help` is quick."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperGroup

from subbit.errors import SubbitError

__all__ = ["app", "main"]

Resume = Literal["auto", "required", "never"]
Bos = Literal["none", "document", "window"]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type the model runs in.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Talker = Annotated[str, typer.Argument(metavar="DIR", help="Packed folder, or any model.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 = always the likeliest token.")]
TopP = Annotated[
    float, typer.Option(help="Sample from the likeliest tokens of this mass (temperature above 0).")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampling (temperature above 0).")]

_INTERRUPTED = 130  # 128 + SIGINT, as shells count

_SOURCES = "c4, wikitext2, ptb, stdlib, self, or a .txt or .jsonl file"
_stderr = Console(stderr=True, soft_wrap=True, highlight=False)


class _Commands(TyperGroup):
    """Turns our errors and Ctrl-C into one line on stderr and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SubbitError as error:
            if os.environ.get("SUBBIT_DEBUG") == "1":
                raise
            _say("error: " + " ".join(str(error).split()))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            more = ""
            if ctx.invoked_subcommand == "compress":
                more = "; finished blocks are kept, run the same command again to go on"
            _say(f"interrupted{more}")
            raise typer.Exit(_INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compress Hugging Face causal LLMs to one bit and below, as real packed files.",
    epilog="Exit codes: 0 done, 2 usage or recipe, 3 model, 4 text, 5 packed file, 6 output, "
    "7 resume, 8 study, 130 interrupted. SUBBIT_DEBUG=1 shows the traceback of an error.",
)


def main() -> None:
    """Run the command line."""
    app(prog_name="subbit")


def _say(text: str) -> None:
    _stderr.print(text, markup=False)


def _version(wanted: bool) -> None:
    if wanted:
        from subbit import __version__

        typer.echo(f"subbit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def compress(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, model folder or .gguf file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to make; must not exist.")],
    recipe: Annotated[
        str, typer.Option(help="Name (see: subbit recipes) or .yaml file.")
    ] = "pbs2p-6-8",
    calibration: Annotated[
        str | None, typer.Option(help=f"Text: {_SOURCES} (default: the recipe's).")
    ] = None,
    nsamples: Annotated[
        int | None, typer.Option(min=1, help="Calibration windows (default: the recipe's).")
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window (default: the recipe's).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Calibration seed (default: the recipe's).")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    resume: Annotated[
        Resume, typer.Option(help="Go on with an unfinished run: if there is one, only so, or not.")
    ] = "auto",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe value; may be repeated."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no summary.")] = False,
) -> None:
    """Compress MODEL into a packed folder.

    Finished blocks are kept in OUT.partial: after Ctrl-C or a crash, the same command goes on.
    """
    from subbit.recipe import load_recipe
    from subbit.run.guards import check_output

    chosen = load_recipe(recipe).override(settings or [])
    if seed is not None:
        chosen = chosen.override([f"calibration.seed={seed}"])
    check_output(out, resume)  # before the slow imports

    from subbit.compression import compress as run

    run(
        model,
        chosen,
        calibration,
        out=out,
        nsamples=nsamples,
        seqlen=seqlen,
        device=device,
        dtype=dtype,
        resume=resume,
        progress=not quiet,
    )
    if not quiet:
        from subbit.hub.inspect import inspect_folder
        from subbit.run.tables import bits_in_words

        typer.echo(f"saved {out}: {bits_in_words(inspect_folder(out)['total'])}")


@app.command("eval")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL_OR_DIR", help="Packed folder, or any model compress takes."),
    ],
    data: Annotated[str, typer.Option(help=f"Text: {_SOURCES.replace(', self', '')}.")],
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows (default: all of the text).")
    ] = None,
    skip_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens to leave out at the start of the text.")
    ] = 0,
    bos: Annotated[Bos, typer.Option(help="Where BOS tokens go.")] = "none",
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure the perplexity of a model, packed or not, with its standard error."""
    from subbit.evaluate.perplexity import perplexity
    from subbit.run.progress import Progress
    from subbit.text.sources import load_text
    from subbit.text.windows import begins_with_bos, make_windows

    text = load_text(data, role="evaluation")
    loaded, tokenizer = _load(model, dtype, device)
    cut = make_windows(
        text, tokenizer, nsamples=windows, seqlen=seqlen, bos=bos, skip_tokens=skip_tokens
    )
    if bos == "none" and begins_with_bos(tokenizer):
        _say("this tokenizer begins texts with BOS, the windows do not: see --bos window")
    with Progress(cut.nsamples) as progress:
        progress.phase(f"perplexity on {text.name}")
        result = perplexity(loaded, cut, advance=progress.advance)
    if as_json:
        _print_json(result.to_dict())
        return
    error = "" if result.stderr is None else f" ± {result.stderr:.3g}"
    typer.echo(
        f"perplexity {result.perplexity:.4f}{error} "
        f"({text.name}: {cut.nsamples} windows of {cut.seqlen} tokens; {text.origin})"
    )


@app.command()
def generate(
    folder: Talker,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to go on from, or to answer.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    no_chat: Annotated[
        bool, typer.Option("--no-chat", help="Go on from the plain prompt, without chat template.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Answer one prompt; text goes to stdout as it is made."""
    from subbit.evaluate.generate import generate as run

    model, tokenizer = _load(folder, dtype, device, keep_dense=True)
    run(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=False if no_chat else "auto",
        stream=lambda piece: typer.echo(piece, nl=False),
    )
    typer.echo()


@app.command()
def chat(
    folder: Talker,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Talk to a model."""
    from subbit.evaluate.chat import chat_loop

    model, tokenizer = _load(folder, dtype, device, keep_dense=True)
    chat_loop(
        model,
        tokenizer,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Packed folder.")],
    as_json: Json = False,
) -> None:
    """Show what a packed folder holds: each linear, and paper bits beside stored bits."""
    from subbit.hub.backend import kernel_in_words
    from subbit.hub.inspect import inspect_folder
    from subbit.run.tables import bits_in_words, linears_table, show

    found = inspect_folder(folder)
    if as_json:
        _print_json(found)
        return
    show(linears_table(found["linears"]))
    typer.echo(bits_in_words(found["total"]))
    typer.echo(kernel_in_words(folder))
    typer.echo(
        "Paper bits count the signs of the kept weights, as papers do; stored bits count every "
        "byte on disk: signs, masks, group labels, levels."
    )


@app.command()
def bench(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Packed folder.")],
    original: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What it was made from (default: its own weights)."),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the timed prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of timed decoding.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Of both.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Json = False,
) -> None:
    """Measure how fast a packed folder runs on the CPU, beside the dense model."""
    from subbit.evaluate.bench import bench as run
    from subbit.run.tables import bench_in_words, bench_tables, show

    options = {"prompt": prompt, "new_tokens": new_tokens, "repeats": repeats, "threads": threads}
    with _stderr.status("loading") as status:
        found = run(
            folder, original, say=lambda text: status.update(f"measuring {text}"), **options
        )
    if as_json:
        _print_json(found)
        return
    for made in bench_tables(found, folder.resolve().name):
        show(made)
    typer.echo(bench_in_words(found))


@app.command()
def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Packed folder.")],
    dense: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Folder to make: an ordinary, dense checkpoint."),
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="GGUF file to make, where one holds the same weights."),
    ] = None,
    dtype: Dtype = "auto",
) -> None:
    """Write a packed folder in a form for tools that know nothing of subbit."""
    if (dense is None) == (gguf is None):
        raise typer.BadParameter("give one of --dense OUT and --gguf FILE")
    if gguf is not None and dtype != "auto":
        raise typer.BadParameter("--dtype is of --dense; a GGUF file keeps the weights as they are")
    with _stderr.status("writing"):
        if gguf is not None:
            from subbit.hub.export_gguf import export_gguf

            export_gguf(folder, gguf)
        else:
            from subbit.hub.export import export_dense

            export_dense(folder, dense, dtype=dtype)
    typer.echo(f"saved {dense or gguf}")


@app.command()
def recipes(
    as_json: Json = False,
) -> None:
    """List the recipes."""
    from subbit.recipe import list_recipes
    from subbit.run.tables import show, table

    found = list_recipes()
    if as_json:
        _print_json([recipe.model_dump(mode="json") for recipe in found])
        return
    rows = [
        (
            recipe.name,
            recipe.method,
            "-" if recipe.nm is None else "{}:{}".format(*recipe.nm),
            str(recipe.blocksize),
            f"{recipe.calibration.source}, {recipe.calibration.nsamples} x "
            f"{recipe.calibration.seqlen}",
        )
        for recipe in found
    ]
    show(table(("recipe", "method", "N:M", "blocksize", "calibration"), rows))
    typer.echo("Every value of every recipe: subbit recipes --json")


@app.command()
def methods(
    as_json: Json = False,
) -> None:
    """List the methods: paper, bits of their recipes, and how long they take."""
    from subbit.run.tables import show, span, table
    from subbit.study.overview import methods_overview

    found = methods_overview()
    if as_json:
        _print_json(found)
        return
    rows = [
        (
            m["name"],
            f"{m['paper']} ({m['year']})",
            span([recipe["paper_bits"] for recipe in m["recipes"]]),
            span([recipe["stored_bits"] for recipe in m["recipes"]]),
            ", ".join(dict.fromkeys(r["speed"] for r in m["recipes"] if r["speed"])),
            "yes" if m["packed"] else "no",
            m["summary"],
        )
        for m in found
    ]
    head = ("method", "paper", "paper bits", "stored bits", "speed", "packed", "what it does")
    show(table(head, rows))
    typer.echo(
        "Bits: from the smallest to the largest of the method's recipes, for a 4096 x 4096 linear "
        "with a tenth of its columns salient. Speed: to compress a billion weights on one thread, "
        "in linears of 576 columns (wider ones take longer), the model's own passes left out.\n"
        "Every recipe's bits and seconds, every option of every method: subbit methods --json"
    )


@app.command()
def study(
    name: Annotated[str, typer.Argument(metavar="STUDY", help="Name; see --list.")] = "",
    model: Annotated[str, typer.Option(help="Hub id, model folder or .gguf file.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the records of the cells.")] = Path(
        "records"
    ),
    only: Annotated[
        list[str] | None, typer.Option(help="Measure this cell alone; may be repeated.")
    ] = None,
    dtype: Dtype = "auto",
    listing: Annotated[bool, typer.Option("--list", help="List the studies and cells.")] = False,
) -> None:
    """Make one of the tables in docs/: measure its cells, each kept under OUT/STUDY, and print it.

    A cell that is there already, in this study or another one under OUT, is not measured again; an
    interrupted one resumes. One that fails does not stop the others: exit code 8.
    """
    from subbit.study.studies import STUDIES
    from subbit.study.studies import study as find

    if listing or not name:
        for key, found in STUDIES.items():
            typer.echo(f"{key}: {found.title}: {', '.join(cell.name for cell in found.cells)}")
        return
    chosen = find(name)
    from subbit.study.run import run_study

    result = run_study(name, chosen, model, out, only or [], _say, dtype)
    typer.echo(result.table)
    result.raise_failures()


def _load(source: str, dtype: str, device: str, keep_dense: bool = False) -> tuple[Any, Any]:
    """Return model and tokenizer of a packed model or of any that `compress` takes."""
    from subbit.hub.fetch import is_packed_on_hub
    from subbit.hub.inspect import is_packed

    if is_packed(source) or is_packed_on_hub(source):
        from subbit.hub.load import load, load_tokenizer

        model = load(source, dtype=dtype, device=device, keep_dense=keep_dense)
        return model, load_tokenizer(source)
    from subbit.model.load import load_model

    loaded = load_model(source, dtype=dtype, device=device)
    return loaded.model, loaded.tokenizer


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
