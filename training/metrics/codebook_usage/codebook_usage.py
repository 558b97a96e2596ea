"""How a codec uses its codebooks, and the bits that takes, as a module of evaluate.

`K` codebooks of `N` entries, `T` frames.
"""

import math
from typing import Any

import datasets
import numpy as np
import pyarrow

from .audio_metric import ArrowMetric, Scale, as_array, to_arrow


class CodebookUsage(ArrowMetric):
    """How much of its codebooks a codec uses on the clips given, all of them counted together.

    Of each codebook: `usage` is the share of its entries chosen at least once; `entropy` that of its choices, in bits;
    `perplexity` two to the power of it, as if so many entries were chosen equally often. Scores are means over the
    codebooks, `per_level` has each. `nominal_bitrate` is what codes cost sent as they are; `entropy_bitrate` what they
    would cost with an ideal entropy coder that knows each codebook's frequencies, and nothing about neighbours. Few
    frames cannot use many entries, and make entropies too small: ten frames per entry by 0.07 bit.
    """

    scales = {  # noqa: RUF012
        "usage": Scale("share", (0, 1), True),
        "perplexity": Scale("entries", (1, math.inf), True),
        "entropy": Scale("bit", (0, math.inf), True),
        "entropy_bitrate": Scale("bit/s", (0, math.inf), None),
        "nominal_bitrate": Scale("bit/s", (0, math.inf), None),
    }
    inputs = """    predictions: codes of shape (K, T), integers from 0, one per clip; without padding.
    codebook_size: entries of each codebook.
    frame_rate: of the codes, in Hz."""
    citation_text = "Dhariwal et al. (2020): Jukebox, arXiv:2005.00341, on usage; Shannon (1948) on entropy"
    columns = {"predictions": datasets.Sequence(datasets.Sequence(datasets.Value("int64")))}  # noqa: RUF012

    def check(self, *, predictions: Any) -> dict[str, pyarrow.Array]:
        """See the base."""
        clips = [as_array(f"predictions[{index}]", clip) for index, clip in enumerate(predictions)]
        if not clips:
            raise ValueError("predictions is empty: pass at least one clip")
        for index, clip in enumerate(clips):
            if clip.dtype.kind not in "iu":
                raise ValueError(f"predictions[{index}] holds {clip.dtype}: pass codes as integers")
            if clip.ndim != 2 or not clip.size:
                raise ValueError(f"predictions[{index}] has shape {clip.shape}: pass the codes (K, T) of one clip")
            if len(clip) != len(clips[0]):
                raise ValueError(f"predictions[{index}] has {len(clip)} codebooks, others have {len(clips[0])}")
            if clip.min() < 0:
                raise ValueError(f"predictions[{index}] has the code {clip.min()}: cut padding off")
        return {"predictions": to_arrow([clip.astype(np.int64) for clip in clips])}

    def _compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> dict[str, Any]:
        return _usage([np.stack(list(clip)) for clip in predictions], **{**self.options, **options})


def _usage(
    clips: list[np.ndarray], codebook_size: int | None = None, frame_rate: float | None = None
) -> dict[str, Any]:
    if codebook_size is None or not codebook_size > 0:
        raise ValueError(f"codebook_size={codebook_size}: pass the number of entries, such as 2048")
    if frame_rate is None or not frame_rate > 0:
        raise ValueError(f"frame_rate={frame_rate}: pass the codes' frames per second, such as 12.5")
    for index, clip in enumerate(clips):
        if len(clip) != len(clips[0]):
            raise ValueError(f"predictions[{index}] has {len(clip)} codebooks, others have {len(clips[0])}")
        if clip.max() >= codebook_size:
            raise ValueError(f"predictions[{index}] has the code {clip.max()}, but codebook_size={codebook_size}")
    counts = np.stack(
        [np.bincount(level, minlength=codebook_size) for level in np.concatenate(clips, axis=1)]
    )  # (K, N)
    shares = counts / counts.sum(1, keepdims=True)
    entropy = -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(1) + 0.0  # no -0
    levels = {"usage": (counts > 0).mean(1), "perplexity": 2**entropy, "entropy": entropy}
    return {
        **{name: float(values.mean()) for name, values in levels.items()},
        "entropy_bitrate": float(frame_rate * entropy.sum()),
        "nominal_bitrate": float(frame_rate * len(counts) * math.log2(codebook_size)),
        "per_level": {name: values.tolist() for name, values in levels.items()},
        "per_clip": {},
        "failed": [],
    }
