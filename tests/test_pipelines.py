"""The three pipelines: every input gives what the model gives, batches equal their items, repositories carry them."""

import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import assert_same_codes, speech
from datasets import Dataset, IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.pipelines.pt_utils import KeyDataset

from modeling_mimi import (
    MimiAudioToAudioPipeline,
    MimiAudioToCodesPipeline,
    MimiCodesToAudioPipeline,
    MimiFeatureExtractor,
    pipeline_mimi,
    save_pipelines,
)

FRAME, RATE = 48, 24_000
TASKS = {"audio-to-codes", "codes-to-audio", "audio-to-audio"}


@pytest.fixture
def to_codes(tiny_model):
    return MimiAudioToCodesPipeline(tiny_model, device="cpu")


@pytest.fixture
def to_audio(tiny_model):
    return MimiCodesToAudioPipeline(tiny_model, device="cpu")


@pytest.fixture
def there_and_back(tiny_model):
    return MimiAudioToAudioPipeline(tiny_model, device="cpu")


def samples(length: int, seed: int = 0) -> np.ndarray:
    return speech(length, seed=seed)[0, 0].numpy()


def file_of(audio: np.ndarray, rate: int = RATE, subtype: str = "FLOAT") -> bytes:
    """A WAV file of (L,) or (L, C)."""
    file = io.BytesIO()
    soundfile.write(file, audio, rate, subtype, format="WAV")
    return file.getvalue()


@torch.no_grad()
def reference(model, clip: np.ndarray, rate: int = RATE, **kwargs) -> tuple[torch.Tensor, np.ndarray]:
    """What the model itself makes of one clip: codes (K, T) and audio (L,)."""
    inputs = MimiFeatureExtractor()(clip, sampling_rate=rate, return_tensors="pt")
    codes = model.encode(inputs["input_values"], **kwargs).audio_codes
    return codes[0], model.decode(codes).audio_values[0, 0, : inputs["input_values"].shape[-1]].float().numpy()


# ---- what goes in


class Decoder:
    """Like torchcodec's, which `datasets` gives for a decoded item."""

    def __init__(self, audio: np.ndarray, rate: int):
        self.samples = SimpleNamespace(data=torch.from_numpy(audio)[None], sample_rate=rate)

    def get_all_samples(self):
        return self.samples


CLIP = samples(9 * FRAME + 7)
FORMS: dict[str, Any] = {
    "array": CLIP,
    "array of doubles": CLIP.astype(np.float64),
    "channels first": CLIP[None],
    "tensor": torch.from_numpy(CLIP),
    "bytes": file_of(CLIP),
    "bytearray": bytearray(file_of(CLIP)),
    "mapping": {"array": CLIP, "sampling_rate": RATE},
    "raw": {"raw": CLIP.tolist(), "sampling_rate": RATE},
    "decoded item": {"path": "a.wav", "array": CLIP, "sampling_rate": RATE},
    "undecoded item": {"path": "nowhere.wav", "bytes": file_of(CLIP)},
    "decoder": Decoder(CLIP, RATE),
    "formatted item": {"array": torch.from_numpy(CLIP), "sampling_rate": torch.tensor(RATE)},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_clip_gives_the_codes_of_the_model(to_codes, form):
    clip = FORMS[form]
    keys = list(clip) if isinstance(clip, dict) else None
    output = to_codes(clip)
    assert output["audio_codes"].equal(reference(to_codes.model, CLIP)[0])
    assert output["audio_codes"].dtype == torch.int64
    assert (output["frame_rate"], output["sampling_rate"], output["num_samples"]) == (500.0, RATE, len(CLIP))
    assert set(output) == {"audio_codes", "frame_rate", "sampling_rate", "num_samples"}
    assert keys is None or keys == list(clip), "an input belongs to its caller"


def test_paths(to_codes, tmp_path):
    path = tmp_path / "clip.wav"
    path.write_bytes(file_of(CLIP))
    expected = reference(to_codes.model, CLIP)[0]
    for clip in (path, str(path), {"bytes": None, "path": str(path)}):
        assert to_codes(clip)["audio_codes"].equal(expected)


def test_other_rates_and_channels(to_codes):
    left, right = samples(4_410), samples(4_410, seed=1)
    stereo = np.stack((left, right))
    expected = reference(to_codes.model, (left + right) / 2, 44_100)[0]
    assert expected.shape[1] == 50
    for clip in (file_of(stereo.T, 44_100), {"array": stereo, "sampling_rate": 44_100}):
        assert to_codes(clip)["audio_codes"].equal(expected)
    assert to_codes(stereo, sampling_rate=44_100)["audio_codes"].equal(expected)
    assert MimiAudioToCodesPipeline(to_codes.model, sampling_rate=44_100)(stereo)["audio_codes"].equal(expected)
    pcm = (stereo * 32_767).round().astype(np.int16)
    assert to_codes(pcm, sampling_rate=44_100)["audio_codes"].equal(
        to_codes(file_of(pcm.T, 44_100, "PCM_16"))["audio_codes"]
    )


def test_a_bare_array_is_at_the_rate_of_the_model_unless_told(to_codes):
    assert to_codes(CLIP)["num_samples"] == len(CLIP)
    assert to_codes(CLIP, sampling_rate=12_000)["num_samples"] == 2 * len(CLIP)
    assert to_codes([CLIP, {"array": CLIP, "sampling_rate": RATE}])[1]["num_samples"] == len(CLIP)


CODES = torch.arange(4 * 10).view(4, 10) % 64
CODES_FORMS = {
    "tensor": CODES,
    "int32": CODES.int(),
    "one of a batch": [CODES[None]],
    "uint16 array": CODES.numpy().astype(np.uint16),
    "lists": {"audio_codes": CODES.tolist()},
    "mapping": {"audio_codes": CODES[None], "num_samples": 480},
}


@pytest.mark.parametrize("form", CODES_FORMS)
def test_every_form_of_codes_gives_the_audio_of_the_model(to_audio, form):
    with torch.no_grad():
        expected = to_audio.model.decode(CODES[None]).audio_values[0, 0].numpy()
    output = to_audio(CODES_FORMS[form])
    output = output[0] if isinstance(output, list) else output
    assert output["sampling_rate"] == RATE
    assert output["audio"].dtype == np.float32
    np.testing.assert_array_equal(output["audio"], expected)


def test_a_tensor_of_several_codes_is_a_batch(to_audio):
    batch = torch.stack((CODES, CODES.flip(1)))
    for outputs in (to_audio(batch), to_audio(batch.numpy(), batch_size=2), to_audio(list(batch))):
        assert len(outputs) == 2
        for output, codes in zip(outputs, batch, strict=True):
            np.testing.assert_allclose(output["audio"], to_audio(codes)["audio"], atol=1e-6)


# ---- what comes out


@pytest.mark.parametrize("length", [1, FRAME - 1, FRAME, 9 * FRAME + 7])
def test_audio_comes_back_as_long_as_it_was(to_codes, to_audio, there_and_back, length):
    _, expected = reference(to_codes.model, samples(length))
    output = there_and_back(samples(length))
    assert output["audio"].shape == (length,)
    assert output["audio"].dtype == np.float32
    assert output["sampling_rate"] == RATE
    np.testing.assert_array_equal(output["audio"], expected)
    codes = to_codes(samples(length))
    np.testing.assert_array_equal(to_audio(codes)["audio"], expected)
    assert to_audio(codes["audio_codes"])["audio"].shape == (FRAME * -(-length // FRAME),)


def test_fewer_codebooks(to_codes, to_audio, there_and_back):
    codes, expected = reference(to_codes.model, CLIP, num_quantizers=2)
    assert to_codes(CLIP, num_quantizers=2)["audio_codes"].equal(codes)
    np.testing.assert_array_equal(there_and_back(CLIP, num_quantizers=2)["audio"], expected)
    np.testing.assert_array_equal(to_audio(to_codes(CLIP), num_quantizers=2)["audio"], expected)
    few = MimiAudioToCodesPipeline(to_codes.model, num_quantizers=2)
    assert few(CLIP)["audio_codes"].shape[0] == 2
    assert few(CLIP, num_quantizers=3)["audio_codes"].shape[0] == 3


def test_timestamps(to_codes):
    times = to_codes(CLIP, return_timestamps=True)["timestamps"]
    assert times.shape == (10, 2)
    torch.testing.assert_close(times[:, 0], torch.arange(10).double() / 500)
    assert times[1:, 0].equal(times[:-1, 1])
    assert times[-1, 1].item() == pytest.approx(len(CLIP) / RATE)
    always = MimiAudioToCodesPipeline(to_codes.model, return_timestamps=True)
    assert "timestamps" in always(CLIP)
    assert "timestamps" not in always(CLIP, return_timestamps=False)


def test_long_audio_is_taken_in_chunks(to_codes, to_audio, there_and_back, monkeypatch):
    long = samples(300 * FRAME + 5)
    codes, audio = reference(to_codes.model, long, chunk_frames=1_000)
    seen = []
    latents = to_codes.model._latents
    monkeypatch.setattr(to_codes.model, "_latents", lambda part, *a, **k: seen.append(part) or latents(part, *a, **k))
    assert to_codes(long)["audio_codes"].equal(codes)
    assert len(seen) == 3
    output = to_codes([long, CLIP], batch_size=2, chunk_frames=50)
    assert len(seen) == 3 + 7
    assert output[0]["audio_codes"].equal(codes)
    np.testing.assert_allclose(there_and_back(long, chunk_frames=50)["audio"], audio, atol=1e-5)
    np.testing.assert_allclose(
        to_audio({"audio_codes": codes}, chunk_frames=50)["audio"][: len(long)], audio, atol=1e-5
    )


def test_bfloat16(to_codes, to_audio, there_and_back):
    model = to_codes.model.bfloat16()
    codes, audio = reference(model, CLIP)
    assert to_codes.dtype == torch.bfloat16
    assert to_codes(CLIP)["audio_codes"].equal(codes)
    for output in (there_and_back(CLIP), to_audio({"audio_codes": codes, "num_samples": len(CLIP)})):
        assert output["audio"].dtype == np.float32
        np.testing.assert_array_equal(output["audio"], audio)


# ---- many at a time


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    clips=st.lists(
        st.tuples(st.integers(50, 12 * FRAME), st.sampled_from([8_000, 16_000, RATE, 44_100])), min_size=1, max_size=6
    ),
    batch_size=st.integers(1, 5),
    num_quantizers=st.sampled_from([1, 2, None]),
)
def test_a_batch_equals_its_items(to_codes, to_audio, there_and_back, clips, batch_size, num_quantizers):
    audio = [{"array": samples(n, seed), "sampling_rate": rate} for seed, (n, rate) in enumerate(clips)]
    options = {"num_quantizers": num_quantizers, "batch_size": batch_size}
    outputs, waves = to_codes(audio, **options), there_and_back(audio, **options)
    decoded = to_audio(outputs, batch_size=batch_size)
    assert len(outputs) == len(waves) == len(decoded) == len(clips)
    for clip, output, wave, again in zip(audio, outputs, waves, decoded, strict=True):
        inputs = MimiFeatureExtractor()([clip], return_tensors="pt")["input_values"]
        with torch.no_grad():
            alone = to_codes.model.encode(inputs, num_quantizers=num_quantizers, output_latents=True)
            expected = to_codes.model.decode(output["audio_codes"][None]).audio_values[0, 0, : inputs.shape[-1]]
        assert_same_codes(to_codes.model, alone.latents, output["audio_codes"][None], alone.audio_codes)
        assert output["num_samples"] == inputs.shape[-1]
        assert wave["audio"].shape == again["audio"].shape == expected.shape
        np.testing.assert_allclose(again["audio"], expected.numpy(), atol=1e-5)
        if output["audio_codes"].equal(alone.audio_codes[0]):
            np.testing.assert_allclose(wave["audio"], expected.numpy(), atol=1e-5)


def test_codes_of_one_batch_may_differ_in_codebooks(to_audio):
    clips = [CODES, CODES[:2, :3], CODES[:1], CODES[:2]]
    for output, codes in zip(to_audio(clips, batch_size=4), clips, strict=True):
        np.testing.assert_allclose(output["audio"], to_audio(codes)["audio"], atol=1e-6)


def test_outputs_hold_nothing_of_their_batch(to_codes, there_and_back, monkeypatch):
    clips = [CLIP[:FRAME], samples(200 * FRAME)]
    assert len(pickle.dumps(to_codes(clips, batch_size=2)[0])) < 2_000
    decoded = []
    decode = there_and_back.model.decode
    monkeypatch.setattr(there_and_back.model, "decode", lambda *a, **k: decoded.append(decode(*a, **k)) or decoded[0])
    for output in there_and_back(clips, batch_size=2):
        assert not np.shares_memory(output["audio"], decoded[0].audio_values.numpy())


def clips_of_a_column() -> list[dict]:
    return [{"audio": {"bytes": file_of(samples(200 + 90 * i, i)), "path": None}, "text": str(i)} for i in range(5)]


COLUMNS = {
    "list": lambda: [row["audio"] for row in clips_of_a_column()],
    "tuple": lambda: tuple(row["audio"] for row in clips_of_a_column()),
    "generator": lambda: (row["audio"] for row in clips_of_a_column()),
    "map": lambda: map(itemgetter("audio"), clips_of_a_column()),
    "column": lambda: Dataset.from_list(clips_of_a_column())["audio"],
    "streaming column": lambda: IterableDataset.from_generator(clips_of_a_column)["audio"],
    "KeyDataset": lambda: KeyDataset(Dataset.from_list(clips_of_a_column()), "audio"),  # ty: ignore[invalid-argument-type]
}


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("kind", COLUMNS)
def test_lists_streams_and_columns(to_codes, kind, batch_size):
    outputs = to_codes(COLUMNS[kind](), batch_size=batch_size)
    assert isinstance(outputs, list) == (kind in ("list", "tuple"))
    outputs = list(outputs)
    assert [output["num_samples"] for output in outputs] == [200 + 90 * i for i in range(5)]
    for i, output in enumerate(outputs):
        assert output["audio_codes"].equal(reference(to_codes.model, samples(200 + 90 * i, i))[0])


def test_a_streaming_column_is_read_as_it_is_used(to_codes):
    read = []

    def rows():
        for i in range(100):
            read.append(i)
            yield {"audio": {"array": samples(100 + i), "sampling_rate": RATE}}

    outputs = iter(to_codes(IterableDataset.from_generator(rows)["audio"], batch_size=4))
    assert len(read) <= 1  # transformers looks at the first
    for used in range(1, 21):
        next(outputs)
        assert used <= len(read) <= used + 4


def test_an_empty_list_gives_an_empty_list(to_codes, to_audio):
    assert to_codes([]) == to_audio(()) == []


# ---- what does not fit


@pytest.mark.parametrize(
    ("clip", "options", "error", "says"),
    [
        ("nowhere.wav", {}, FileNotFoundError, "nowhere.wav"),
        (b"no audio at all", {}, ValueError, "not audio that libsndfile reads"),
        (None, {}, ValueError, "This clip has no audio"),
        ({"audio": CLIP, "text": "a"}, {}, ValueError, r"keys \['audio', 'text'\].*the column that holds audio"),
        ({"bytes": None, "path": None}, {}, ValueError, "has no audio"),
        ({"array": CLIP}, {}, ValueError, "no sampling rate"),
        ({"array": CLIP, "sampling_rate": 16_000}, {"sampling_rate": 8_000}, ValueError, "16000 Hz.*8000 Hz"),
        (CLIP, {"sampling_rate": -1}, ValueError, "positive number of Hz"),
        (CLIP[None, None], {}, ValueError, "3 dimensions"),
        (CLIP[:0], {}, ValueError, "empty"),
        (CLIP > 0, {}, TypeError, "dtype bool"),
        ([0.1, 0.2], {}, TypeError, "is a float"),
        (CLIP, {"num_quantizers": 5}, ValueError, "`num_quantizers` must be from 1 to 4"),
        (CLIP, {"num_quantizers": 0}, ValueError, "`num_quantizers` must be from 1 to 4"),
        (CLIP, {"num_codebooks": 1}, TypeError, "num_codebooks"),
    ],
)
def test_what_is_wrong_with_a_clip_is_said(to_codes, there_and_back, clip, options, error, says):
    for pipeline in (to_codes, there_and_back):
        with pytest.raises(error, match=says):
            pipeline(clip, **options)


@pytest.mark.parametrize(
    ("codes", "options", "error", "says"),
    [
        (CODES.float(), {}, TypeError, "must be integers.*float32"),
        (CODES > 0, {}, TypeError, "must be integers.*bool"),
        ("codes.safetensors", {}, TypeError, "got str.*mimi encode"),
        ([1, 2, 3], {}, TypeError, "got int"),
        (CODES[0], {}, ValueError, r"1 to 4 codebooks, num_frames\), got \(1, 10\)"),
        (torch.cat((CODES, CODES)), {}, ValueError, "1 to 4 codebooks"),
        ([CODES[None].expand(2, -1, -1)], {}, ValueError, "1 to 4 codebooks"),
        (CODES + 60, {}, ValueError, "from 0 to 63, got 60 to 99"),
        (CODES - 1, {}, ValueError, "from 0 to 63, got -1 to"),
        ({"codes": CODES}, {}, ValueError, '"audio_codes"'),
        ({"audio_codes": CODES, "num_samples": 4 * FRAME}, {}, ValueError, "of 192 goes with 4 frames.*have 10"),
        (CODES, {"num_quantizers": 5}, ValueError, "`num_quantizers` must be from 1 to 4"),
    ],
)
def test_what_is_wrong_with_codes_is_said(to_audio, codes, options, error, says):
    with pytest.raises(error, match=says):
        to_audio(codes, **options)


def test_another_model_is_refused():
    from transformers import MimiConfig, MimiModel

    config = MimiConfig(hidden_size=32, num_filters=8, upsample_groups=32, num_hidden_layers=1)
    with pytest.raises(TypeError, match=r"transformers.models.mimi.*trust_remote_code=True.*register"):
        MimiAudioToCodesPipeline(MimiModel(config))


def test_half_a_model_is_enough_for_its_half(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    half = type(tiny_model).from_pretrained(tmp_path, decoder_config=None)
    assert MimiAudioToCodesPipeline(half)(CLIP)["audio_codes"].equal(reference(tiny_model, CLIP)[0])
    with pytest.raises(ValueError, match="without its decoder"):
        MimiCodesToAudioPipeline(half)(CODES)


def test_files_need_soundfile_and_samples_do_not(to_codes, monkeypatch):
    monkeypatch.setattr(pipeline_mimi, "soundfile", None)
    to_codes(CLIP)
    with pytest.raises(ImportError, match="pip install soundfile"):
        to_codes(file_of(CLIP))


# ---- in a repository


def saved(model, directory: Path) -> Path:
    model.save_pretrained(directory)
    MimiFeatureExtractor().save_pretrained(directory)
    return directory


def run(code: str, **names) -> str:
    """Run code in a fresh process, where nothing is registered and nobody can answer a question."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:::torch", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **{name: str(value) for name, value in names.items()}},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


REMOTE = """
import os, sys
sys.modules["modeling_mimi"] = sys.modules["soundfile"] = None  # importing either fails
import torch
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization, pipeline
path, audio, codes, wave = os.environ["MODEL"], *torch.load(os.environ["DATA"])

def check(path):
    for loader in (AutoModel, AutoFeatureExtractor):
        stock = loader.from_pretrained(path)
        assert type(stock).__module__.startswith("transformers.models."), stock
    encode, decode, both = (
        pipeline(task, model=path, trust_remote_code=True, device="cpu")
        for task in ("audio-to-codes", "codes-to-audio", "audio-to-audio")
    )
    for pipe in (encode, decode, both):
        assert type(pipe).__module__.startswith("transformers_modules."), pipe
    assert encode(audio.numpy())["audio_codes"].equal(codes)
    outputs = encode([audio, audio[:500]], batch_size=2)
    assert outputs[0]["audio_codes"].equal(codes)
    assert torch.from_numpy(decode(outputs, batch_size=2)[0]["audio"]).allclose(wave, atol=1e-5)
    assert torch.from_numpy(both(audio)["audio"]).allclose(wave, atol=1e-5)
    return encode

encode = check(path)
try:
    encode(b"RIFF")
except ImportError as error:
    print(error)
encode.save_pretrained(path + "2")
check(path + "2")
half = pipeline("audio-to-codes", model=path, trust_remote_code=True, dtype=torch.bfloat16, device="cpu")
assert half.dtype == torch.bfloat16
print(half(audio)["audio_codes"].shape)
try:
    pipeline("audio-to-codes", model=path)
except ValueError as error:
    print(error)
"""


def test_from_a_directory_without_the_package(tiny_model, tmp_path):
    codes, wave = reference(tiny_model, CLIP)
    torch.save((torch.from_numpy(CLIP), codes, torch.from_numpy(wave)), tmp_path / "data.pt")
    save_pipelines(saved(tiny_model, tmp_path / "model"))
    output = run(REMOTE, MODEL=tmp_path / "model", DATA=tmp_path / "data.pt", HF_MODULES_CACHE=tmp_path / "modules")
    assert "pip install soundfile" in output
    assert "torch.Size([4, 10])" in output
    assert "trust_remote_code=True" in output


REGISTERED = """
import os, sys
import torch
from transformers import pipeline
from modeling_mimi import MimiAudioToCodesPipeline, register
register()
register()
path, audio, codes, wave = os.environ["MODEL"], *torch.load(os.environ["DATA"])
plain, published = path + "/plain", path + "/published"
encode = pipeline("audio-to-codes", model=plain, device="cpu", num_quantizers=4)
assert type(encode) is MimiAudioToCodesPipeline
output = encode(audio)
assert output["audio_codes"].equal(codes)
assert torch.from_numpy(pipeline("codes-to-audio", model=plain)(output)["audio"]).equal(wave)
assert torch.from_numpy(pipeline("audio-to-audio", model=encode.model)(audio)["audio"]).equal(wave)
encode = pipeline("audio-to-codes", model=published, pipeline_class=MimiAudioToCodesPipeline, dtype=torch.bfloat16)
assert encode.dtype == torch.bfloat16
"""


def test_registered_tasks(tiny_model, tmp_path):
    codes, wave = reference(tiny_model, CLIP)
    torch.save((torch.from_numpy(CLIP), codes, torch.from_numpy(wave)), tmp_path / "data.pt")
    saved(tiny_model, tmp_path / "plain")
    save_pipelines(saved(tiny_model, tmp_path / "published"))
    run(REGISTERED, MODEL=tmp_path, DATA=tmp_path / "data.pt", HF_MODULES_CACHE=tmp_path / "modules")


def test_custom_pipelines_are_merged(tiny_model, tmp_path):
    path = saved(tiny_model, tmp_path) / "config.json"
    before = json.loads(path.read_text())
    foreign = {"speaker-id": {"impl": "speakers.SpeakerPipeline", "pt": ["AutoModel"], "type": "audio"}}
    from_hub = {"audio-to-codes": {"impl": "someone/mimi--pipeline_mimi.MimiAudioToCodesPipeline", "pt": []}}
    path.write_text(json.dumps({**before, "custom_pipelines": foreign | from_hub}))
    save_pipelines(tmp_path)
    after = json.loads(path.read_text())
    offered = after.pop("custom_pipelines")
    assert after == before
    assert offered["speaker-id"] == foreign["speaker-id"]
    assert offered.keys() == TASKS | {"speaker-id"}
    for task in TASKS:
        module, name = offered[task]["impl"].split(".")
        assert (tmp_path / f"{module}.py").read_text().count(f"class {name}(") == 1
        assert offered[task]["pt"] == ["AutoModel"]


def test_a_model_saved_elsewhere_offers_no_pipeline_whose_code_stayed_behind(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "a")
    save_pipelines(tmp_path / "a")
    type(tiny_model).from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert not json.loads((tmp_path / "b" / "config.json").read_text()).get("custom_pipelines")
    save_pipelines(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["custom_pipelines"].keys() == TASKS


def test_saving_again_changes_nothing_and_leaves_nothing_behind(tiny_model, tmp_path):
    save_pipelines(str(saved(tiny_model, tmp_path)))
    once = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    save_pipelines(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == once
    package = Path(pipeline_mimi.__file__).parent
    for name in ("pipeline_mimi.py", "feature_extraction_mimi.py"):
        assert once[name] == (package / name).read_bytes()
    assert not [name for name in once if name.startswith(".")]


def test_a_failure_leaves_the_directory_as_it_was(tiny_model, tmp_path, monkeypatch):
    saved(tiny_model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(pipeline_mimi.Path, "write_text", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pipelines(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_pipeline_saves_itself_with_the_others(to_audio, tmp_path):
    to_audio.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["custom_pipelines"].keys() == TASKS
    assert (tmp_path / "preprocessor_config.json").exists()
    assert not hasattr(to_audio.model.config, "custom_pipelines"), "the model in memory is as it was"
    with pytest.raises(ValueError, match="push_to_hub"):
        to_audio.save_pretrained(tmp_path, push_to_hub=True)


def test_what_cannot_offer_pipelines_is_refused(tiny_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json: save a MimiModel there first"):
        save_pipelines(tmp_path / "nowhere")
    path = saved(tiny_model, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    stranger = {"audio-to-audio": {"impl": "separation.SeparationPipeline"}}
    for changed, says in [
        ({**config, "model_type": "encodec"}, "does not hold a Mimi"),
        ({key: value for key, value in config.items() if key != "auto_map"}, "with its code"),
        ({**config, "custom_pipelines": stranger}, "another pipeline for audio-to-audio, separation.Sep"),
    ]:
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=says):
            save_pipelines(tmp_path)
        assert json.loads(path.read_text()) == changed
