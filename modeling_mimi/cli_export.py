# Copyright 2026 The open Mimi contributors
# SPDX-License-Identifier: Apache-2.0
"""The command `mimi export`; `modeling_mimi.cli` finds `register` by its entry point."""

# What takes long to import is imported where it is needed.
import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import CommandError, load_model, positive, sentence

if TYPE_CHECKING:
    from torch import Tensor

    from .modeling_mimi import MimiModel

SPEECH = sorted((Path(__file__).parents[1] / "tests" / "data").glob("*.flac"))
LEAST_SECONDS, MOST_SECONDS = 3, 12
EXTRA = "pip install -e '.[onnx]' in the repository"


def register(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command by `add(name, command)`."""
    export = add("export", _export)
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="Hub id or directory")
    text = "folder to write to; it appears when all is done"
    export.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help=text)
    text = "onnx, for onnxruntime and transformers.js, or torch, for ExecuTorch (default: %(default)s)"
    export.add_argument("--format", choices=("onnx", "torch"), default="onnx", help=text)
    text = "one or more of fp32, fp16 and, in ONNX, int8 (default: fp32)"
    choices = ("fp32", "fp16", "int8")
    export.add_argument("--dtype", nargs="+", choices=choices, default=["fp32"], metavar="DTYPE", help=text)
    export.add_argument("--num-quantizers", type=positive(int), metavar="K", help="codebooks to use (default: all)")
    text = "speech to check the graphs with, 3 s at least (default: the sample speech of the repository)"
    export.add_argument("--speech", type=Path, nargs="+", default=SPEECH, metavar="FILE", help=text)
    export.add_argument("--no-check", action="store_true", help="do not compare the graphs with the model")
    export.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    export.add_argument("--threads", type=positive(int), metavar="N", help="CPU threads (default: PyTorch's choice)")


def _export(args: argparse.Namespace) -> int:
    """Write a model as graphs for other runtimes, checked against it: clips, and a streaming step with its state.

    Exit code 1 if a graph in fp32 does not give the model's codes and audio.
    """
    needed = ("onnx", "onnxscript", "onnxruntime") if args.format == "onnx" else ()
    if missing := [package for package in needed if find_spec(package) is None]:
        raise CommandError(f"This command needs {', '.join(missing)}: {EXTRA}.")
    if args.format == "torch" and "int8" in args.dtype:
        raise CommandError("--format torch comes in fp32 and fp16: leave out int8, which ExecuTorch makes of its own.")
    from .export import MANIFEST, ExportError, export

    if args.output.exists() and not (args.output.is_dir() and not any(args.output.iterdir())):
        if not (args.output / MANIFEST).is_file():
            raise CommandError(f"{args.output} exists and is no export: name another folder.")
        if not args.overwrite:
            raise CommandError(f"{args.output} exists already: --overwrite replaces it.")
    options = {"device": "cpu", "dtype": "float32", "threads": args.threads, "num_quantizers": args.num_quantizers}
    model = load_model(argparse.Namespace(model=args.checkpoint, **options))
    try:
        audio = None if args.no_check else _speech(args.speech, model)
        count = args.num_quantizers or model.config.num_quantizers
        name = Path(args.checkpoint).name if Path(args.checkpoint).exists() else args.checkpoint
        written = export(model, args.output, name, count, args.format, args.dtype, audio)
    except ExportError as error:
        print(f"mimi: {error} Nothing was written; --no-check leaves the comparison out.", file=sys.stderr)
        return 1
    except (OSError, RuntimeError, ValueError) as error:
        raise CommandError(f"Could not export {args.checkpoint}: {sentence(error)}") from error
    _print_table(written)
    return 0


def _speech(paths: list[Path], model: "MimiModel") -> "Tensor":
    """The given files end to end, (1, C, L), as far as they are needed."""
    import torch

    from .audio_files import read_audio
    from .feature_extraction_mimi import MimiFeatureExtractor

    if not paths:
        raise CommandError("The sample speech is part of the repository, not of the package: name --speech FILE.")
    rate = model.config.sampling_rate
    extractor = MimiFeatureExtractor(feature_size=model.config.audio_channels, sampling_rate=rate)
    clips = []
    for path in paths:
        try:
            clips.append(read_audio(path, extractor).data)
        except (OSError, RuntimeError, ValueError) as error:
            raise CommandError(f"Could not read {path}: {sentence(error)}") from error
    audio = torch.cat(clips, dim=-1)[None]
    if audio.shape[-1] < LEAST_SECONDS * rate:
        raise CommandError(f"--speech is {audio.shape[-1] / rate:.1f} s long: give {LEAST_SECONDS} s at least.")
    return audio[..., : MOST_SECONDS * rate]


def _print_table(written: dict[str, Any]) -> None:
    """How large each file is, and how close to the model."""
    width = max(len(file["file"]) for file in written["files"])
    count = written["num_quantizers"]
    title = "" if written["checked_s"] is None else f"   codes equal, % (codebooks 1 to {count}), or SNR, dB"
    print(f"{'file':{width}}       MB{title}")
    for file in written["files"]:
        check = file.get("check", {})
        line = " ".join(f"{100 * share:5.1f}" for share in check.get("codes_equal", []))
        if "snr_db" in check:
            line = f"{check['snr_db']:5.1f} dB"
        print(f"{file['file']:{width}} {file['bytes'] / 1e6:8.1f}   {line}".rstrip())
    if written["checked_s"]:
        print(f"Against the model, over {written['checked_s']:g} s of speech; export.json has it all.")
