"""The small checkpoint in the repository: small, loadable everywhere, and more than noise."""

import json
from pathlib import Path

import soundfile
import torch
import transformers

from hub_cards.card import model_card
from modeling_mimi import MimiFeatureExtractor, MimiModel
from training.config import ObjectiveConfig
from training.evaluation.report import table
from training.spectral import MelDistance

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "mimi_small"


def clips() -> list[torch.Tensor]:
    return [
        torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in (ROOT / "tests" / "data").glob("*.flac")
    ]


def test_it_is_small_and_has_mimis_tokens():
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*")) < 25e6
    config = MimiModel.from_pretrained(CHECKPOINT).config
    assert (config.sampling_rate, config.frame_rate) == (24_000, 12.5)
    assert (config.num_quantizers, config.codebook_size) == (8, 2048)
    assert MimiFeatureExtractor.from_pretrained(CHECKPOINT).sampling_rate == 24_000


def test_every_figure_of_its_card_was_measured():
    """The card is what its files give now, and its tables are those that the evaluations' results give."""
    card = (CHECKPOINT / "README.md").read_text()
    assert card == str(model_card(CHECKPOINT)), (
        "render it: python -m hub_cards card checkpoints/mimi_small -o checkpoints/mimi_small/README.md"
    )
    for name in ("quality", "recognition"):
        results = json.loads((CHECKPOINT / "evaluation" / name / "results.json").read_text())
        assert table(results) in card
        assert results["data"]["fingerprint"] in card


def test_stock_gives_equal_codes():
    stock, report = transformers.MimiModel.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours = MimiModel.from_pretrained(CHECKPOINT).eval()
    with torch.no_grad():
        for clip in clips():
            whole = clip[: len(clip) // 1920 * 1920][None, None]  # stock pads a partial frame otherwise, on purpose
            assert torch.equal(ours.encode(whole).audio_codes, stock.eval().encode(whole).audio_codes)


def test_each_half_of_its_codebooks_helps():
    """Nearer to the speech than silence is, and nearer with all codebooks than with one."""
    settings = ObjectiveConfig()
    mel = MelDistance(24_000, settings.mel_windows, settings.mel_bins)
    model = MimiModel.from_pretrained(CHECKPOINT).eval()
    totals = dict.fromkeys(["silence", 1, 8], 0.0)
    with torch.no_grad():
        for clip in clips():
            totals["silence"] += float(mel(clip[None], torch.zeros_like(clip)[None]))
            for number in (1, 8):
                speech = model(clip[None, None], num_quantizers=number).audio_values[:, 0]
                totals[number] += float(mel(clip[None], speech))
    assert totals[8] < totals[1] < totals["silence"]
