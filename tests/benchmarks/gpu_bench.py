"""
What the parts of `gpu.py` share: the codecs on the same weights, the device, its clock, its graphs, and the time left.

Everything also runs on a CPU, where a graph is the call itself: so the command can be tried without a GPU.
"""

import gc
import importlib.util
import math
import platform
import signal
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from codecs_under_test import (
    CLIPS,
    NUM_QUANTIZERS,
    Codec,
    moshi,
    ours,
    random_model,
    real_batch,
    save_weights,
    stock,
)
from cpu import table
from torch import Tensor

from modeling_mimi import MimiConfig, MimiModel

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""`fp32` is strict; in `tf32` the products of float32 numbers may round their factors to 10 bits."""
SMALL = CLIPS.parents[1] / "checkpoints" / "mimi_small"
TINY = {
    "hidden_size": 32,
    "num_filters": 4,
    "upsampling_ratios": [48, 20],
    "vector_quantization_hidden_dimension": 16,
    "codebook_size": 64,
    "upsample_groups": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "sliding_window": 10,
}


class OutOfTime(BaseException):
    """The time is over. No `Exception`: the compiler would catch that and take it for its own."""


class Unfaithful(Exception):
    """A recorded graph does not give what the call gives that it recorded: there is nothing to time."""


class Graph:
    """
    A call recorded as a CUDA graph, then replayed without Python; on a CPU the call itself.

    What the call reads must stay where it is; what it returns is overwritten by the next replay. The call runs a few
    times to warm up, so a state that it writes must be reset afterwards.
    """

    def __init__(self, call: Callable[[], Any], device: torch.device):
        self.call = call
        self.graph = self.output = None
        if device.type != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.output = call()
        self.graph = graph

    def __call__(self) -> Any:
        if self.graph is None:
            return self.call()
        self.graph.replay()
        return self.output


@contextmanager
def precision(name: str) -> Generator[None]:
    """Run float32 products strictly, or, for `tf32`, in the fast form of the matrix units."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def at_most(seconds: float) -> Generator[None]:
    """Raise `OutOfTime` in the block when the seconds are over."""

    def stop(*_):
        raise OutOfTime("the part's time was over")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, min(max(seconds, 0.001), 86_400))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that this share of them does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def same_codes(codes: Tensor, expected: Tensor) -> list[float]:
    """The share of equal codes per level, (B, K, T) twice."""
    return (codes.to(expected.device) == expected).double().mean(dim=(0, 2)).tolist()


def snr_db(audio: Tensor, expected: Tensor) -> float:
    """How far below the audio the difference lies, in dB; infinite if there is none."""
    error = (audio.double() - expected.double()).square().sum()
    return 10 * torch.log10(expected.double().square().sum() / error).item()


class Bench:
    """
    Args:
        options: of `gpu.py`.
        folder: where the weights may be written.

    `deadline`, which `gpu.py` sets, is when the present part must end; `notes` say what it left out, and why.
    """

    def __init__(self, options: Any, folder: Path):
        self.device = torch.device(options.device)
        self.is_cuda = self.device.type == "cuda"
        self.tiny = options.tiny
        self.folder = folder
        self.deadline = math.inf
        self.notes: list[str] = []
        self.results: dict[str, Any] = {}
        self.compiled: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {}  # by direction, and for how many clips
        self.precisions = ["fp32", "tf32", "bf16", "fp16"] if self.is_cuda else ["fp32", "bf16"]
        self.half = options.half  # for what is measured in one precision only
        self.kinds = ["stock", "moshi", "ours"]
        model = random_model(NUM_QUANTIZERS, **TINY) if self.tiny else random_model()
        save_weights(model, folder)
        if self.tiny or importlib.util.find_spec("moshi") is None:
            self.kinds.remove("moshi")

    def title(self) -> str:
        """The device and the versions."""
        name = torch.cuda.get_device_name() if self.is_cuda else f"{torch.get_num_threads()} CPU threads"
        moshi = "" if "moshi" in self.kinds else ", without moshi (not installed, or another architecture)"
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        return f"{name}, {versions}, Python {platform.python_version()}{moshi}{', a tiny model' * self.tiny}"

    # ---- codecs and what they get

    def codec(self, kind: str, name: str) -> Codec:
        """An implementation on the same weights. `small` and `stock small` are of the bundled checkpoint."""
        return self._load(kind, DTYPES[name])

    @cache  # noqa: B019 - there is one bench, as long as the process
    def _load(self, kind: str, dtype: torch.dtype) -> Codec:
        device = str(self.device)
        directory = SMALL if kind.endswith("small") else self.folder / "model"
        if kind.startswith("stock"):
            return stock(directory, dtype, kind, device)
        if kind == "moshi":
            return moshi(self.folder / "native.safetensors", dtype, kind, device)
        return ours(MimiModel.from_pretrained(directory, dtype=dtype).eval().to(self.device), kind)

    @property
    def config(self) -> MimiConfig:
        """Of the model that everything but `small` measures."""
        return self.model("fp32").config

    def model(self, name: str) -> MimiModel:
        """Ours in a precision."""
        return cast(MimiModel, self.codec("ours", name).model)

    @lru_cache(maxsize=4)  # noqa: B019
    def audio(self, clips: int, seconds: float) -> Tensor:
        """Real speech on the device, (clips, 1, L)."""
        return real_batch(clips, seconds).to(self.device)

    @lru_cache(maxsize=4)  # noqa: B019
    def codes(self, clips: int, seconds: float, kind: str = "ours") -> Tensor:
        """What ours makes of it in strict float32: the reference of all others."""
        with precision("fp32"):
            parts = [self.codec(kind, "fp32").encode(part) for part in self.audio(clips, seconds).split(8)]
        return torch.cat(parts)

    @lru_cache(maxsize=4)  # noqa: B019
    def decoded(self, clips: int, seconds: float, kind: str = "ours") -> Tensor:
        """The audio of those codes, likewise."""
        with precision("fp32"):
            parts = [self.codec(kind, "fp32").decode(part) for part in self.codes(clips, seconds, kind).split(8)]
        return torch.cat(parts)

    # ---- time

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, task: Callable[[], object], limit_s: float = 0.4) -> float:
        """Median of a call, of 3 to 20 after one to warm up."""
        task()
        self.wait()
        times: list[float] = []
        while len(times) < (1 if self.tiny else 3) or (len(times) < 20 and sum(times) < limit_s * (not self.tiny)):
            start = time.perf_counter()
            task()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    @property
    def left_s(self) -> float:
        """Seconds that the present part still has."""
        return self.deadline - time.monotonic()

    def is_over(self, what: str) -> bool:
        """Whether the part's time is over, in which case that is noted."""
        if self.left_s <= 0:
            self.notes.append(f"{what}: not measured, the part's time was over")
        return self.left_s <= 0

    @contextmanager
    def attempt(self, what: str) -> Generator[None]:
        """What fails, or outlasts its part, is noted with the reason, and the rest goes on."""
        try:
            with at_most(self.left_s):
                yield
        except (OutOfTime, Exception) as error:
            reason = next(iter(str(error).strip().splitlines()), "")
            self.notes.append(f"{what}: {type(error).__name__}: {reason}")
            self.free()

    def free(self) -> None:
        """Give back the memory of what is no longer needed, circles included."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def table(self, header: list[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table and, below it, what was left out."""
        table(header, [list(row) for row in rows])
        for note in self.notes:
            print(f"- {note}")
        self.results.setdefault("notes", []).extend(self.notes)
        self.notes.clear()

    # ---- the machine

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second that a copy reads and writes, the best of several."""
        source = torch.ones(2**30 if self.is_cuda else 2**24, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._best(lambda: target.copy_(source))

    @cache  # noqa: B019
    def peak(self, name: str) -> float:
        """Operations per second of a large square product in this precision, the best of several."""
        size = 8192 if self.is_cuda else 512
        a = torch.randn(size, size, device=self.device).to(DTYPES[name])
        with precision(name):
            return 2 * size**3 / self._best(lambda: a @ a)

    def _best(self, task: Callable[[], object]) -> float:
        return min(self.seconds(task, limit_s=0) for _ in range(4))
