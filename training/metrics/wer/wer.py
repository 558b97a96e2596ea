"""Word and character error rate of what a recogniser hears, as a module of evaluate."""

import re
from collections.abc import Callable
from functools import cache
from os import PathLike
from typing import Any

import datasets
import numpy as np
import pyarrow
import torch
from transformers import (
    MODEL_FOR_CTC_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
)
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from .audio_metric import WAVES, AudioMetric, Scale, as_waves, check_numbers, require, to_arrow

Recogniser = Callable[[np.ndarray, int], str]
NORMALIZERS = {"basic": BasicTextNormalizer(), "english": EnglishTextNormalizer({})}
COUNTS = ("word_errors", "words", "character_errors", "characters")


class Wer(AudioMetric):
    """Word and character error rate of the text that a speech recogniser hears in waves: are they intelligible?

    Errors are substitutions, deletions and insertions (jiwer's count), over the transcript's words or its characters,
    spaces among them. `wer` and `cer` are means over clips; `wer_corpus` and `cer_corpus` divide all errors by all
    words or characters: papers report these. Texts are compared in lower case, without punctuation and bracketed
    remarks, spaces made single (Whisper's basic normalisation); with "english", also with English contractions
    spelled out and numbers in digits. A recogniser makes errors on the original clips too: score those beside.
    """

    scales = dict.fromkeys(("wer", "cer", "wer_corpus", "cer_corpus"), Scale("share", (0, float("inf")), False))
    inputs = """    predictions: waves, 1-D arrays or lists of floats in [-1, 1], one per clip.
    references: what is said in them, one text per clip.
    sampling_rate: of all waves, in Hz: 16000.
    model: a recogniser: the Hub id or the directory of a model that transformers loads for automatic speech
        recognition, by CTC or from sequence to sequence; or a function from a wave and its sampling rate to a text.
    language: the language of a multilingual Whisper, such as "nl". Without, it guesses, clip by clip.
    normalizer: "basic", "english", or a function from text to text.
    generate: arguments for the model's `generate`. Default {"num_beams": 1, "do_sample": False}, where it has one.
    device: of the model. Default "cpu"."""
    citation_text = (
        "Radford et al. (2022): Robust Speech Recognition via Large-Scale Weak Supervision, arXiv:2212.04356"
    )
    columns = {"predictions": WAVES, "references": datasets.Value("string")}  # noqa: RUF012
    rates = (16_000,)

    def check(self, *, predictions: Any, references: Any = None) -> dict[str, pyarrow.Array]:
        """See the base; `references` are texts."""
        waves, texts = as_waves("predictions", predictions), list(references)
        check_numbers(waves, texts)
        for index, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"references[{index}] is {text!r}: pass what the clip says, or leave the clip out")
        return {"predictions": to_arrow(waves), "references": pyarrow.array(texts, pyarrow.string())}

    def score(
        self,
        prediction: np.ndarray,
        reference: str,
        sampling_rate: int,
        model: str | PathLike | Recogniser | None = None,
        language: str | None = None,
        normalizer: str | Callable[[str], str] = "basic",
        generate: dict[str, Any] | None = None,
        device: str = "cpu",
    ) -> dict[str, Any]:
        """See the class."""
        jiwer = require("jiwer", "pip install 'jiwer>=4,<5'")
        if model is None:
            raise ValueError("model is missing: pass a Hub id or a directory of a recogniser, or a function")
        if isinstance(normalizer, str) and normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer={normalizer!r}: pass one of {list(NORMALIZERS)}, or a function")
        normalize: Any = NORMALIZERS[normalizer] if isinstance(normalizer, str) else normalizer
        said = normalize(str(reference)).strip()
        if not said:
            raise ValueError(f"nothing is left of the reference {reference!r} once normalised: leave the clip out")
        if isinstance(model, str | PathLike):
            text = _transcribe(str(model), device, prediction, language, generate)
        else:
            text = model(prediction, sampling_rate)
        heard = normalize(text).strip()
        counts = {}
        for unit, measured in (
            ("word", jiwer.process_words(said, heard)),
            ("character", jiwer.process_characters(said, heard)),
        ):
            kept = measured.hits + measured.substitutions + measured.deletions
            counts[f"{unit}_errors"] = measured.substitutions + measured.deletions + measured.insertions
            counts[f"{unit}s"] = kept
        return {
            "wer": counts["word_errors"] / counts["words"],
            "cer": counts["character_errors"] / counts["characters"],
            **counts,
            "text": heard,
        }

    def _compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> dict[str, Any]:
        result = AudioMetric._compute(self, predictions=predictions, references=references, **options)
        errors, words, character_errors, characters = (sum(result["per_clip"][name]) for name in COUNTS)
        return {"wer_corpus": errors / words, "cer_corpus": character_errors / characters, **result}


def _transcribe(model: str, device: str, wave: np.ndarray, language: str | None, generate: dict | None) -> str:
    extractor, tokenizer, network = _recogniser(model, device)
    longer = len(wave) > getattr(extractor, "n_samples", len(wave))  # than Whisper's window of 30 s
    padding = {"padding": "longest", "truncation": False} if longer else {}
    given = extractor(
        wave, sampling_rate=extractor.sampling_rate, return_tensors="pt", return_attention_mask=True, **padding
    ).to(device)
    with torch.inference_mode():
        if not network.can_generate():
            return tokenizer.decode(network(**given).logits[0].argmax(-1))
        options = generate or {"num_beams": 1, "do_sample": False}
        if language is not None:
            options = {**options, "language": language, "task": "transcribe"}
        if longer:
            options = {**options, "return_timestamps": True}
        text = tokenizer.decode(network.generate(**given, **options)[0], skip_special_tokens=True)
    return re.sub(r"<\|[^|]*\|>", "", text)  # timestamps, which not every tokenizer calls special


@cache
def _recogniser(model: str, device: str) -> tuple[Any, Any, Any]:
    """Feature extractor, tokenizer and network."""
    ctc = type(AutoConfig.from_pretrained(model)) in MODEL_FOR_CTC_MAPPING
    network = (AutoModelForCTC if ctc else AutoModelForSpeechSeq2Seq).from_pretrained(model, dtype=torch.float32)
    tools = AutoFeatureExtractor.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    return *tools, network.eval().to(device)
