"""ABX phone discriminability of features, as a module of evaluate.

`T` frames of `D` features, `N` and `M` tokens.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow

from .audio_metric import ArrowMetric, Scale, as_array, check_numbers, mean, to_arrow

TIE = 1e-6
"""Distances closer than this are equal: rounding must not decide between them."""
ITEM = {
    "onset_s": datasets.Value("float64"),
    "offset_s": datasets.Value("float64"),
    "label": datasets.Value("string"),
    "speaker": datasets.Value("string"),
}


class Cell(NamedTuple):
    """The error of all triples of one kind: A and B by one speaker, X by the same or another."""

    a: str
    b: str
    speaker: str
    x_speaker: str
    error: float


class Abx(ArrowMetric):
    """ABX: how often features tell one phone from another.

    A and X are tokens of one phone, B is one of another, in any context. An error is a triple where X is nearer to B
    than to A, half an error where both are equally near. A and B come from one speaker; X from the same for
    `abx_within`, from another for `abx_across`. Errors are averaged over the tokens, then the speakers, then the
    ordered pairs of phones: 0 is perfect, 0.5 is chance. Tokens are compared by dynamic time warping over the angle
    between frames, per step of the path. A token's frames are those whose middle lies in it, or the one around its
    own middle if there are none. Features of clips that were encoded whole know their context.

    An own implementation in NumPy: the package fastabx needs Python 3.12.
    """

    scales = {  # noqa: RUF012
        "abx_within": Scale("share", (0, 1), False),
        "abx_across": Scale("share", (0, 1), False),
    }
    inputs = """    predictions: features of shape (T, D), one per clip.
    references: the clip's phones, one list per clip of
        {"onset_s": 0.1, "offset_s": 0.2, "label": "a", "speaker": "p"}.
    frame_rate: of the features, in Hz.
    distance: "angular", the angle over pi, or "cosine", one minus the cosine. Default "angular".
    max_per_group: tokens of one phone by one speaker, chosen at random where there are more. Default 10; None for all.
    seed: of that choice. Default 0."""
    citation_text = (
        "Schatz et al. (2013): Evaluating speech features with the minimal-pair ABX task; Dunbar et al. (2021)"
    )
    columns = {  # noqa: RUF012
        "predictions": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
        "references": [ITEM],
    }

    def check(self, *, predictions: Any, references: Any) -> dict[str, pyarrow.Array]:
        """See the base."""
        features = [as_array(f"predictions[{index}]", clip) for index, clip in enumerate(predictions)]
        check_numbers(features, references)
        if not features:
            raise ValueError("predictions is empty: pass at least one clip")
        for index, clip in enumerate(features):
            if clip.ndim != 2 or not clip.size:
                raise ValueError(
                    f"predictions[{index}] has shape {clip.shape}: pass features (T, D), one row per frame"
                )
            if clip.shape[1] != features[0].shape[1]:
                raise ValueError(f"predictions[{index}] has {clip.shape[1]} features, others {features[0].shape[1]}")
            if not np.isfinite(clip).all():
                raise ValueError(f"predictions[{index}] holds NaN or infinity: leave the clip out")
        for index, items in enumerate(references):
            for number, item in enumerate(items):
                name = f"references[{index}][{number}]"
                if missing := ITEM.keys() - item.keys():
                    raise ValueError(f"{name} has no {sorted(missing)[0]}: pass {list(ITEM)}")
                if not 0 <= item["onset_s"] < item["offset_s"]:
                    raise ValueError(f"{name} lasts from {item['onset_s']} to {item['offset_s']} s: mend or drop it")
        items = pyarrow.array([list(items) for items in references], _item_type())
        return {"predictions": to_arrow([clip.astype(np.float32) for clip in features]), "references": items}

    def _compute(
        self,
        *,
        predictions: Any = None,
        references: Any = None,
        **options: Any,
    ) -> dict[str, Any]:
        return _abx(list(predictions), list(references), **{**self.options, **options})


def _item_type() -> pyarrow.DataType:
    return datasets.Features({"items": [ITEM]}).arrow_schema.field("items").type


def _abx(
    predictions: Sequence[Any],
    references: Sequence[Any],
    frame_rate: float | None = None,
    distance: Literal["angular", "cosine"] = "angular",
    max_per_group: int | None = 10,
    seed: int = 0,
) -> dict[str, Any]:
    if frame_rate is None or not frame_rate > 0:
        raise ValueError(f"frame_rate={frame_rate}: pass the features' frames per second, such as 12.5")
    if distance not in ("angular", "cosine"):
        raise ValueError(f"distance={distance!r}: pass 'angular' or 'cosine'")
    groups = _tokens(predictions, references, frame_rate)
    rng = np.random.default_rng(seed)
    by_speaker: dict[str, list[tuple[str, np.ndarray]]] = defaultdict(list)
    for (label, speaker), tokens in sorted(groups.items()):
        if max_per_group is not None and len(tokens) > max_per_group:
            tokens = [tokens[index] for index in sorted(rng.choice(len(tokens), max_per_group, replace=False))]
        by_speaker[speaker] += [(label, token) for token in tokens]
    within, across = [], []
    for x_speaker, xs in by_speaker.items():
        for speaker, others in by_speaker.items():
            distances = token_distances([token for _, token in xs], [token for _, token in others], distance)
            labels = np.array([label for label, _ in xs]), np.array([label for label, _ in others])
            for a, b, error in _errors(distances, *labels, same=speaker == x_speaker):
                (within if speaker == x_speaker else across).append(Cell(a, b, speaker, x_speaker, error))
    return {
        "abx_within": _average(within),
        "abx_across": _average(across),
        "per_speaker": {
            speaker: {
                "abx_within": _average([cell for cell in within if cell.x_speaker == speaker]),
                "abx_across": _average([cell for cell in across if cell.x_speaker == speaker]),
            }
            for speaker in by_speaker
        },
        "per_clip": {},
        "failed": [],
    }


def _tokens(
    predictions: Sequence[Any], references: Sequence[Any], frame_rate: float
) -> dict[tuple[str, str], list[np.ndarray]]:
    """The frames (T, D) of every token, scaled to length 1, by label and speaker."""
    groups = defaultdict(list)
    for index, (clip, items) in enumerate(zip(predictions, references, strict=True)):
        frames = np.stack(list(clip)).astype(np.float64)
        frames /= np.maximum(np.linalg.norm(frames, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        for number, item in enumerate(items):
            onset, offset = float(item["onset_s"]) * frame_rate, float(item["offset_s"]) * frame_rate
            start, end = math.ceil(onset - 0.5), math.ceil(offset - 0.5)
            if start >= end:
                start = math.floor((onset + offset) / 2)
                end = start + 1
            if end > len(frames):
                raise ValueError(
                    f"references[{index}][{number}] ends at {item['offset_s']} s, beyond the {len(frames)} frames of "
                    f"predictions[{index}] at {frame_rate} Hz: check frame_rate, or drop the item"
                )
            groups[str(item["label"]), str(item["speaker"])].append(frames[start:end])
    return groups


def token_distances(xs: Sequence[np.ndarray], ys: Sequence[np.ndarray], distance: str = "angular") -> np.ndarray:
    """Distances (N, M) between tokens of frames (T, D) of length 1, all pairs of the same two lengths at a time."""
    distances = np.empty((len(xs), len(ys)))
    for rows in _by_length(xs):
        for columns in _by_length(ys):
            x, y = np.stack([xs[row] for row in rows]), np.stack([ys[column] for column in columns])
            cosine = np.clip(np.einsum("ntd,msd->tsnm", x, y, optimize=True), -1, 1)
            local = 1 - cosine if distance == "cosine" else np.arccos(cosine) / np.pi
            distances[np.ix_(rows, columns)] = _warp(local)
    return distances


def _by_length(tokens: Sequence[np.ndarray]) -> list[list[int]]:
    groups = defaultdict(list)
    for index, token in enumerate(tokens):
        groups[len(token)].append(index)
    return list(groups.values())


def _warp(local: np.ndarray) -> np.ndarray:
    """Distances of frames (T, S, N, M) to those of the tokens (N, M): the best path's sum over its number of steps.

    A path goes from both firsts to both lasts, ahead by one frame in either token or in both; where several are best,
    that which goes ahead in both.
    """
    rows, columns, *shape = local.shape
    total = np.full((columns + 1, *shape), np.inf)  # of the row above; the first column is outside
    steps = np.zeros_like(total)
    total[0] = 0
    for row in range(rows):
        above, above_steps = total, steps
        total, steps = np.full_like(above, np.inf), np.zeros_like(above)
        for column in range(columns):
            best, length = above[column], above_steps[column]
            for other, other_length in ((above[column + 1], above_steps[column + 1]), (total[column], steps[column])):
                length = np.where(other < best, other_length, length)
                best = np.minimum(other, best)
            total[column + 1] = best + local[row, column]
            steps[column + 1] = length + 1
    return total[columns] / steps[columns]


def _errors(
    distances: np.ndarray, labels: np.ndarray, other_labels: np.ndarray, same: bool
) -> Iterable[tuple[str, str, float]]:
    """The phones a, b and the error of every cell, from the distances (N, M) of X and of A and B."""
    names, columns = np.unique(other_labels, return_inverse=True)
    numbers = np.bincount(columns)
    for a in np.unique(labels):
        xs, targets = np.flatnonzero(labels == a), np.flatnonzero(other_labels == a)
        pairs = np.array([(x, target) for x in xs for target in targets if not (same and x == target)])
        if not len(pairs):
            continue
        difference = distances[pairs[:, 0], pairs[:, 1], None] - distances[pairs[:, 0]]  # (pairs, M)
        wrong = ((difference > TIE) + 0.5 * (np.abs(difference) <= TIE)).mean(0)
        for b, error in zip(names, np.bincount(columns, wrong) / numbers, strict=True):
            if b != a:
                yield str(a), str(b), float(error)


def _average(cells: Sequence[Cell]) -> float:
    """Over the speakers of each ordered pair of phones, then over the pairs."""
    pairs = defaultdict(list)
    for cell in cells:
        pairs[cell.a, cell.b].append(cell.error)
    return mean([mean(errors) for errors in pairs.values()])
