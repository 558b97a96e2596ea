# Copyright 2026 The open Mimi contributors
# SPDX-License-Identifier: Apache-2.0
"""
Audio and codes files for the `mimi` command: find them, run them through the model in batches, write what comes out.

`C` audio channels, `L` samples, `K` codebooks, `T` frames.
"""

import glob
import hashlib
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from tqdm import tqdm

from .configuration_mimi import MimiConfig
from .feature_extraction_mimi import MimiFeatureExtractor
from .modeling_mimi import MimiModel
from .modeling_quantizer import MimiCodebook

AUDIO_SUFFIXES = frozenset(f".{name.lower()}" for name in soundfile.available_formats()) - {".raw"} | {
    ".aif",
    ".aifc",
    ".oga",
    ".opus",
    ".snd",
    ".sph",
    ".wave",
}
"""Names by which audio is known in a folder. A file that is named itself may have any name."""

CODES_FORMAT = {"format": "mimi-codes", "format_version": "1"}
CODES_KEYS = ("sampling_rate", "frame_size", "num_samples", "codebook_size", "num_quantizers", "model_fingerprint")
"""Metadata without which codes cannot be decoded, or not safely."""

UNKNOWN_LENGTH = 2**62
"""libsndfile gives more samples than this where the header of a file does not know."""

FAILURES = (OSError, RuntimeError, ValueError)
"""What a broken file raises; libsndfile's and PyTorch's own errors are `RuntimeError`s."""


class Job(NamedTuple):
    """An input file and the files that are to be made of it."""

    source: Path
    targets: tuple[Path, ...]


class Size(NamedTuple):
    """What decides which files go together: codebooks of a codes file (0 for audio), and seconds of audio."""

    codebooks: int
    seconds: float


class Clip(NamedTuple):
    """A file in memory: audio (C, L) or codes (K, T), samples of its audio at the model's rate, and facts."""

    data: Tensor
    num_samples: int
    metadata: dict[str, str]


class Failure(NamedTuple):
    """A file that could not be done, and why."""

    source: Path
    reason: str


# ---- which files


def find_files(inputs: list[str], suffixes: frozenset[str], output: Path) -> dict[Path, Path]:
    """
    Find the files that are meant by files, folders and globs, each with its place in the tree of outputs.

    A name that nothing has is taken for a file: reading it will say so.
    """
    files: dict[Path, Path] = {}
    for name in inputs:
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True)) or [name]
        for path in map(Path, matches):
            if not path.is_dir():
                files.setdefault(path, Path(path.name))
                continue
            for place in _places_in(path, suffixes, output):
                files.setdefault(path / place, place)
    return files


def _places_in(folder: Path, suffixes: frozenset[str], output: Path) -> Iterator[Path]:
    """Files with these suffixes in a folder, relative to it; not hidden ones, nor outputs that lie inside."""
    root, output = folder.resolve(), output.resolve()
    outputs = output.relative_to(root) if root in output.parents else None
    for file in sorted(folder.rglob("*")):
        place = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in place.parts)
        if file.suffix.lower() in suffixes and not hidden and outputs not in place.parents and file.is_file():
            yield place


def plan_jobs(files: dict[Path, Path], output: Path, endings: list[str]) -> list[Job]:
    """
    Say what becomes of each file: in the folder `output`, its place there with each of the endings for its suffix.

    Raises:
        ValueError: two files would have the same output, or an output would be written over an input.
    """
    jobs = []
    claimed: dict[Path, Path] = {}
    sources = {source.resolve() for source in files}
    for source, place in files.items():
        stem = output / place.with_suffix("")
        job = Job(source, tuple(stem.with_name(stem.name + ending) for ending in endings))
        for target in job.targets:
            if other := claimed.get(target):
                raise ValueError(
                    f"{other} and {source} would both become {target}: run them apart, each with its own --output."
                )
            if target.resolve() in sources:
                raise ValueError(f"{target} is an input and would be written over: give another --output.")
            claimed[target] = source
        jobs.append(job)
    return jobs


def in_batches(sized: list[tuple[Job, Size]], batch_seconds: float) -> Iterator[list[tuple[Job, Size]]]:
    """Group files of like length, longest first, up to `batch_seconds` of padded audio; a longer file goes alone."""
    batch: list[tuple[Job, Size]] = []
    for job, size in sorted(sized, key=lambda item: (item[1].codebooks, -item[1].seconds)):
        if batch:
            longest = batch[0][1]
            full = longest.seconds * (len(batch) + 1) > batch_seconds
            if full or longest.codebooks != size.codebooks:
                yield batch
                batch = []
        batch.append((job, size))
    if batch:
        yield batch


# ---- reading and writing


def measure_audio(path: Path) -> Size:
    """Read the header of an audio file."""
    path.open("rb").close()  # says what is wrong, where libsndfile says "System error."
    info = soundfile.info(path)
    if info.frames > UNKNOWN_LENGTH:
        raise ValueError("its header does not say how long it is: rewrite it, with ffmpeg for example")
    return Size(0, info.duration)


def read_audio(path: Path, extractor: MimiFeatureExtractor) -> Clip:
    """Read an audio file as the model takes it, (C, L)."""
    with soundfile.SoundFile(path) as file:
        audio = file.read(dtype="float32", always_2d=True)  # (L, C)
        if len(audio) < file.frames:
            raise ValueError(f"it is cut off after {len(audio)} of {file.frames} samples")
        metadata = {"source_sampling_rate": str(file.samplerate), "source_channels": str(file.channels)}
        waveform = extractor([audio], sampling_rate=file.samplerate, padding=False)["input_values"][0]
    return Clip(torch.from_numpy(waveform), waveform.shape[-1], {"source": path.name, **metadata})


def write_audio(path: Path, audio: Tensor, sampling_rate: int, ending: str) -> None:
    """Write audio (C, L) as 16-bit WAV or FLAC, clipped to [-1, 1], or as Ogg Vorbis."""
    samples = audio.numpy().T
    subtype = "VORBIS" if ending == "ogg" else "PCM_16"
    with soundfile.SoundFile(path, "w", sampling_rate, samples.shape[1], subtype, format=ending.upper()) as file:
        for start in range(0, len(samples), sampling_rate):  # libsndfile's Vorbis crashes on a long clip at once
            file.write(samples[start : start + sampling_rate])


def is_codes_file(path: Path) -> bool:
    """Whether a file says that it holds codes."""
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("format") == CODES_FORMAT["format"]
    except SafetensorError:
        return False


@contextmanager
def open_codes(path: Path) -> Generator[tuple[safe_open, dict[str, str]]]:
    """Open a codes file, its header checked: the file and its metadata."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != CODES_FORMAT["format"]:
                raise ValueError("it is not a codes file as `mimi encode` writes them")
            if metadata.get("format_version") != CODES_FORMAT["format_version"]:
                raise ValueError(f"its format version is {metadata.get('format_version')}: a newer `mimi` reads it")
            if missing := [key for key in CODES_KEYS if key not in metadata]:
                raise ValueError(f"its metadata lacks {', '.join(missing)}")
            yield file, metadata
    except SafetensorError as error:
        raise ValueError(f"it is not a safetensors file: {error}") from error


def measure_codes(path: Path) -> Size:
    """Read the header of a codes file."""
    with open_codes(path) as (_, metadata):
        return Size(int(metadata["num_quantizers"]), int(metadata["num_samples"]) / int(metadata["sampling_rate"]))


def read_codes(path: Path) -> Clip:
    """Read a codes file, (K, T)."""
    with open_codes(path) as (file, metadata):
        codes = torch.from_numpy(file.get_tensor("codes").astype(np.int64))
    num_samples = int(metadata["num_samples"])
    shape = (int(metadata["num_quantizers"]), -(-num_samples // int(metadata["frame_size"])))
    if codes.shape != shape:
        raise ValueError(f"its codes have shape {tuple(codes.shape)}, and its metadata says {shape}")
    if codes.numel() and codes.max() >= int(metadata["codebook_size"]):
        raise ValueError(f"a code is {codes.max()}, and its codebooks have {metadata['codebook_size']} entries")
    return Clip(codes, num_samples, metadata)


def write_codes(path: Path, codes: Tensor, metadata: dict[str, str]) -> None:
    """Write codes (K, T) as `uint16`, or `uint32` where codebooks are larger, with what it takes to decode them."""
    dtype = np.promote_types(np.uint16, np.min_scalar_type(int(metadata["codebook_size"]) - 1))
    created = {"created": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    path.write_bytes(save({"codes": np.ascontiguousarray(codes.numpy(), dtype)}, CODES_FORMAT | metadata | created))


def describe_codec(config: MimiConfig) -> dict[str, str]:
    """What codes files say about the codec that made them."""
    names = ("sampling_rate", "frame_rate", "frame_size", "codebook_size")
    try:
        ours = version("open-mimi")
    except PackageNotFoundError:  # beside an application, not installed
        ours = "source"
    libraries = f"open-mimi=={ours} torch=={version('torch')} transformers=={version('transformers')}"
    return {**{name: str(getattr(config, name)) for name in names}, "libraries": libraries}


def fingerprints(model: MimiModel) -> list[str]:
    """SHA-256 of the first 1, 2, ... K codebooks: equal where codes mean the same, whatever the dtype of the model."""
    hasher, digests = hashlib.sha256(), []
    for module in model.quantizer.modules():
        if isinstance(module, MimiCodebook):
            for values in (module.embed_sum, module.cluster_usage):
                hasher.update(values.numpy(force=True).tobytes())
            digests.append(hasher.hexdigest())
    return digests


@contextmanager
def atomic(target: Path) -> Generator[Path]:
    """Lend a hidden path beside the target, which takes its place if the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


# ---- what the three batch commands do with a batch


class Task(ABC):
    """One of the batch commands: audio files to audio files, where it does not say otherwise."""

    suffixes = AUDIO_SUFFIXES
    measure: Callable[[Path], Size] = staticmethod(measure_audio)

    def __init__(self, model: MimiModel, ending: str):
        self.model = model
        self.config = model.config
        self.ending = ending
        self.extractor = MimiFeatureExtractor(model.config.audio_channels, model.config.sampling_rate)

    def read(self, source: Path) -> Clip:
        """Read a file."""
        return read_audio(source, self.extractor)

    @abstractmethod
    def run(self, clips: list[Clip]) -> list[list[Tensor]]:
        """Give for each clip of a batch what each of its targets is to hold."""

    def write(self, path: Path, output: Tensor, clip: Clip) -> None:
        """Write what a target is to hold."""
        write_audio(path, output, self.config.sampling_rate, self.ending)

    def encode(self, clips: list[Clip], num_quantizers: int | None) -> list[Tensor]:
        """Audio to codes (K, T) per clip."""
        audio = _padded([clip.data for clip in clips]).to(self.model.device)
        codes = self.model.encode(audio, num_quantizers=num_quantizers).audio_codes.cpu()
        return [row[:, : self.config.num_frames(clip.num_samples)] for row, clip in zip(codes, clips, strict=True)]

    def decode(self, codes: list[Tensor], clips: list[Clip]) -> list[Tensor]:
        """Codes to audio (C, L) per clip, as long as it was before encoding."""
        audio = self.model.decode(_padded(codes).to(self.model.device)).audio_values.float().cpu()
        return [row[:, : clip.num_samples] for row, clip in zip(audio, clips, strict=True)]


def _padded(tensors: list[Tensor]) -> Tensor:
    """Stack along a new first axis, zeros behind the shorter ones. No mask is needed: the model never looks ahead."""
    return torch.nn.utils.rnn.pad_sequence([tensor.T for tensor in tensors], batch_first=True).transpose(1, 2)


class EncodeFiles(Task):
    """Audio files to codes files."""

    def __init__(self, model: MimiModel, ending: str, name: str, num_quantizers: int | None):
        super().__init__(model, ending)
        self.num_quantizers = num_quantizers or self.config.num_quantizers
        self.metadata = {
            **describe_codec(self.config),
            "num_quantizers": str(self.num_quantizers),
            "model": name,
            "model_fingerprint": fingerprints(model)[self.num_quantizers - 1],
        }

    def run(self, clips: list[Clip]) -> list[list[Tensor]]:
        return [[codes] for codes in self.encode(clips, self.num_quantizers)]

    def write(self, path: Path, output: Tensor, clip: Clip) -> None:
        write_codes(path, output, {**self.metadata, **clip.metadata, "num_samples": str(clip.num_samples)})


class DecodeFiles(Task):
    """Codes files to audio files, with at most `num_quantizers` codebooks. `force` takes codes of another model."""

    suffixes = frozenset({".safetensors"})
    measure = staticmethod(measure_codes)

    def __init__(self, model: MimiModel, ending: str, num_quantizers: int | None, force: bool):
        super().__init__(model, ending)
        self.num_quantizers = num_quantizers or self.config.num_quantizers
        self.force = force
        self.fingerprints = fingerprints(model)

    def read(self, source: Path) -> Clip:
        clip = read_codes(source)
        for name in ("sampling_rate", "frame_size", "codebook_size"):
            if clip.metadata[name] != str(getattr(self.config, name)):
                raise ValueError(f"its {name} is {clip.metadata[name]}, the model's {getattr(self.config, name)}")
        known = self.fingerprints[: clip.data.shape[0]][-1]
        if clip.metadata["model_fingerprint"] != known and not self.force:
            model = clip.metadata.get("model", "another model")
            raise ValueError(f"it was encoded with other codebooks, those of {model}: give that --model, or --force")
        return clip._replace(data=clip.data[: self.num_quantizers])

    def run(self, clips: list[Clip]) -> list[list[Tensor]]:
        return [[audio] for audio in self.decode([clip.data for clip in clips], clips)]


class ReconstructFiles(Task):
    """Audio files to what the model makes of them, at several numbers of codebooks: one encoding serves them all."""

    def __init__(self, model: MimiModel, ending: str, levels: list[int]):
        super().__init__(model, ending)
        self.levels = levels or [self.config.num_quantizers]

    def run(self, clips: list[Clip]) -> list[list[Tensor]]:
        codes = self.encode(clips, max(self.levels))
        versions = [self.decode([rows[:level] for rows in codes], clips) for level in self.levels]
        return [list(outputs) for outputs in zip(*versions, strict=True)]


# ---- the walk


def run_jobs(
    jobs: list[Job],
    measure: Callable[[Path], Size],
    load_task: Callable[[], Task],
    batch_seconds: float,
    overwrite: bool,
) -> list[Failure]:
    """
    Do the jobs that are not done yet, one batch in memory at a time, and say on stderr how it went.

    A file that fails stops no other. The task is loaded only if there is something to do.
    """
    todo = [job for job in jobs if overwrite or not all(target.exists() for target in job.targets)]
    if skipped := len(jobs) - len(todo):
        print(f"{skipped} skipped: the outputs exist, and --overwrite would redo them", file=sys.stderr)
    failures: list[Failure] = []
    sized: list[tuple[Job, Size]] = []
    for job in tqdm(todo, "reading headers", leave=False, disable=None):
        with _blamed(failures, [job]):
            sized.append((job, measure(job.source)))
    if sized:
        task, start = load_task(), time.perf_counter()
        _run_batches(task, sized, batch_seconds, overwrite, failures)
        failed = {failure.source for failure in failures}
        seconds = [size.seconds for job, size in sized if job.source not in failed]
        speed = sum(seconds) / (time.perf_counter() - start)
        print(f"{len(seconds)} done: {sum(seconds):.0f} s of audio, {speed:.1f} times real time", file=sys.stderr)
    if failures:
        lines = [f"{len(failures)} failed:", *(f"  {source}: {reason}" for source, reason in failures)]
        print("\n".join(lines), file=sys.stderr)
    return failures


@torch.inference_mode()
def _run_batches(
    task: Task, sized: list[tuple[Job, Size]], batch_seconds: float, overwrite: bool, failures: list[Failure]
) -> None:
    total = sum(size.seconds for _, size in sized)
    layout = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}, {rate_noinv_fmt}]"
    with ThreadPoolExecutor() as pool, tqdm(total=total, unit=" s", bar_format=layout, disable=None) as bar:
        for batch in in_batches(sized, batch_seconds):
            _run_batch(task, [job for job, _ in batch], overwrite, failures, pool)
            bar.update(sum(size.seconds for _, size in batch))


def _run_batch(
    task: Task, jobs: list[Job], overwrite: bool, failures: list[Failure], pool: ThreadPoolExecutor
) -> None:
    def read(job: Job) -> Clip | None:
        with _blamed(failures, [job]):
            return task.read(job.source)

    clips = {job: clip for job, clip in zip(jobs, pool.map(read, jobs), strict=True) if clip is not None}
    outputs: list[list[Tensor]] = []
    with _blamed(failures, list(clips)):
        outputs = task.run(list(clips.values())) if clips else []
    for (job, clip), contents in zip(clips.items(), outputs, strict=False):  # none if the batch has failed
        with _blamed(failures, [job]):
            for target, content in zip(job.targets, contents, strict=True):
                if overwrite or not target.exists():
                    with atomic(target) as part:
                        task.write(part, content, clip)


@contextmanager
def _blamed(failures: list[Failure], jobs: list[Job]) -> Generator[None]:
    """What a broken file raises in this block becomes a failure of these jobs, and ends nothing else."""
    try:
        yield
    except FAILURES as error:
        own = getattr(error, "error_string", None) or getattr(error, "strerror", None)  # libsndfile's, the system's
        failures += [Failure(job.source, own or str(error) or type(error).__name__) for job in jobs]
