"""Metrics of speech codecs as modules of Hugging Face's evaluate, one folder each, and how to read their scores.

Each folder is complete: `evaluate.load("training/metrics/si_sdr")` reads it in place, and uploaded as it is
(`huggingface_hub.upload_folder`, which follows its links) it is a Space that `evaluate.load("you/si_sdr")` reads.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

METRICS: dict[str, Path] = {
    name: Path(__file__).parent / name
    for name in (
        *("si_sdr", "mel_distance", "stft_distance", "stoi", "pesq", "visqol", "distillmos", "dnsmos", "wer"),
        *("speaker_similarity", "abx", "codebook_usage"),
    )
}
"""Name to folder."""


class Score(NamedTuple):
    """How to get a score, and how to read it."""

    metric: str
    """The one of `METRICS` whose `compute` gives it."""
    unit: str
    """Empty where it has none."""
    range: tuple[float, float]
    higher_is_better: bool | None
    """None where neither end is better."""
    sampling_rate: int | None
    """Hz at which waves go in; None where any goes, or none do."""
    needs_reference: bool
    """Takes `references`: the original clips, for `wer` their texts, for `abx` their phones."""


SCORES: dict[str, Score] = {
    "si_sdr": Score("si_sdr", "dB", (-100, 100), True, None, True),
    "mel_distance": Score("mel_distance", "log10", (0, math.inf), False, 24_000, True),
    "stft_distance": Score("stft_distance", "", (0, math.inf), False, 24_000, True),
    "spectral_convergence": Score("stft_distance", "", (0, math.inf), False, 24_000, True),
    "log_magnitude": Score("stft_distance", "ln", (0, math.inf), False, 24_000, True),
    "stoi": Score("stoi", "", (-1, 1), True, None, True),
    "estoi": Score("stoi", "", (-1, 1), True, None, True),
    "pesq_wb": Score("pesq", "MOS-LQO", (1, 4.65), True, 16_000, True),
    "pesq_nb": Score("pesq", "MOS-LQO", (1, 4.55), True, 8_000, True),
    "visqol": Score("visqol", "MOS-LQO", (1, 5), True, 16_000, True),
    "distillmos": Score("distillmos", "MOS", (1, 5), True, 16_000, False),
    "dnsmos_overall": Score("dnsmos", "MOS", (1, 5), True, 16_000, False),
    "dnsmos_speech": Score("dnsmos", "MOS", (1, 5), True, 16_000, False),
    "dnsmos_background": Score("dnsmos", "MOS", (1, 5), True, 16_000, False),
    "dnsmos_p808": Score("dnsmos", "MOS", (1, 5), True, 16_000, False),
    "wer": Score("wer", "share", (0, math.inf), False, 16_000, True),
    "cer": Score("wer", "share", (0, math.inf), False, 16_000, True),
    "wer_corpus": Score("wer", "share", (0, math.inf), False, 16_000, True),
    "cer_corpus": Score("wer", "share", (0, math.inf), False, 16_000, True),
    "speaker_similarity": Score("speaker_similarity", "cosine", (0, 1), True, 16_000, True),
    "abx_within": Score("abx", "share", (0, 1), False, None, True),
    "abx_across": Score("abx", "share", (0, 1), False, None, True),
    "usage": Score("codebook_usage", "share", (0, 1), True, None, False),
    "perplexity": Score("codebook_usage", "entries", (1, math.inf), True, None, False),
    "entropy": Score("codebook_usage", "bit", (0, math.inf), True, None, False),
    "entropy_bitrate": Score("codebook_usage", "bit/s", (0, math.inf), None, None, False),
    "nominal_bitrate": Score("codebook_usage", "bit/s", (0, math.inf), None, None, False),
}


def load(name: str, **options: Any) -> Any:
    """The metric of that name, ready for `compute`.

    What it is given to score stays in memory, not in evaluate's cache on disk, unless several processes share it.

    Args:
        name: One of `METRICS`.
        options: For `evaluate.load`; any other is a default of the metric's `compute`, such as `sampling_rate`.

    Raises:
        ValueError: There is no such metric.
    """
    import evaluate

    if name not in METRICS:
        raise ValueError(f"no metric {name!r}: there are {', '.join(METRICS)}")
    options.setdefault("keep_in_memory", options.get("num_process", 1) == 1)
    return evaluate.load(str(METRICS[name]), module_type="metric", **options)
