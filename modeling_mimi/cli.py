# Copyright 2026 The open Mimi contributors
# SPDX-License-Identifier: Apache-2.0
"""
The Mimi neural speech codec, on files and live.

    mimi encode talks/ 'podcast/*.mp3' -o codes/
    mimi decode codes/ -o decoded/ --format flac
    mimi reconstruct a.wav b.flac -o listen/ --num-quantizers 4 8
    arecord -t raw -f S16_LE -r 24000 | mimi stream | aplay -t raw -f S16_LE -r 24000
    mimi convert kyutai/mimi mimi.safetensors
    mimi info codes/a.safetensors

Exit codes: 0 if all went well, 1 if some files failed (they are listed at the end), 2 if nothing
could be done, 130 after Ctrl-C.
"""

# What takes long to import is imported where it is needed: `mimi --help` waits for none of it.
import argparse
import itertools
import json
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from .audio_files import Task
    from .configuration_mimi import MimiConfig
    from .modeling_mimi import MimiModel

DEFAULT_MODEL = "kyutai/mimi"
WEIGHTS = ["config.json", "model*.safetensors*"]
CHUNK_BYTES = 1 << 16


class CommandError(Exception):
    """Ends the command with one sentence and exit code 2."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = _parser().parse_args(arguments)
    try:
        return args.command(args)
    except CommandError as error:
        print(f"mimi: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mimi: interrupted", file=sys.stderr)
        return 130


# ---- arguments


def _parser() -> argparse.ArgumentParser:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="mimi", description=__doc__, formatter_class=as_written)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    model, batch, count = model_options(), _batch_options(), positive(int)

    def add(name: str, command: Callable, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=command.__doc__, description=command.__doc__, parents=parents)
        subparser.set_defaults(command=command, name=name)
        return subparser

    encode = add("encode", _encode, batch, model)
    encode.add_argument("--num-quantizers", type=count, metavar="K", help="codebooks to use (default: all)")

    decode = add("decode", _decode, batch, model)
    decode.add_argument("--num-quantizers", type=count, metavar="K", help="use at most so many codebooks")
    decode.add_argument("--force", action="store_true", help="decode codes of another model, too")

    reconstruct = add("reconstruct", _reconstruct, batch, model)
    text = "codebooks to use (default: all); several give several files, NAME.q8.wav"
    reconstruct.add_argument("--num-quantizers", type=count, nargs="+", metavar="K", help=text)
    for command in (decode, reconstruct):
        command.add_argument("--format", choices=("wav", "flac", "ogg"), default="wav", help="default: wav, 16-bit")

    stream = add("stream", _stream, model)
    stream.add_argument("--from", dest="source", choices=("pcm", "codes"), default="pcm", help="what stdin is")
    text = "what to write: audio, or a line of K integers for each frame (default: pcm)"
    stream.add_argument("--to", choices=("pcm", "codes"), default="pcm", help=text)
    stream.add_argument("--num-quantizers", type=count, metavar="K", help="codebooks to use (default: all)")
    text = "samples of the PCM, little-endian, channels interleaved (default: s16)"
    stream.add_argument("--sample-format", choices=("s16", "f32"), default="s16", help=text)
    text = "rate of the PCM, in and out (default: the model's); another is resampled"
    stream.add_argument("--sampling-rate", type=count, metavar="HZ", help=text)

    convert = add("convert", _convert)
    convert.add_argument("source", help="a native .safetensors file, or a directory; either may be on the Hub")
    convert.add_argument("target", help="NAME.safetensors for a native file, any other name for a directory")
    convert.add_argument("--overwrite", action="store_true", help="replace what is there")

    info = add("info", _info)
    text = f"a codes file, a native file, a directory or a Hub id (default: {DEFAULT_MODEL})"
    info.add_argument("source", nargs="?", default=argparse.SUPPRESS, help=text)
    info.add_argument("--model", dest="source", default=DEFAULT_MODEL, metavar="MODEL", help="the same")
    info.add_argument("--json", action="store_true", help="print JSON")
    for extension in entry_points(group="mimi.commands"):
        extension.load()(add)
    return parser


def model_options() -> argparse.ArgumentParser:
    """Which model, and where it runs: what `load_model` reads."""
    options = argparse.ArgumentParser(add_help=False)
    text = "Hub id or directory (default: %(default)s)"
    options.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help=text)
    options.add_argument("--device", help="where to run (default: cuda if there is one, else cpu)")
    text = "type of the weights (default: %(default)s)"
    options.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help=text)
    options.add_argument("--threads", type=positive(int), metavar="N", help="CPU threads (default: PyTorch's choice)")
    return options


def _batch_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    text = "files, folders to search, or globs; files in a folder keep their place in it"
    options.add_argument("inputs", nargs="+", metavar="INPUT", help=text)
    options.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    options.add_argument("--overwrite", action="store_true", help="redo what is there (default: keep it and skip)")
    text = "audio in a batch, padding included (default: %(default)g); a longer file goes alone, in bounded memory"
    options.add_argument("--batch-seconds", type=positive(float), default=120.0, metavar="S", help=text)
    return options


def positive(kind: type) -> Callable[[str], Any]:
    """An argument type: a number above 0."""

    def parse(text: str) -> Any:
        if not (value := kind(text)) > 0:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # what argparse calls it in its message
    return parse


# ---- models


def load_model(args: argparse.Namespace) -> "MimiModel":
    """Load the model, or say in one sentence why not."""
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from .modeling_mimi import MimiModel

    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    folder, dtype = _local(args.model, *WEIGHTS), getattr(torch, args.dtype)
    try:
        config = _read_config(folder)
        model, loading = MimiModel.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
        if missing := loading["missing_keys"]:
            raise ValueError(f"{len(missing)} of its weights are missing")
        model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (AssertionError, OSError, RuntimeError, SafetensorError, StrictDataclassError, ValueError) as error:
        raise CommandError(f"Could not load the model {args.model!r}: {sentence(error)}") from error
    counts = args.num_quantizers if isinstance(args.num_quantizers, list) else [args.num_quantizers]
    try:
        for count in counts:
            model.quantizer.check_num_quantizers(count)
    except ValueError as error:
        raise CommandError(str(error)) from error
    return model.eval()


def _local(name: str, *patterns: str) -> Path:
    """
    Path of a model: its own, or else that of a copy of what the Hub has (a directory, or a file as `owner/name/file`).

    One request asks the Hub whether the copy is recent. `from_pretrained` asks for each file, and without network it
    tries again for 23 seconds.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    path = Path(name)
    if path.exists():
        return path
    repository, file = name, ""
    if path.suffix == ".safetensors" and len(path.parts) > 2:
        repository, file = "/".join(path.parts[:2]), "/".join(path.parts[2:])
    reasons = {
        HFValidationError: "there is no such file or directory.",
        RepositoryNotFoundError: "the Hub has no such model, or it is private.",
        LocalEntryNotFoundError: "it is not in the local cache and the Hub cannot be reached. "
        "Give a directory with --model, or connect once to download it.",
    }
    try:
        return Path(snapshot_download(repository, allow_patterns=[file] if file else list(patterns)), file)
    except (HFValidationError, OSError) as error:
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), sentence(error))
        raise CommandError(f"Could not load the model {name!r}: {reason}") from error


def _read_config(folder: Path) -> "MimiConfig":
    """The config in a folder. `from_pretrained` alone would take any model's, and the default one where none is."""
    from .configuration_mimi import MimiConfig

    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != MimiConfig.model_type:
        raise ValueError(f"it is of the type {kind!r}, not a Mimi")
    return MimiConfig.from_pretrained(folder)


def sentence(error: Exception) -> str:
    """A message on one line."""
    return textwrap.shorten(str(error), 300)


# ---- files


def _encode(args: argparse.Namespace) -> int:
    """Encode audio files to codes files."""
    from .audio_files import EncodeFiles

    return _run_files(args, EncodeFiles, "safetensors", name=args.model, num_quantizers=args.num_quantizers)


def _decode(args: argparse.Namespace) -> int:
    """Decode codes files to audio files."""
    from .audio_files import DecodeFiles

    return _run_files(args, DecodeFiles, args.format, num_quantizers=args.num_quantizers, force=args.force)


def _reconstruct(args: argparse.Namespace) -> int:
    """Encode and decode audio files, to hear what the codec does to them."""
    from .audio_files import ReconstructFiles

    levels = sorted(set(args.num_quantizers or []))
    prefixes = [f"q{level}." for level in levels] if len(levels) > 1 else [""]
    return _run_files(args, ReconstructFiles, args.format, prefixes, levels=levels)


def _run_files(
    args: argparse.Namespace, kind: "type[Task]", suffix: str, prefixes: Iterable[str] = ("",), **options
) -> int:
    """What the batch commands share: find out what is to be done, and load the model only if there is something."""
    from .audio_files import find_files, plan_jobs, run_jobs

    files = find_files(args.inputs, kind.suffixes, args.output)
    if not files:
        raise CommandError(f"There is no file to {args.name} in {', '.join(args.inputs)}.")
    try:
        jobs = plan_jobs(files, args.output, [f".{prefix}{suffix}" for prefix in prefixes])
    except ValueError as error:
        raise CommandError(str(error)) from error

    def load_task() -> "Task":
        return kind(load_model(args), suffix, **options)

    return 1 if run_jobs(jobs, kind.measure, load_task, args.batch_seconds, args.overwrite) else 0


# ---- live


def _stream(args: argparse.Namespace) -> int:
    """Encode and decode live: raw PCM on stdin to PCM or codes on stdout, or codes to PCM."""
    if args.source == args.to == "codes":
        raise CommandError("--from codes --to codes leaves nothing to do.")
    live = _Live(load_model(args), args)
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    read = stdin.readline if args.source == "codes" else lambda: os.read(stdin.fileno(), CHUNK_BYTES)
    try:
        for data in itertools.chain(iter(read, b""), [b""]):  # neither way of reading waits for more than it gives
            stdout.write(live.step(data))
            stdout.flush()
    except BrokenPipeError:  # the reader has had enough; Python must not complain when it flushes again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
    finally:
        print(live.report(), file=sys.stderr)
    return 0


class _Live:
    """A live stream from bytes to bytes, PCM or lines of codes on either side."""

    def __init__(self, model: "MimiModel", args: argparse.Namespace):
        self.config = model.config
        self.device = model.device
        self.stream = model.stream(num_quantizers=args.num_quantizers)
        self.take = self._parse if args.source == "codes" else self._encode
        self.give = self._format if args.to == "codes" else self._decode
        self.dtype = {"s16": "<i2", "f32": "<f4"}[args.sample_format]
        own_rate, rate = self.config.sampling_rate, args.sampling_rate or self.config.sampling_rate
        self.resample_input = _resampler(rate, own_rate, self.config.audio_channels)
        self.resample_output = _resampler(own_rate, rate, self.config.audio_channels)
        self.rest = b""  # of a sample that is not yet complete
        self.samples = self.lines = self.frames = 0
        self.seconds = 0.0

    def step(self, data: bytes) -> bytes:
        """Take the next bytes (of codes, a line) and give what is known from them; none end the stream."""
        start, last = time.perf_counter(), not data
        codes = self.take(data, last)
        output = self.give(codes, last)
        self.frames += codes.shape[-1]
        self.seconds += time.perf_counter() - start
        return output

    def report(self) -> str:
        """One line on how long it was and how fast."""
        frame = self.config.frame_size / self.config.sampling_rate
        line = f"{self.frames * frame:.1f} s streamed"
        if self.frames:
            taken = self.seconds / self.frames
            line += f", {1000 * taken:.1f} ms per frame of {1000 * frame:g} ms, {frame / taken:.1f} times real time"
        return line

    def _encode(self, data: bytes, last: bool) -> "Tensor":
        """PCM to codes (1, K, T)."""
        import numpy as np
        import torch

        data = self.rest + data
        channels, dtype = self.config.audio_channels, np.dtype(self.dtype)
        whole = len(data) - len(data) % (dtype.itemsize * channels)
        data, self.rest = data[:whole], data[whole:]
        audio = np.frombuffer(data, dtype).astype(np.float32).reshape(-1, channels)  # (L, C)
        audio = audio / 32768 if dtype.kind == "i" else np.nan_to_num(audio)  # a NaN would stay in the state
        audio = self.resample_input(audio, last)
        self.samples += len(audio)
        codes = self.stream.encode(torch.tensor(audio.T[None], device=self.device))
        return torch.cat([codes, self.stream.flush()], dim=-1) if last else codes

    def _decode(self, codes: "Tensor", last: bool) -> bytes:
        """Codes (1, K, T) to PCM."""
        audio = self.stream.decode(codes)[0].float().cpu().numpy().T  # (L, C)
        if last:
            audio = audio[: len(audio) - -self.samples % self.config.frame_size]  # the last frame was filled up
        audio = self.resample_output(audio, last)
        if self.dtype == "<i2":
            audio = (audio * 32768).round().clip(-32768, 32767)
        return audio.astype(self.dtype).tobytes()

    def _parse(self, line: bytes, last: bool) -> "Tensor":
        """A line of integers to codes (1, K, 1); an empty line to no frame."""
        import torch

        self.lines += 1
        words = line.split()
        codes = [int(word) for word in words if word.isdigit()]
        size, least, most = self.config.codebook_size, self.config.least_quantizers, self.config.num_quantizers
        if words and (not least <= len(codes) == len(words) <= most or max(codes) >= size):
            rule = f"{least} to {most} integers from 0 to {size - 1}"
            raise CommandError(f"Line {self.lines} is not {rule}: {line[:60].decode(errors='replace')!r}.")
        codes = codes[: self.stream.num_quantizers] or [[]] * self.stream.num_quantizers
        return torch.tensor(codes, dtype=torch.int64, device=self.device).reshape(1, len(codes), -1)

    def _format(self, codes: "Tensor", last: bool) -> bytes:
        """Codes (1, K, T) to T lines of K integers."""
        return "".join(" ".join(map(str, frame)) + "\n" for frame in codes[0].T.tolist()).encode()


def _resampler(source: int, target: int, channels: int) -> "Callable[[np.ndarray, bool], np.ndarray]":
    """Live resampling of samples (L, C): the next piece, and whether it is the last, to what is known from it."""
    import soxr

    if source == target:
        return lambda samples, last: samples
    return soxr.ResampleStream(source, target, channels, dtype="float32").resample_chunk


# ---- what a file or a model is


def _convert(args: argparse.Namespace) -> int:
    """Convert between Kyutai's native file and a directory in the transformers layout."""
    from .conversion import convert

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            convert(_local(args.source, *WEIGHTS), args.target, overwrite=args.overwrite)
        except FileExistsError as error:
            raise CommandError(f"{args.target} exists already: --overwrite replaces it.") from error
        except (OSError, ValueError) as error:
            raise CommandError(f"Could not convert {args.source}: {sentence(error)}") from error
    for warning in caught:
        print(f"mimi: {warning.message}", file=sys.stderr)
    return 0


def _info(args: argparse.Namespace) -> int:
    """Tell what a codes file, a native file or a model is."""
    from huggingface_hub.errors import StrictDataclassError

    path = _local(args.source, "config.json")
    try:
        facts = _describe_file(path) if path.is_file() else _describe_codec("model", _read_config(path))
    except (OSError, StrictDataclassError, ValueError) as error:
        raise CommandError(f"Could not read {args.source}: {sentence(error)}") from error
    if args.json:
        print(json.dumps({"name": args.source, **facts}, indent=2))
        return 0
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {entry}" for key, entry in value.items())
        print(f"{name.replace('_', ' '):24} {value}")
    return 0


def _describe_file(path: Path) -> dict[str, Any]:
    from .audio_files import is_codes_file, measure_codes, open_codes
    from .configuration_mimi import MimiConfig
    from .conversion import load_native

    if is_codes_file(path):
        with open_codes(path) as (_, metadata):
            return {"kind": "codes", "duration_s": measure_codes(path).seconds, **dict(sorted(metadata.items()))}
    fields, _ = load_native(path)
    return _describe_codec("native weights", MimiConfig(**fields))


def _describe_codec(kind: str, config: "MimiConfig") -> dict[str, Any]:
    """What follows from a config alone: no weights are loaded."""
    import torch

    from .modeling_mimi import MimiModel

    with torch.device("meta"):
        model = MimiModel(config)
    names = ("sampling_rate", "audio_channels", "frame_rate", "frame_size", "codebook_size", "num_quantizers")
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    return {
        "kind": kind,
        **{name: getattr(config, name) for name in names},
        "latency_ms": 1000 * config.frame_size / config.sampling_rate,
        "bitrates": {count: config.bitrate(count) for count in range(1, config.num_quantizers + 1)},
        "dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "parameters": {**parts, "total": sum(parts.values())},
    }


if __name__ == "__main__":
    sys.exit(main())
