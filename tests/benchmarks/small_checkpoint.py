"""What a checkpoint does to a corpus: mean scores, and how much of each codebook the corpus uses.

python tests/benchmarks/small_checkpoint.py checkpoints/mimi_small --path CORPUS [--split test] [--clips 400]
"""

import argparse

from modeling_mimi import MimiModel
from training.config import ObjectiveConfig, SourceConfig
from training.data import load_clips
from training.spectral import MelDistance
from training.validation import validate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory or Hub id")
    parser.add_argument("--path", required=True, help="Hub data set, folder of audio, parquet or webdataset files")
    parser.add_argument("--split", default="train")
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=10.0, help="longer clips are cut to this")
    arguments = parser.parse_args()
    model = MimiModel.from_pretrained(arguments.model).eval()
    rate, settings = model.config.sampling_rate, ObjectiveConfig()
    source = SourceConfig(arguments.path, split=arguments.split)
    clips = [tuple(clip) for clip in load_clips([source], rate, arguments.clips, arguments.seconds)]
    mel = MelDistance(rate, settings.mel_windows, settings.mel_bins)
    for number in (1, 2, 4, model.config.num_quantizers):
        result = validate(model, clips, mel, num_quantizers=number, progress=True)
        scores = ", ".join(f"{name} {value:.3f}" for name, value in result.scores.items())
        print(f"{number} codebooks: {scores}")
    frames = int(result.counts[0].sum())
    print(f"{len(clips)} clips, {frames} frames; of a codebook's {model.config.codebook_size} entries are used, %:")
    print(" ".join(f"{100 * share:.0f}" for share in result.codebook_usage))
    print("perplexity:", " ".join(f"{value:.0f}" for value in result.codebook_perplexity))


if __name__ == "__main__":
    main()
