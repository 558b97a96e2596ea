"""Codecs side by side: in time with their input, as long as it, at the rate they claim, alike in any company."""

import ctypes
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import TINY, assert_same_codes, lacking, speech
from pystoi import stoi

from modeling_mimi import MimiConfig, MimiModel
from training.evaluation.codec_interface import RATE, Codec, Coded, to_clip
from training.evaluation.codecs import SPECS, parse_codec, reconstruct_each
from training.evaluation.codecs_classical import CODEC2_DELAYS
from training.evaluation.codecs_neural import CodebookCodec
from training.evaluation.libspeex import LibSpeex

ROOT = Path(__file__).parent.parent
SMALL = str(ROOT.parent / "checkpoints" / "mimi_small")
WAVEFORM = ["original", "opus:6", "opus:16", "speex:3.95", "speex:8", "speex-wb:9.8"]
VOCODERS = ["speex:2.15", *(f"codec2:{mode}" for mode in CODEC2_DELAYS)]
MS = RATE // 1000


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    files = sorted((ROOT / "data").glob("*.flac"))
    assert len(files) == 3
    return [soundfile.read(file, dtype="float32")[0] for file in files]


@pytest.fixture(scope="module")
def coded(clips):
    """Get what a classical codec makes of the clips, once for all tests, or skip where its library is missing."""
    known: dict[str, tuple[Codec, list[Coded]]] = {}

    def get(spec: str) -> tuple[Codec, list[Coded]]:
        if spec not in known:
            codec = installed(spec)
            known[spec] = codec, codec.reconstruct(clips)
        return known[spec]

    return get


def installed(spec: str) -> Codec:
    try:
        (codec,) = parse_codec(spec)
    except FileNotFoundError as error:  # libspeex is the system's, not pip's
        lacking(str(error))
    return codec


def lag(audio: np.ndarray, other: np.ndarray) -> int:
    """By how many samples the other wave comes later, where both resemble each other most within 50 ms."""
    size = 2 * len(audio)
    correlation = np.fft.irfft(np.fft.rfft(other, size) * np.fft.rfft(audio, size).conj(), size)
    reach = 50 * MS
    return int(np.argmax(np.concatenate([correlation[-reach:], correlation[: reach + 1]]))) - reach


def intelligibility(clips: list[np.ndarray], outputs: list[Coded], shift: int = 0) -> float:
    """Mean STOI with the outputs moved `shift` samples later."""
    pairs = zip(clips, outputs, strict=True)
    return float(np.mean([stoi(clip, np.roll(output.audio, shift), RATE) for clip, output in pairs]))


# ---- classical codecs on real speech


@pytest.mark.parametrize("spec", WAVEFORM + VOCODERS)
def test_output_is_a_clip_like_the_input(spec, coded, clips):
    codec, outputs = coded(spec)
    assert codec.name.split()[0] == spec.partition(":")[0].partition("-")[0]
    for clip, output in zip(clips, outputs, strict=True):
        assert output.audio.shape == clip.shape
        assert output.audio.dtype == np.float32
        assert np.abs(output.audio).max() <= 1
        assert 0.3 < np.square(output.audio).sum() / np.square(clip).sum() < 2.5
        assert isinstance(output.bits, int)
        assert output.codes is None


@pytest.mark.parametrize("spec", WAVEFORM)
def test_waveform_codecs_are_in_time(spec, coded, clips):
    _, outputs = coded(spec)
    for clip, output in zip(clips, outputs, strict=True):
        assert abs(lag(clip, output.audio)) <= MS


@pytest.mark.parametrize("spec", VOCODERS[1:])  # the lowest rate of Speex has the delay of the others
def test_vocoders_are_in_time(spec, coded, clips):
    """Their waves look like nothing, but STOI is a parabola of the delay: its vertex, from 5 ms to either side."""
    _, outputs = coded(spec)
    before, now, after = (intelligibility(clips, outputs, shift) for shift in (-5 * MS, 0, 5 * MS))
    assert now > max(before, after)
    vertex_ms = 5 * 0.5 * (before - after) / (before - 2 * now + after)
    assert abs(vertex_ms) < 2


def test_delays_of_speex():
    """What its manual says: 10 ms in narrowband, 13.94 ms in wideband."""
    try:
        library = LibSpeex()
    except FileNotFoundError as error:
        lacking(str(error))
    for wideband, delay, frame_size in ((False, 80, 160), (True, 223, 320)):
        with library.session(wideband, 4) as session:
            assert (session.delay, session.frame_size) == (delay, frame_size)


@pytest.mark.parametrize("spec", WAVEFORM + VOCODERS)
def test_bits_are_those_of_the_rate(spec, coded, clips):
    codec, outputs = coded(spec)
    within = 0.1 if spec.startswith("opus") else 0.03  # a variable rate; frames that the end of a clip does not fill
    for clip, output in zip(clips, outputs, strict=True):
        assert output.bits == pytest.approx(codec.bitrate * len(clip) / RATE, rel=within)


@pytest.mark.parametrize(
    "specs", [("opus:6", "opus:16", "original"), ("codec2:700", "codec2:3200", "original"), ("speex:2.15", "speex:8")]
)
def test_more_bits_are_understood_better(specs, coded, clips):
    scores = [intelligibility(clips, coded(spec)[1]) for spec in specs]
    assert scores == sorted(scores)
    assert scores[0] + 0.02 < scores[-1]


def test_the_original_is_the_clip(coded, clips):
    codec, outputs = coded("original")
    assert codec.bitrate == 384_000
    for clip, output in zip(clips, outputs, strict=True):
        np.testing.assert_array_equal(output.audio, clip)


@pytest.mark.parametrize("spec", ["original", "opus:6", "speex:4", "speex-wb:9.8"])
def test_no_clip_leaves_traces(spec, coded, clips):
    codec, outputs = coded(spec)
    again = codec.reconstruct(clips[::-1])[::-1]
    for first, second in zip(outputs, again, strict=True):
        np.testing.assert_array_equal(first.audio, second.audio)
        assert first.bits == second.bits


@pytest.mark.parametrize("mode", [3200, 700])
def test_codec2_draws_phases_and_nothing_else(mode, coded, clips):
    codec, outputs = coded(f"codec2:{mode}")
    again = codec.reconstruct(clips[::-1])[::-1]
    assert [output.bits for output in again] == [output.bits for output in outputs]
    assert intelligibility(clips, again) == pytest.approx(intelligibility(clips, outputs), abs=0.01)


@pytest.mark.parametrize("spec", ["original", "opus:6", "speex:4", "speex-wb:9.8", "codec2:1300", "codec2:700"])
def test_clips_may_be_tiny_silent_or_loud(spec):
    codec = installed(spec)
    square = np.where(np.arange(4801) // 60 % 2, 1, -1).astype(np.float32)
    odd = [np.full(1, 0.5, np.float32), np.zeros(1000, np.float32), square, square[:479].astype(np.float64)]
    for clip, output in zip(odd, codec.reconstruct(odd), strict=True):
        assert output.audio.shape == clip.shape
        assert output.audio.dtype == np.float32
        assert np.abs(output.audio).max() <= 1
        assert output.bits > 0
    assert codec.reconstruct([]) == []


# ---- Mimi


@pytest.fixture
def tiny(tiny_model, tmp_path) -> str:
    tiny_model.save_pretrained(tmp_path / "tiny" / "model")
    return str(tmp_path / "tiny" / "model")


@torch.inference_mode()
def directly(model: MimiModel, clip: np.ndarray, num_quantizers: int) -> tuple[np.ndarray, np.ndarray]:
    codes = model.encode(torch.from_numpy(clip)[None, None], num_quantizers=num_quantizers).audio_codes
    audio = model.decode(codes).audio_values[0, 0, : len(clip)]
    return codes[0].numpy(), audio.clamp(-1, 1).numpy()


def test_mimi_is_the_model_at_each_number_of_codebooks(clips):
    model, levels, clip = MimiModel.from_pretrained(SMALL).eval(), [1, 2, 4, 8], clips[0][:30_000]
    codecs = parse_codec(SMALL, num_quantizers=levels)
    names = [f"mimi_small, {label}" for label in ("1 codebook", "2 codebooks", "4 codebooks", "8 codebooks")]
    assert [codec.name for codec in codecs] == names
    assert [codec.bitrate for codec in codecs] == [137.5, 275, 550, 1100]
    each = list(reconstruct_each(codecs, [clip]))
    assert [codec for codec, _ in each] == codecs
    for level, (codec, (output,)) in zip(levels, each, strict=True):
        codes, audio = directly(model, clip, level)
        for one in (output, codec.reconstruct([clip])[0]):
            np.testing.assert_array_equal(one.codes, codes)
            np.testing.assert_allclose(one.audio, audio, atol=1e-5)
            assert one.bits == 16 * level * 11  # 1.25 s are 15.6 frames
    audios = [outputs[0].audio for _, outputs in each]
    assert all(np.abs(a - b).max() > 1e-4 for a, b in pairwise(audios))


def test_a_network_encodes_a_batch_once(tiny, clips, monkeypatch):
    codecs = [*parse_codec(tiny, num_quantizers=[2, 4, 1]), *parse_codec("original"), *parse_codec(tiny)]
    calls = []
    networks = {codec.network: None for codec in codecs if isinstance(codec, CodebookCodec)}
    for number, network in enumerate(networks):
        encode = network.model.encode
        monkeypatch.setattr(
            network.model, "encode", lambda *a, f=encode, n=number, **k: calls.append((n, k)) or f(*a, **k)
        )
    outputs = [outputs for _, outputs in reconstruct_each(codecs, [clip[:5000] for clip in clips])]
    assert calls == [(0, {"num_quantizers": 4}), (1, {"num_quantizers": 4})]
    assert [len(codes[0].codes) if codes[0].codes is not None else None for codes in outputs] == [2, 4, 1, None, 4]
    np.testing.assert_array_equal(outputs[1][0].codes, outputs[4][0].codes)
    assert codecs[0].name == "tiny, 2 codebooks"


@pytest.mark.parametrize("kind", ["", "stock:"])
def test_a_batch_is_its_clips(kind, tiny, tiny_model, clips):
    (codec,) = parse_codec(kind + tiny)
    mixed = [clips[0][20_000:23_000], clips[1][20_000:20_001], clips[2][20_000:24_801], clips[0][30_000:31_001]]
    for clip, output in zip(mixed, codec.reconstruct(mixed), strict=True):
        (alone,) = codec.reconstruct([clip])
        assert_equal(tiny_model, clip, output, alone)
        frame_size = tiny_model.config.frame_size
        assert alone.bits == output.bits == math.ceil(len(clip) / frame_size) * 4 * 6
        np.testing.assert_allclose(codec.reconstruct_from([output.codes], [clip])[0].audio, output.audio, atol=1e-5)


def test_stock_is_ours(tiny, tiny_model, clips):
    (ours,), (stock,) = parse_codec(tiny, num_quantizers=[3]), parse_codec(f"stock:{tiny}", num_quantizers=[3])
    assert type(stock.network.model) is transformers.MimiModel
    assert type(ours.network.model) is MimiModel
    assert (stock.name, stock.bitrate) == (f"stock {ours.name}", ours.bitrate)
    clip = clips[0][20_000:32_345]
    (our_output,), (stock_output,) = ours.reconstruct([clip]), stock.reconstruct([clip])
    assert_equal(tiny_model, clip, our_output, stock_output)
    np.testing.assert_allclose(
        stock.reconstruct_from([our_output.codes], [clip])[0].audio, our_output.audio, atol=1e-4
    )


def assert_equal(model: MimiModel, clip: np.ndarray, one: Coded, other: Coded) -> None:
    """Equal codes but for near-ties, and for equal codes the same audio."""
    with torch.inference_mode():
        latents = model.encode(torch.from_numpy(clip)[None, None], output_latents=True).latents
        codes = [torch.from_numpy(output.codes)[None] for output in (one, other)]
        if not assert_same_codes(model, latents, *codes):
            np.testing.assert_allclose(one.audio, other.audio, atol=1e-4)


def test_in_half_precision(tiny, clips):
    (codec,) = parse_codec(tiny, dtype=torch.bfloat16)
    (output,) = codec.reconstruct([clips[0][:5000]])
    assert codec.network.model.dtype == torch.bfloat16
    assert output.audio.dtype == np.float32


# ---- EnCodec and DAC, tiny and with random weights


@pytest.fixture
def encodec(tmp_path) -> str:
    torch.manual_seed(0)
    config = transformers.EncodecConfig(
        num_filters=4, hidden_size=16, codebook_size=64, upsampling_ratios=[4, 4], target_bandwidths=[9.0, 36.0]
    )
    model = transformers.EncodecModel(config)
    with torch.no_grad():
        latents = model.encoder(speech(4800))[0].T  # (T, D)
    for layer in model.quantizer.layers:  # entries spread like what they are to quantize
        layer.codebook.embed.copy_(latents.mean(0) + latents.std(0) * torch.randn(64, 16))
        latents = latents - latents.mean(0)
    model.save_pretrained(tmp_path / "encodec")
    return str(tmp_path / "encodec")


@pytest.fixture
def dac(tmp_path) -> str:
    torch.manual_seed(0)
    config = transformers.DacConfig(
        encoder_hidden_size=8, decoder_hidden_size=32, downsampling_ratios=[2, 5], n_codebooks=4, codebook_size=64
    )
    assert config.sampling_rate == 16_000
    transformers.DacModel(config).save_pretrained(tmp_path / "dac")
    return str(tmp_path / "dac")


def test_encodec_is_the_model_at_each_bandwidth(encodec, clips):
    model = transformers.EncodecModel.from_pretrained(encodec).eval()
    codecs = parse_codec(f"encodec:{encodec}@9,36")
    assert [(codec.name, codec.bitrate) for codec in codecs] == [
        ("encodec, 9 kbit/s", 9000.0),
        ("encodec, 36 kbit/s", 36_000.0),
    ]
    parts = [clip[20_000:22_001] for clip in clips] + [clips[0][:7]]
    for codec, outputs in reconstruct_each(codecs, parts):
        for part, output in zip(parts, outputs, strict=True):
            padded = torch.from_numpy(np.pad(part, (0, -len(part) % 16)))[None, None]
            with torch.inference_mode():
                theirs = model.encode(padded, bandwidth=codec.bitrate / 1000)
                audio = model.decode(theirs.audio_codes, theirs.audio_scales).audio_values
            np.testing.assert_array_equal(output.codes, theirs.audio_codes[0, 0])
            np.testing.assert_allclose(output.audio, audio[0, 0, : len(part)], atol=1e-5)
            assert output.bits == codec.num_quantizers * math.ceil(len(part) / 16) * 6
    assert len(np.unique(outputs[0].codes)) > 10


def test_dac_is_the_model_at_its_own_rate(dac, clips):
    model = transformers.DacModel.from_pretrained(dac).eval()
    codecs = parse_codec(f"dac:{dac}@1,4")
    assert [(codec.name, codec.sampling_rate, codec.bitrate) for codec in codecs] == [
        ("dac, 1 codebook", 16_000, 9600.0),
        ("dac, 4 codebooks", 16_000, 38_400.0),
    ]
    tone = np.sin(2 * np.pi * 440 / RATE * np.arange(4803)).astype(np.float32)
    at_16_khz = np.sin(2 * np.pi * 440 / 16_000 * np.arange(3210)).astype(np.float32)
    for codec, (output, _) in reconstruct_each(codecs, [tone, clips[0][:1000]]):
        with torch.inference_mode():
            theirs = model.encode(torch.from_numpy(at_16_khz)[None, None], n_quantizers=codec.num_quantizers)
        same = output.codes[:, 20:300] == theirs.audio_codes[0, :, 20:300].numpy()  # edges are resampled otherwise
        assert same.mean() > 0.95
        assert output.audio.shape == tone.shape
        assert output.bits == codec.num_quantizers * 321 * 6


# ---- what there is not


@pytest.mark.parametrize(
    "spec",
    ["", "mp3:64", "opus", "opus:", "opus:six", "stock:", "codec2:12.5", "original:1", "dac:some/dac", "encodec"],
)
def test_what_is_not_understood_is_answered_with_what_is(spec):
    with pytest.raises(ValueError, match="is not a codec") as raised:
        parse_codec(spec)
    assert all(form in str(raised.value) for form in SPECS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("codec2:450", "no mode of 450 bit/s: it has 3200, 2400, 1600, 1400, 1300, 1200, 700"),
        ("speex:5", "speex has no rate of 5 kbit/s: it has 2.15, 3.95, 5.95"),
        ("speex-wb:2.15", "speex wideband has no rate of 2.15 kbit/s: it has 3.95, 5.75"),
        ("opus:4", "6 to 256 kbit/s, not 4"),
        ("opus:nan", "6 to 256 kbit/s, not nan"),
        (f"encodec:{SMALL}@1.5", "checkpoint of 'mimi', not of 'encodec'"),
        (f"dac:{SMALL}@1", "checkpoint of 'mimi', not of 'dac'"),
    ],
)
def test_modes_that_do_not_exist(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_codec(spec)


def test_settings_that_a_network_does_not_have(tiny, encodec, dac):
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=f"tiny has 1 to 4 codebooks, not {wrong}"):
            parse_codec(tiny, num_quantizers=[1, wrong])
        with pytest.raises(ValueError, match=f"dac has 1 to 4 codebooks, not {wrong}"):
            parse_codec(f"dac:{dac}@{wrong}")
    with pytest.raises(ValueError, match="bandwidths of 9, 36 kbit/s, not 6"):
        parse_codec(f"encodec:{encodec}@6")
    for other in (dac, f"stock:{dac}"):
        with pytest.raises(ValueError, match="checkpoint of 'dac', not of 'mimi'"):
            parse_codec(other)


def test_checkpoints_that_are_none(tmp_path, tiny):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        parse_codec(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="is no directory, and the Hub does not give it"):
        parse_codec("stock:nobody/nothing at all")
    MimiModel.from_pretrained(tiny, decoder_config=None).save_pretrained(tmp_path / "half")
    MimiModel(MimiConfig(**TINY, audio_channels=2)).save_pretrained(tmp_path / "stereo")
    for kind in ("", "stock:"):
        with pytest.raises(ValueError, match="holds half of a Mimi"):
            parse_codec(f"{kind}{tmp_path}/half")
        with pytest.raises(ValueError, match="codes 2 channels"):
            parse_codec(f"{kind}{tmp_path}/stereo")


@pytest.mark.parametrize(("spec", "package"), [("opus:6", "av"), ("codec2:1300", "pycodec2")])
def test_missing_packages_are_named(spec, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        parse_codec(spec)


def test_a_missing_library_is_named(monkeypatch):
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(FileNotFoundError, match="apt-get install libspeex1"):
        parse_codec("speex:4")


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (np.zeros((1, 100), np.float32), r"clip 1 must have shape .* \(1, 100\)"),
        (np.zeros(0, np.float32), "clip 1 must have shape"),
        (np.zeros(100, np.int16), "clip 1 must be floats .* int16"),
        (np.array([0, np.nan], np.float32), "clip 1 has samples that are not finite"),
    ],
)
def test_what_is_no_clip(clip, message, tiny):
    for codec in parse_codec("original") + parse_codec(tiny):
        with pytest.raises(ValueError, match=message):
            codec.reconstruct([np.zeros(100, np.float32), clip])


def test_what_is_not_finite_is_not_passed_on():
    with pytest.raises(RuntimeError, match="broken gave samples that are not finite"):
        to_clip(np.array([0.0, np.inf]), RATE, 2, "broken")
