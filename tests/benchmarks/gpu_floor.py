"""
The floor of each part of the model: what the measured bandwidth and the measured matrix peak allow.

Operations and bytes are counted from shapes, on tensors without values. A layer (a convolution with its activation, an
attention, an MLP) reads its weights and its input once and writes its output once; attention counts only the steps
that it may see. `B` clips, `T` frames.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from codecs_under_test import FRAME, NUM_QUANTIZERS
from gpu_bench import DTYPES, Bench, Graph, precision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from modeling_mimi import MimiConfig, MimiModel
from modeling_mimi.modeling_convolution import MimiConv1d, MimiConvTranspose1d
from modeling_mimi.modeling_transformer import MimiAttention, MimiMLP

LAYERS = (MimiConv1d, MimiConvTranspose1d, MimiAttention, MimiMLP)
ENCODE: dict[str, Callable[[MimiModel, Tensor], Tensor]] = {
    "SEANet encoder": lambda model, x: model.get_submodule("encoder")(x),
    "encoder transformer": lambda model, x: model.get_submodule("encoder_transformer")(x).last_hidden_state,
    "downsampling": lambda model, x: model.get_submodule("downsample")(x),
    "codebook search": lambda model, x: model.quantizer.encode(x, model.quantizer.search_tables(NUM_QUANTIZERS)),
}
DECODE: dict[str, Callable[[MimiModel, Tensor], Tensor]] = {
    "codebook look-up": lambda model, x: model.quantizer.decode(x).to(model.dtype),
    "upsampling": lambda model, x: model.get_submodule("upsample")(x),
    "decoder transformer": lambda model, x: model.get_submodule("decoder_transformer")(x).last_hidden_state,
    "SEANet decoder": lambda model, x: model.get_submodule("decoder")(x),
}


@dataclass(frozen=True)
class Cost:
    """What a clip needs at least: operations (a product and a sum are two), bytes of weights and of activations."""

    operations: float
    weights: float
    activations: float
    precision: str

    def bytes(self, clips: int) -> float:
        """Bytes that a batch moves: the weights once."""
        return self.weights + clips * self.activations

    def floor_s(self, bench: Bench, clips: int) -> float:
        """Seconds of a batch, if nothing but the slower of the two took time."""
        return max(clips * self.operations / bench.peak(self.precision), self.bytes(clips) / bench.bandwidth)


@dataclass(frozen=True)
class PartCost:
    """A part, layer by layer, and as if it kept everything between its input and its output on the chip."""

    layers: list[Cost]
    whole: Cost

    def floor_s(self, bench: Bench, clips: int) -> float:
        """Seconds of a batch, one layer after another."""
        return sum(layer.floor_s(bench, clips) for layer in self.layers)


def visible(steps: int, window: int) -> int:
    """Pairs of steps of which one sees the other, in a clip of so many steps."""
    return sum(min(step + 1, window) for step in range(steps))


@cache
def part_costs(bench: Bench, name: str, frames: int) -> dict[str, PartCost]:
    """`count` of the model that is measured."""
    return count(bench.config, name, frames)


def count(config: MimiConfig, name: str, frames: int) -> dict[str, PartCost]:
    """Costs of a clip in all parts of both directions; the quantizer is in float32 whatever the precision."""
    with torch.device("meta"):
        model = MimiModel(config).to(DTYPES[name]).eval()
        audio = torch.empty(1, frames * FRAME, config.audio_channels, dtype=DTYPES[name])
        codes = torch.empty(1, NUM_QUANTIZERS, frames, dtype=torch.int64)
    costs = {}
    for parts, x in ((ENCODE, audio), (DECODE, codes)):
        for part, call in parts.items():
            inner = "fp32" if "codebook" in part and name != "tf32" else name
            costs[part], x = _counted(partial(call, model), x, model, inner)
    return costs


def _counted(call: Callable[[Tensor], Tensor], x: Tensor, model: MimiModel, name: str) -> tuple[PartCost, Tensor]:
    layers: list[Cost] = []
    started: list[int] = []

    def before(*_):
        started.append(counter.get_total_flops())

    def after(layer: nn.Module, inputs: tuple, output: Tensor | tuple):
        operations = counter.get_total_flops() - started.pop()
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [tensor for tensor in (*inputs, *outputs) if isinstance(tensor, Tensor)]
        if isinstance(layer, MimiAttention):
            operations = _attention_operations(layer, tensors[0].shape[1])
        weights = sum(weight.nbytes for weight in layer.parameters())
        layers.append(Cost(operations, weights, sum(tensor.nbytes for tensor in tensors), name))

    hooks = []
    for layer in (module for module in model.modules() if isinstance(module, LAYERS)):
        hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    with FlopCounterMode(display=False) as counter:
        y = call(x)
    for hook in hooks:
        hook.remove()
    operations, weights = (sum(getattr(layer, key) for layer in layers) for key in ("operations", "weights"))
    if not layers:  # the quantizer: its products and its tables
        operations = counter.get_total_flops()
        weights = sum(tensor.nbytes for tensor in chain(model.quantizer.parameters(), model.quantizer.buffers()))
    whole = Cost(operations, weights, x.nbytes + y.nbytes, name)
    return PartCost(layers or [whole], whole), y


def _attention_operations(layer: MimiAttention, steps: int) -> int:
    projections = sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)
    seen = visible(steps, layer.config.sliding_window) * layer.num_heads * layer.head_dim
    return 2 * (steps * projections + 2 * seen)  # of each pair a score, and its share of the sum


def direction_floor_s(bench: Bench, direction: str, name: str, clips: int, seconds: float) -> float:
    """The floor of the whole encoder or decoder, layer by layer."""
    costs = part_costs(bench, name, bench.config.num_frames(round(seconds * 24_000)))
    return sum(costs[part].floor_s(bench, clips) for part in (ENCODE if direction == "encode" else DECODE))


@cache
def _state_bytes(bench: Bench, name: str) -> int:
    """The states of one stream."""
    model = bench.model(name)
    states = model.new_encoder_state(1, 1).tensors | model.new_decoder_state(1, 1).tensors
    return sum(state.nbytes for state in states.values())


def step_floor_s(bench: Bench, name: str, streams: int) -> float:
    """One live frame of each stream there and back: every weight and every state is read once."""
    config, costs = bench.config, [cost.whole for cost in part_costs(bench, name, 1).values()]
    seen = config.latent_stride * config.sliding_window  # a stream that runs has a full window
    attention = 2 * config.num_hidden_layers * 4 * seen * config.num_attention_heads * config.head_dim
    compute_s = sum(cost.operations / bench.peak(cost.precision) for cost in costs) + attention / bench.peak(name)
    moved = sum(cost.bytes(streams) for cost in costs) + streams * _state_bytes(bench, name)
    return max(streams * compute_s, moved / bench.bandwidth)


def floor(bench: Bench) -> dict:
    """The machine, and how far from the floor each part is."""
    peaks = {name: bench.peak(name) for name in bench.precisions}
    bench.table(
        ["measured", "memory, GB/s", *(f"{name}, TFLOP/s" for name in peaks)],
        [["copy and product", f"{bench.bandwidth / 1e9:.0f}", *(f"{peak / 1e12:.1f}" for peak in peaks.values())]],
    )
    clips, seconds = (2, 1) if bench.tiny else (16, 20)
    columns = ["floor, ms", "floor on chip, ms", "eager, ms", "CUDA graph, ms", "of the floor, %"]
    results = {}
    for name in dict.fromkeys((bench.half, "fp32")):
        rows = part_times(bench, name, clips, seconds)
        results[name] = {row.pop("part"): row for row in rows}
        bench.table(
            [f"{clips} clips of {seconds} s, {name}", "GFLOP", "MB layer by layer", *columns],
            [[part, *_cells(row)] for part, row in results[name].items()],
        )
    return {"bandwidth": bench.bandwidth, "peaks": peaks, "clips": clips, "seconds": seconds, "parts": results}


def _cells(row: dict[str, float]) -> list[str]:
    def ms(key: str) -> str:
        return f"{1000 * row[key]:.3f}" if key in row else "-"

    counts = [f"{row['operations'] / 1e9:.1f}", f"{row['bytes'] / 1e6:.1f}", ms("floor_s"), ms("on_chip_floor_s")]
    best = min((row[key] for key in ("eager_s", "graph_s") if key in row), default=None)
    return [*counts, ms("eager_s"), ms("graph_s"), f"{100 * row['floor_s'] / best:.0f}" if best else "-"]


def part_times(bench: Bench, name: str, clips: int, seconds: float) -> list[dict]:
    """Each part and each direction: counted, its floor, and measured on what the part before it gives."""
    costs = part_costs(bench, name, bench.config.num_frames(round(seconds * 24_000)))
    model, rows = bench.model(name), []
    audio = bench.audio(clips, seconds).transpose(1, 2).to(DTYPES[name]).contiguous()
    for direction, parts, x in (("encode", ENCODE, audio), ("decode", DECODE, bench.codes(clips, seconds))):
        chosen = []
        for part, call in parts.items():
            cost = costs[part]
            row: dict[str, Any] = {"part": part}
            row["operations"] = clips * cost.whole.operations
            row["bytes"] = sum(layer.bytes(clips) for layer in cost.layers)
            row["floor_s"], row["on_chip_floor_s"] = cost.floor_s(bench, clips), cost.whole.floor_s(bench, clips)
            task = partial(call, model, x)
            with precision(name):
                x = task()
                if not bench.is_over(f"{part}, {name}"):
                    with bench.attempt(f"{part}, {name}"):
                        row["eager_s"] = bench.seconds(task, limit_s=0.3)
                        row["graph_s"] = bench.seconds(Graph(task, bench.device), limit_s=0.3)
            chosen.append(row)
        keys = [key for key in chosen[0] if key != "part" and all(key in row for row in chosen)]
        rows += [*chosen, {"part": f"all of {direction}", **{key: sum(row[key] for row in chosen) for key in keys}}]
    return rows
