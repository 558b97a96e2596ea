"""What the metrics of this folder share: how they take waves, refuse what cannot be scored, and give their results.

Each metric's folder holds a link to this file, so that a folder uploaded as a Space, or read by `evaluate.load`, is
complete in itself. `L` samples.
"""

import importlib
import inspect
import math
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import datasets
import evaluate
import numpy as np
import pyarrow

WAVES = datasets.Sequence(datasets.Value("float32"))
MIN_RATE = 8000
LARGEST_SAMPLE = 32.0
"""A decoder may overshoot 1 a little; a wave beyond this holds integers, or no speech at all."""


class Scale(NamedTuple):
    """How to read a score."""

    unit: str
    """Empty where it has none."""
    range: tuple[float, float]
    higher_is_better: bool | None
    """None where neither end is better."""

    def __str__(self) -> str:
        low, high = ("no bound" if math.isinf(end) else f"{end:g}" for end in self.range)
        direction = {True: "higher is better", False: "lower is better", None: "neither end is better"}
        return f"{low} to {high}{' ' * bool(self.unit)}{self.unit}, {direction[self.higher_is_better]}"


class ArrowMetric(evaluate.Metric, ABC):
    """An evaluate metric that takes arrays fast, and at loading the options of `compute` that stay the same.

    A subclass's docstring is its description.
    """

    scales: ClassVar[dict[str, Scale]]
    inputs: ClassVar[str]
    """What predictions, references and the options of `compute` are."""
    citation_text: ClassVar[str]
    columns: ClassVar[dict[str, Any]]
    """The features of what is compared, in datasets' terms."""

    def __init__(self, **kwargs: Any):
        """What `evaluate.load` passes on; anything that evaluate does not know becomes a default of `compute`."""
        known = inspect.signature(evaluate.EvaluationModule.__init__).parameters
        self.options = {name: value for name, value in kwargs.items() if name not in known}
        super().__init__(**{name: value for name, value in kwargs.items() if name in known})

    def _info(self) -> evaluate.MetricInfo:
        scores = "".join(f"\n- `{name}`: {scale}" for name, scale in self.scales.items())
        info = evaluate.MetricInfo(
            description=f"{inspect.getdoc(type(self))}\n\nScores:{scores}\n",
            citation=self.citation_text,
            inputs_description=f"\nArgs:\n{self.inputs}\n",
            features=datasets.Features(self.columns),
        )
        info.format = "numpy"  # set here: the constructor refuses it for all but numbers, which lists make very slow
        return info

    @abstractmethod
    def check(self, *args: Any, **columns: Any) -> dict[str, pyarrow.Array]:
        """The columns as Arrow arrays of one length; raises ValueError that names the clip that cannot be scored."""

    @abstractmethod
    def _compute(self, *args: Any, **kwargs: Any) -> dict[str, Any]: ...

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add clips to what the next `compute` will score.

        Args:
            predictions: What is scored, one entry per clip.
            references: What it is compared with, where the metric compares.
            kwargs: Nothing else is taken.
        """
        given = {"predictions": predictions, "references": references, **kwargs}
        if unknown := [name for name, value in given.items() if name not in self.columns and value is not None]:
            raise ValueError(f"this metric takes {list(self.columns)}, not {unknown}")
        if missing := [name for name in self.columns if given.get(name) is None]:
            raise ValueError(f"no {missing[0]}: pass one entry per clip")
        columns = self.check(**{name: given[name] for name in self.columns})
        if self.writer is None:
            self.selected_feature_format = self.features
            self._init_writer()
        writer: Any = self.writer
        writer.write_table(pyarrow.table(columns))  # as a table: evaluate's own way visits every sample

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one clip to what the next `compute` will score.

        Args:
            prediction: What is scored.
            reference: What it is compared with, where the metric compares.
            kwargs: Nothing else is taken.
        """
        references = None if reference is None else [reference]
        self.add_batch(predictions=[prediction], references=references, **kwargs)

    def _finalize(self) -> None:
        if self.writer is None:
            raise ValueError("nothing to score: pass predictions, or add clips before")
        evaluate.Metric._finalize(self)


class AudioMetric(ArrowMetric):
    """A metric that scores one wave after another, and gives means over the clips where the score is defined."""

    inputs = """    predictions: waves, 1-D arrays or lists of floats in [-1, 1], one per clip.
    references: the clips that they should sound like, sample for sample of the same length.
    sampling_rate: of all waves, in Hz."""
    citation_text = ""
    columns = {"predictions": WAVES, "references": WAVES}  # noqa: RUF012
    rates: ClassVar[tuple[int, ...]] = ()
    """The sampling rates in Hz at which the metric is defined; any from 8000 up where empty."""

    @abstractmethod
    def score(self, *args: Any, **options: Any) -> dict[str, Any]:
        """What goes into `per_clip` for one clip, the scores among it; NaN where a score is undefined.

        Called with prediction, reference (None where the metric has none), sampling rate and the metric's options.
        """

    def check(self, *, predictions: Any, references: Any = None) -> dict[str, pyarrow.Array]:
        """See the base; `references` are waves."""
        waves = as_waves("predictions", predictions)
        if "references" not in self.columns:
            return {"predictions": to_arrow(waves)}
        targets = as_waves("references", references)
        check_numbers(waves, targets)
        for index, (wave, target) in enumerate(zip(waves, targets, strict=True)):
            if len(wave) != len(target):
                raise ValueError(
                    f"predictions[{index}] has {len(wave)} samples and references[{index}] has {len(target)}: "
                    "align them and cut both to one length"
                )
        return {"predictions": to_arrow(waves), "references": to_arrow(targets)}

    def check_rate(self, sampling_rate: int | None) -> int:
        """Raises ValueError that tells which rates can be scored."""
        takes = f"takes waves at {' or '.join(map(str, self.rates)) or f'{MIN_RATE} or more'} Hz"
        if sampling_rate is None:
            raise ValueError(f"sampling_rate is missing: {self.name} {takes}; pass sampling_rate=...")
        if sampling_rate not in self.rates if self.rates else sampling_rate < MIN_RATE:
            raise ValueError(f"sampling_rate={sampling_rate}: {self.name} {takes}; resample the waves first")
        return int(sampling_rate)

    def _compute(
        self,
        *,
        predictions: Any = None,
        references: Any = None,
        sampling_rate: int | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        options = {**self.options, **options}
        rate = self.check_rate(sampling_rate if sampling_rate is not None else options.pop("sampling_rate", None))
        options.pop("sampling_rate", None)
        predictions = list(predictions)
        targets = [None] * len(predictions) if references is None else list(references)
        clips = [self.score(wave, target, rate, **options) for wave, target in zip(predictions, targets, strict=True)]
        return summary(clips, list(self.scales))


def summary(clips: Sequence[dict[str, Any]], scores: Sequence[str]) -> dict[str, Any]:
    """Each score's mean over the clips where it is defined; all of `per_clip`; the clips that `failed` in a score."""
    columns = {name: [clip[name] for clip in clips] for name in clips[0]}
    given = [name for name in scores if name in columns]
    failed = [index for index, clip in enumerate(clips) if any(math.isnan(clip[name]) for name in given)]
    means = {name: mean([value for value in columns[name] if not math.isnan(value)]) for name in given}
    return {**means, "per_clip": columns, "failed": failed}


def mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def as_waves(name: str, clips: Any) -> list[np.ndarray]:
    """Waves (L,), float32; raises ValueError that names the first that is none."""
    waves = [_as_wave(f"{name}[{index}]", clip) for index, clip in enumerate(clips)]
    if not waves:
        raise ValueError(f"{name} is empty: pass at least one clip")
    return waves


def _as_wave(name: str, clip: Any) -> np.ndarray:
    wave = as_array(name, clip)
    if wave.ndim == 0:
        raise ValueError(f"{name} is a single number: pass a list of waves, not one wave")
    if wave.ndim != 1:
        raise ValueError(f"{name} has shape {wave.shape}: pass one channel of one clip, a 1-D wave")
    if not wave.size:
        raise ValueError(f"{name} has no samples: leave the clip out")
    wave = wave.astype(np.float32, copy=False)
    if bad := int((~np.isfinite(wave)).sum()):
        raise ValueError(f"{name} has {bad} samples that are NaN or infinite: leave the clip out, or see where from")
    if (peak := float(np.abs(wave).max())) > LARGEST_SAMPLE:
        raise ValueError(f"{name} has a peak of {peak:g}: scale samples to [-1, 1], 16-bit ones by 1 / 32768")
    return wave


def as_array(name: str, values: Any) -> np.ndarray:
    """Numbers as an array; raises ValueError if they are none."""
    try:
        array = np.asarray(values)
        array = array if array.dtype.kind in "biuf" else array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is no array of numbers: pass a NumPy array or a list ({error})") from None
    return array


def check_numbers(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """Raises ValueError if there are more of the ones than of the others."""
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references: pass one reference per prediction"
        )


def to_arrow(arrays: Sequence[np.ndarray]) -> pyarrow.Array:
    """Arrays of 1 or 2 dimensions as nested lists, without a visit to every number."""
    values = pyarrow.array(np.concatenate([array.reshape(-1) for array in arrays]))
    for axis in range(1, arrays[0].ndim):
        widths = np.concatenate([np.full(array.shape[0], array.shape[axis]) for array in arrays])
        values = _lists(values, widths)
    return _lists(values, [array.shape[0] for array in arrays])


def _lists(values: pyarrow.Array, lengths: Any) -> pyarrow.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), values)


def is_silent(wave: np.ndarray) -> bool:
    """Nothing but a constant."""
    return bool(wave.min() == wave.max())


def require(name: str, install: str) -> Any:
    """Import a package that only this metric needs.

    Past warnings of its own house, such as deprecations inside it; and past the metric itself, where a Space puts the
    folder of a metric that is called like its package first.

    Raises:
        ImportError: It is not installed; says how to.
    """
    with _without_metrics(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "pkg_resources is deprecated")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"this metric needs a package that is missing ({error}): {install}") from error


@contextmanager
def _without_metrics() -> Generator[None, None, None]:
    path = sys.path[:]
    sys.path[:] = [entry for entry in path if not Path(entry, Path(__file__).name).is_file()]
    try:
        yield
    finally:
        sys.path[:] = path


def quietly(function: Callable[..., Any], *messages: str) -> Callable[..., Any]:
    """The function, with warnings that begin like any of these not shown."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            for message in messages:
                warnings.filterwarnings("ignore", message)
            return function(*args, **kwargs)

    return call
