"""The commands of `mimi` beside the codec's own: `demo`, `evaluate`, `tokenize` and `detokenize`.

`modeling_mimi.cli` finds `register` by its entry point. What takes long to import is imported where it is needed.
"""

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from modeling_mimi.cli import CommandError, load_model, model_options, positive, sentence

ROOT = Path(__file__).parents[1]
BUNDLED_MODEL = ROOT / "checkpoints" / "mimi_small"
BUNDLED_CLIP = ROOT / "tests" / "data" / "nathalie_1110.flac"
DEFAULT_METRICS = ("si_sdr", "mel_distance", "stft_distance", "stoi", "pesq")
DATASET = "Hub id, folder of audio (with metadata.csv), parquet or webdataset files"
EXTRA = "pip install -e '.[evaluate]' in the repository"


def register(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands by `add(name, command, *parents)`."""
    demo = add("demo", _demo, model_options())
    demo.set_defaults(model=str(BUNDLED_MODEL), num_quantizers=None)
    text = "speech to use instead of the bundled clip (CC0), in anything libsndfile reads"
    demo.add_argument("clip", nargs="?", type=Path, default=BUNDLED_CLIP, metavar="CLIP", help=text)
    text = "folder to write to (default: %(default)s)"
    demo.add_argument("-o", "--output", type=Path, default=Path("demo"), metavar="DIR", help=text)
    app = add("app", _app)
    app.add_argument("--model", help="Hub id or directory (default: the bundled checkpoint)")
    text = "address to listen on; 0.0.0.0 lets other machines in (default: %(default)s)"
    app.add_argument("--host", default="127.0.0.1", help=text)
    app.add_argument("--port", type=positive(int), default=7860, metavar="N", help="default: %(default)s")
    _add_evaluate(add("evaluate", _evaluate))
    _add_tokenize(add("tokenize", _tokenize, model_options(), _corpus_options()))
    _add_detokenize(add("detokenize", _detokenize, model_options(), _corpus_options()))


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    text = "a Mimi checkpoint (directory or Hub id), or any word that --beside takes"
    evaluate.add_argument("model", help=text)
    evaluate.add_argument("dataset", help=DATASET)
    text = "folder to write to (default: %(default)s); the same command goes on with what is there"
    evaluate.add_argument("-o", "--output", type=Path, default=Path("evaluation"), metavar="DIR", help=text)
    text = "codecs to compare with on the same clips: original opus:6 codec2:1200 codec2:3200 speex:2.15 "
    text += "stock:CHECKPOINT encodec:CHECKPOINT@1.5 dac:CHECKPOINT@4"
    evaluate.add_argument("--beside", nargs="+", default=[], metavar="CODEC", help=text)
    text = "codebooks of Mimi to use, each a line of the table (default: all)"
    evaluate.add_argument("--num-quantizers", type=positive(int), nargs="+", metavar="K", help=text)
    text = (
        f"what to measure (default: {' '.join(DEFAULT_METRICS)}); also visqol distillmos dnsmos speaker_similarity wer"
    )
    evaluate.add_argument("--metrics", nargs="+", default=list(DEFAULT_METRICS), metavar="NAME", help=text)
    text = "speech recogniser of `wer`: Hub id or directory (default: %(default)s)"
    evaluate.add_argument("--recogniser", default="openai/whisper-tiny.en", metavar="MODEL", help=text)
    evaluate.add_argument("--text-column", default="text", metavar="NAME", help="what is said (default: %(default)s)")
    text = "item file of phones (`python -m training.evaluation.phones` makes one): ABX of each codebook of Mimi"
    evaluate.add_argument("--phones", type=Path, metavar="FILE", help=text)
    _add_source_options(evaluate, split="test")
    evaluate.add_argument("--clips", type=positive(int), metavar="N", help="evaluate a fixed choice of N clips")
    text = "longer clips are cut to this (default: %(default)g)"
    evaluate.add_argument("--clip-seconds", type=positive(float), default=30.0, metavar="S", help=text)
    text = "clips that are encoded together (default: %(default)s)"
    evaluate.add_argument("--batch-size", type=positive(int), default=8, metavar="N", help=text)
    evaluate.add_argument("--device", help="where networks run (default: cuda if there is one, else cpu)")
    evaluate.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of networks (default: %(default)s)",
    )
    evaluate.add_argument("--overwrite", action="store_true", help="measure anew what is there")


def _add_source_options(parser: argparse.ArgumentParser, split: str) -> None:
    parser.add_argument("--split", default=split, help="split, or folder of that name (default: %(default)s)")
    text = "configuration of a Hub data set"
    parser.add_argument("--name", default=None, help=text)  # said, for without it `name` is the command's
    parser.add_argument("--audio-column", default="audio", metavar="NAME", help="default: %(default)s")
    text = "keep the rows whose column has this value; several values of a column are alternatives"
    parser.add_argument("--where", nargs="+", default=[], metavar="COLUMN=VALUE", help=text)


def _parse_where(conditions: list[str]) -> dict[str, list[str]]:
    """The values to keep of each column, from COLUMN=VALUE words."""
    where: dict[str, list[str]] = {}
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not equals:
            raise CommandError(f"--where takes COLUMN=VALUE, not {condition!r}")
        where.setdefault(column, []).append(value)
    return where


def _corpus_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write to")
    text = "audio in a batch, padding included (default: 10 on a CPU, 240 on a GPU)"
    options.add_argument("--batch-seconds", type=positive(float), metavar="S", help=text)
    text = "threads of each process that read or write audio (default: %(default)s)"
    workers = min(8, os.cpu_count() or 1)
    options.add_argument("--workers", type=positive(int), default=workers, metavar="N", help=text)
    return options


def _add_tokenize(tokenize: argparse.ArgumentParser) -> None:
    tokenize.add_argument("dataset", help=DATASET)
    tokenize.add_argument("--num-quantizers", type=positive(int), metavar="K", help="codebooks to use (default: all)")
    _add_source_options(tokenize, split="train")
    tokenize.add_argument("--revision", help="commit, tag or branch of a Hub data set")
    tokenize.add_argument("--push", metavar="OWNER/NAME", help="publish the tokens on the Hub when all are there")


def _add_detokenize(detokenize: argparse.ArgumentParser) -> None:
    detokenize.add_argument("tokens", help="folder that `mimi tokenize` wrote, or its data set on the Hub")
    detokenize.set_defaults(model=None)
    detokenize.add_argument("--num-quantizers", type=positive(int), metavar="K", help="use at most so many codebooks")
    detokenize.add_argument("--format", choices=("flac", "wav"), default="flac", help="default: flac; both 16-bit")
    text = "column to name files after (default: %(default)s, the clip's own path)"
    detokenize.add_argument("--id-column", default="clip_id", metavar="NAME", help=text)


def _evaluate(args: argparse.Namespace) -> int:
    """Measure a codec on a data set, beside others on the same clips: one JSON, a table, pictures.

    Resumes where it was killed; `accelerate launch $(which mimi) evaluate ...` spreads it over processes.
    """
    from .config import RecipeError

    evaluate = _needs("training.evaluation.evaluate")
    try:
        results = evaluate.evaluate(args, _parse_where(args.where))
    except (ImportError, OSError, RecipeError, RuntimeError, ValueError) as error:
        raise CommandError(str(error)) from error
    if results is not None:
        print(evaluate.table(results))
        print(f"{results['data']['clips']} clips, {results['data']['hours']:.2f} h; everything is in {args.output}/")
    return 0


def _tokenize(args: argparse.Namespace) -> int:
    """Turn a data set into codes: parquet shards that `load_dataset` streams.

    Every clip once, whatever interrupts it: the same command goes on, with any number of processes.
    `accelerate launch $(which mimi) tokenize ...` spreads it over GPUs and machines that share the folder.
    """
    corpus = _needs("training.corpus.tokenize")
    if args.push and not (ROOT / "hub_cards").is_dir():
        raise CommandError("--push needs hub_cards, which is part of the repository, not of the package.")
    try:
        done = corpus.tokenize(args, _parse_where(args.where))
    except (OSError, RuntimeError, ValueError) as error:
        raise CommandError(sentence(error)) from error
    if done is None:  # the first process speaks for all
        return 0
    summary, work = done
    print(f"Finished before: nothing was left to do in {args.to}/." if work is None else f"This run: {work}.")
    print(corpus.describe(summary, args.to))
    if not args.push:
        return 0
    command = [sys.executable, "-m", "hub_cards", "publish", str(args.to.resolve()), args.push]
    return subprocess.run([*command, "--repo-type", "dataset"], check=False, cwd=ROOT).returncode


def _detokenize(args: argparse.Namespace) -> int:
    """Turn tokens back into audio: a file for each clip, named after it, and metadata.parquet."""
    corpus = _needs("training.corpus.detokenize")
    try:
        count = corpus.detokenize(args)
    except (OSError, RuntimeError, ValueError) as error:
        raise CommandError(sentence(error)) from error
    if count is not None:
        print(f"{count} clips are in {args.to}/.")
    return 0


def _app(args: argparse.Namespace) -> int:
    """A page in the browser: hear the codec on your own speech, blind beside other codecs, and live."""
    server = _needs("hub_cards.space.server", "pip install -e '.[app]' in the repository")
    print(f"http://{args.host}:{args.port}/ (Ctrl-C ends it)", flush=True)
    try:
        server.serve(args.model, args.host, args.port)
    except (OSError, ValueError) as error:
        raise CommandError(sentence(error)) from error
    return 0


def _demo(args: argparse.Namespace) -> int:
    """Turn a clip into 1.1 kbit/s and back: audio, codes, a picture and scores."""
    demo, spectral = _needs("training.demo"), _needs("training.spectral")
    if args.clip == BUNDLED_CLIP and not args.clip.exists():
        raise CommandError("The bundled clip is part of the repository, not of the package: name a CLIP.")
    if args.model == str(BUNDLED_MODEL) and not BUNDLED_MODEL.exists():
        raise CommandError("The bundled checkpoint is part of the repository, not of the package: name a --model.")
    model = load_model(args)
    try:
        distance = spectral.MelDistance(model.config.sampling_rate)
        lines = demo.demonstrate(model, Path(args.model).name, args.clip, args.output, distance)
    except (OSError, RuntimeError, ValueError) as error:
        raise CommandError(f"Could not use {args.clip}: {sentence(error)}") from error
    print(f"{args.clip.name} through {Path(args.model).name}, in {args.output}/:\n")
    print("codebooks    kbit/s     bytes      STOI  mel distance  file")
    for line in lines:
        print(
            f"{line.num_quantizers:9d} {line.bitrate / 1000:9.3f} {line.num_bytes:9.0f} {line.stoi:9.3f}"
            f" {line.mel_distance:13.3f}  {line.path.name}"
        )
    print("\nThe original is original.wav, the codes are codes.safetensors, and picture.png shows all three.")
    print("STOI: intelligibility, up to 1. Mel distance: 0 for an exact copy. Next:")
    print(f"    mimi demo my_voice.wav -o mine/\n    mimi info {args.output}/codes.safetensors")
    print(f"    mimi decode {args.output}/codes.safetensors -o decoded/ --model {args.model}")
    print("    mimi reconstruct my_folder/ -o listen/ --num-quantizers 8    # kyutai/mimi, 79 M parameters")
    return 0


def _needs(module: str, extra: str = EXTRA):
    """Import a module of this package, or say which extra it needs."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise CommandError(f"This command needs {error.name}: {extra}") from error
