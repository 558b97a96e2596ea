"""
What `mimi export` writes, in onnxruntime, beside the model itself: whole clips, and live frames.

    python tests/benchmarks/exported.py                      # the bundled checkpoint, about 2 minutes
    python tests/benchmarks/exported.py random --threads 2   # the full size, with random weights, about 5 minutes

Quality is not measured here: `mimi export` prints how many codes are equal. Medians; what is compared takes turns. Run
it on a quiet machine.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

import onnxruntime
import torch
import transformers
from codecs_under_test import NUM_QUANTIZERS, Codec, ours, random_model, real_speech
from cpu import frame_times, table, take_turns

from modeling_mimi import MimiModel
from modeling_mimi.export import SUFFIXES, export
from modeling_mimi.export_check import open_onnx
from modeling_mimi.export_graphs import graphs_of

SMALL = Path(__file__).parents[2] / "checkpoints" / "mimi_small"
SECONDS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default=str(SMALL), help="a checkpoint, or `random` (default: the bundled one)"
    )
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="of whole clips (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the measurements as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}"
    print(f"{Path(arguments.model).name}, {arguments.threads} threads, {versions}")
    with tempfile.TemporaryDirectory(prefix="mimi-benchmark-") as folder:
        checkpoint = arguments.model
        if checkpoint == "random":
            checkpoint = str(Path(folder, "random"))
            with torch.inference_mode():
                random_model(NUM_QUANTIZERS).save_pretrained(checkpoint)
        half = MimiModel.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
        model = MimiModel.from_pretrained(checkpoint).eval()
        codecs = [ours(model, "PyTorch fp32"), ours(half, "PyTorch bf16")]
        output = Path(folder, "exported")
        export(model, output, "model", NUM_QUANTIZERS, dtypes=SUFFIXES)
        codecs += [exported(model, output / "onnx", dtype) for dtype in SUFFIXES]
        with torch.inference_mode():
            results = measure(codecs, arguments.repeats)
    if arguments.output:
        arguments.output.write_text(json.dumps({"versions": versions, **results}, indent=2))


def exported(model: MimiModel, folder: Path, dtype: str) -> Codec:
    """The four graphs of one dtype."""
    graphs = {graph.name: graph for graph in graphs_of(model, NUM_QUANTIZERS, half=dtype == "fp16")}
    run = {name: open_onnx(folder / f"{name}{SUFFIXES[dtype]}.onnx", graph) for name, graph in graphs.items()}

    def new_stream():
        states = {half: graphs[f"{half}_step"].state for half in ("encoder", "decoder")}

        def step(frame):
            codes, states["encoder"] = run["encoder_step"](frame, states["encoder"])
            audio, states["decoder"] = run["decoder_step"](codes, states["decoder"])
            return codes, audio

        return step

    return Codec(
        f"onnxruntime {dtype}",
        lambda audio: run["encoder_model"](audio, {})[0],
        lambda codes: run["decoder_model"](codes, {})[0],
        new_stream,
    )


def measure(codecs: list[Codec], repeats: int) -> dict:
    audio = real_speech(SECONDS)
    codes = codecs[0].encode(audio)
    encode = take_turns({codec.name: lambda c=codec: c.encode(audio) for codec in codecs}, repeats)
    decode = take_turns({codec.name: lambda c=codec: c.decode(codes) for codec in codecs}, repeats)
    live = frame_times(codecs)
    table(
        [
            f"{SECONDS} s clip and live 80 ms frames",
            "encode, x real time",
            "decode, x real time",
            "p50, ms",
            "p99, ms",
        ],
        [
            [
                name,
                f"{SECONDS / encode[name]:.0f}",
                f"{SECONDS / decode[name]:.0f}",
                f"{live[name]['p50_ms']:.1f}",
                f"{live[name]['p99_ms']:.1f}",
            ]
            for name in encode
        ],
    )
    return {"seconds": SECONDS, "encode_s": encode, "decode_s": decode, "frames": live}


if __name__ == "__main__":
    main()
