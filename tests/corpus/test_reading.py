"""Audio block by block is the audio as a whole."""

import numpy as np
import pytest
import soundfile
from conftest import speech

from modeling_mimi import MimiConfig, MimiFeatureExtractor
from training.corpus import reading
from training.sources import Unusable, reference


@pytest.mark.parametrize(("rate", "channels"), [(24_000, 1), (44_100, 2), (8_000, 1), (48_000, 3)])
@pytest.mark.parametrize("seconds", [0.3, 2.0, 3.7])
def test_blocks_are_the_whole_clip_as_the_feature_extractor_gives_it(tmp_path, monkeypatch, rate, channels, seconds):
    monkeypatch.setattr(reading, "BLOCK_S", 1)
    audio = np.stack([speech(round(seconds * rate), seed=seed)[0, 0].numpy() for seed in range(channels)], axis=1)
    soundfile.write(tmp_path / "clip.wav", audio, rate, "FLOAT")
    found = list(reading.blocks(reference(str(tmp_path / "clip.wav"), ""), MimiConfig()))
    assert len(found) == int(seconds) + 1
    whole = MimiFeatureExtractor()([audio], sampling_rate=rate, padding=False)["input_values"][0]
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, atol=1e-7)


def test_two_channels_for_a_model_that_has_two(tmp_path):
    stereo, config = speech(4800, batch_size=2)[:, 0].numpy(), MimiConfig(audio_channels=2)
    soundfile.write(tmp_path / "two.wav", stereo.T, 24_000, "FLOAT")
    soundfile.write(tmp_path / "one.wav", stereo[0], 24_000, "FLOAT")
    soundfile.write(tmp_path / "three.wav", stereo.T[:, [0, 0, 1]], 24_000, "FLOAT")
    two, one = (
        np.concatenate(list(reading.blocks(reference(str(tmp_path / f"{name}.wav"), ""), config)), axis=1)
        for name in ("two", "one")
    )
    np.testing.assert_array_equal(two, stereo)
    np.testing.assert_array_equal(one, stereo[[0, 0]])
    with pytest.raises(Unusable, match="3 channels"):
        list(reading.blocks(reference(str(tmp_path / "three.wav"), ""), config))


def test_an_error_in_the_threads_reaches_the_walk_and_ends_it():
    def broken():
        raise OSError("the disk is gone")
        yield

    walk = reading.read_ahead(broken(), MimiConfig(), reading.Layout(125, 1500), 3, reading.Seconds())
    with pytest.raises(OSError, match="the disk is gone"):
        list(walk)
