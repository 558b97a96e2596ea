# Copyright 2026 The open Mimi contributors
# SPDX-License-Identifier: Apache-2.0
"""A directory of graphs of a model, for runtimes other than PyTorch, checked against the model and described.

`onnx/*.onnx` beside `config.json` and `preprocessor_config.json` is the layout that transformers.js reads from the
Hub; `torch/*.pt2` are programs of `torch.export`, which ExecuTorch starts from. `export.json` says of each file what
goes in and comes out, and how close to the model it comes.
"""

import json
import logging
import tempfile
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .export_check import Reference, agreement, is_exact, open_onnx, open_torch
from .export_graphs import Graph, graphs_of
from .feature_extraction_mimi import MimiFeatureExtractor
from .modeling_mimi import MimiModel

FORMATS = {"onnx": ("fp32", "fp16", "int8"), "torch": ("fp32", "fp16")}
"""The dtypes that each format comes in."""
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8"}
"""What transformers.js adds to the name of a graph for each dtype."""
ENDINGS = {"onnx": ".onnx", "torch": ".pt2"}
PACKAGES = {"onnx": ("torch", "onnx", "onnxscript", "onnxruntime"), "torch": ("torch",)}
MANIFEST = "export.json"
HOW_TO_STREAM = (
    "A step takes one frame and every input state.NAME, and gives next_state.NAME to feed back with the next frame. "
    "Begin a stream with zeros."
)


class ExportError(Exception):
    """A graph does not do what the model does."""


def export(
    model: MimiModel,
    output: Path,
    name: str,
    num_quantizers: int,
    format: str = "onnx",
    dtypes: Iterable[str] = ("fp32",),
    audio: Tensor | None = None,
) -> dict[str, Any]:
    """
    Write the graphs of a model to a directory. It appears when all is done, and replaces an export that was there.

    Args:
        model: in float32, on the CPU.
        output: the directory.
        name: what the description calls the model.
        num_quantizers: codebooks to use.
        format: a key of `FORMATS`.
        dtypes: which of those that the format comes in.
        audio: speech in [-1, 1] to check the graphs with, (1, C, L); without it nothing is checked.

    Returns:
        What `export.json` says.

    Raises:
        ExportError: a graph in float32 differs from the model by more than rounding; nothing is written then.
    """
    wanted = [dtype for dtype in FORMATS[format] if dtype in set(dtypes)]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch, _quiet():
        folder = Path(scratch, "new")
        (folder / format).mkdir(parents=True)
        description: dict[str, Any] = {
            "format": format,
            "model": name,
            "sampling_rate": model.config.sampling_rate,
            "frame_size": model.config.frame_size,
            "codebook_size": model.config.codebook_size,
            "num_quantizers": num_quantizers,
            "streaming": HOW_TO_STREAM,
            "versions": {package: version(package) for package in ("open-mimi", *PACKAGES[format])},
            "checked_s": None if audio is None else round(audio.shape[-1] / model.config.sampling_rate, 2),
            "files": _write_graphs(model, num_quantizers, format, wanted, folder, audio),
        }
        (folder / MANIFEST).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        if format == "onnx":
            _write_configs(model, num_quantizers, wanted[0], folder)
        if output.exists():
            output.rename(Path(scratch, "old"))
        folder.rename(output)
    return description


def _write_graphs(
    model: MimiModel, num_quantizers: int, format: str, dtypes: list[str], folder: Path, audio: Tensor | None
) -> list[dict[str, Any]]:
    """Write every graph in every dtype, check each, and describe them."""
    reference = None if audio is None else Reference.of(model, audio, num_quantizers)
    halves = sum(half is not None for half in (model.encoder, model.decoder))
    files = []
    with tqdm(total=2 * halves * len(dtypes), desc="export", unit="graph", disable=None) as bar:
        for half in (False, True):
            group = [dtype for dtype in dtypes if (dtype == "fp16") == half]
            for graph in graphs_of(model, num_quantizers, half, any_length=format == "onnx") if group else []:
                for dtype in group:
                    bar.set_postfix_str(f"{graph.name} {dtype}")
                    file = Path(format, f"{graph.name}{SUFFIXES[dtype]}{ENDINGS[format]}")
                    _write(graph, dtype, folder / file)
                    facts = {"file": file.as_posix(), "graph": graph.name, "dtype": dtype, **_describe(graph)}
                    facts["bytes"] = (folder / file).stat().st_size
                    if reference is not None:
                        facts["check"] = _check(graph, dtype, folder / file, reference)
                    files.append(facts)
                    bar.update()
    return sorted(files, key=lambda facts: dtypes.index(facts["dtype"]))


def _write(graph: Graph, dtype: str, path: Path) -> None:
    if path.suffix == ENDINGS["torch"]:
        for node in graph.program.graph.nodes:
            node.meta.pop("stack_trace", None)  # it names the files of this machine
        return torch.export.save(graph.program, path)
    from .export_onnx import write_int8, write_onnx

    if dtype != "int8":
        return write_onnx(graph, path)
    plain = path.with_name(f"{graph.name}{ENDINGS['onnx']}")
    if plain.exists():
        return write_int8(plain, path)
    write_onnx(graph, plain)
    write_int8(plain, path)
    plain.unlink()


def _check(graph: Graph, dtype: str, path: Path, reference: Reference) -> dict[str, Any]:
    run = (open_torch if path.suffix == ENDINGS["torch"] else open_onnx)(path, graph)
    result = agreement(graph, run, reference)
    if dtype == "fp32" and not is_exact(result):
        frames, snr = result.get("frames_wrong"), result.get("snr_db")
        found = f"{frames} frames have other codes" if graph.is_encoder else f"SNR {snr} dB"
        raise ExportError(f"{path.name} differs from the model by more than the rounding of float32 ({found}).")
    return result


def _describe(graph: Graph) -> dict[str, Any]:
    """What goes in and comes out: names, dtypes and shapes, open axes by their names."""
    shape = [graph.axes.get(axis, size) for axis, size in enumerate(graph.example.shape)]
    output = graph.output
    open_axes = {0: "batch_size", 2: "num_frames" if graph.is_encoder else "num_samples"} if graph.axes else {}
    output_shape = [open_axes.get(axis, size) for axis, size in enumerate(output.shape)]
    state = [(tensor.dtype, list(tensor.shape)) for tensor in graph.state.values()]
    facts: dict[str, Any] = {
        key: [
            {"name": name, "dtype": str(dtype).removeprefix("torch."), "shape": shape}
            for name, (dtype, shape) in zip(names, [first, *state], strict=True)
        ]
        for key, names, first in (
            ("inputs", graph.input_names, (graph.example.dtype, shape)),
            ("outputs", graph.output_names, (output.dtype, output_shape)),
        )
    }
    if graph.max_frames:
        facts["frames"] = [2, graph.max_frames]
    return facts


def _write_configs(model: MimiModel, num_quantizers: int, dtype: str, folder: Path) -> None:
    """What transformers.js reads beside the graphs; left alone, it would look for another dtype in a browser."""
    config = model.config
    fields = json.loads(config.to_json_string())
    fields.pop("auto_map", None)  # the code is not there
    fields |= {"num_quantizers": num_quantizers, "transformers.js_config": {"dtype": dtype}}
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    extractor = MimiFeatureExtractor(feature_size=config.audio_channels, sampling_rate=config.sampling_rate)
    extractor.to_json_file(folder / "preprocessor_config.json")


@contextmanager
def _quiet() -> Generator[None]:
    """Without what the exporters have to say about themselves and about packages that are not needed."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
