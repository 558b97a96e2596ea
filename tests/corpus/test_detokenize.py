"""`mimi detokenize`: tokens back to files, each named after its clip."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from clips_of_all_kinds import GOOD, mimi, rows, write_corpus

from training.config import SourceConfig
from training.corpus import detokenize, tokenize
from training.sources import stream_rows


@pytest.fixture
def checkpoint(tiny_model, tmp_path) -> Path:
    tiny_model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def tokens(checkpoint, tmp_path) -> Path:
    write_corpus(tmp_path / "corpus")
    assert mimi("tokenize", tmp_path / "corpus", "--to", tmp_path / "tokens", "--model", checkpoint) == 0
    return tmp_path / "tokens"


@pytest.mark.parametrize(("ending", "levels"), [("flac", None), ("wav", 2)])
@torch.inference_mode()
def test_tokens_become_the_audio_that_the_model_decodes(
    tokens, checkpoint, tmp_path, tiny_model, monkeypatch, ending, levels
):
    monkeypatch.setattr(tokenize, "LONG_S", 0.5)  # three clips are longer
    output = tmp_path / "audio"
    options = ["--format", ending, *(["--num-quantizers", levels] if levels else [])]
    assert mimi("detokenize", tokens, "--to", output, "--model", checkpoint, *options) == 0
    files = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert files == {"metadata.parquet", *(f"{name.rsplit('.')[0]}.{ending}" for name in GOOD)}
    for row in rows(tokens):
        audio, _ = soundfile.read(output / f"{row['clip_id'].rsplit('.')[0]}.{ending}", dtype="float32")
        assert len(audio) == row["num_samples"]
        alone = tiny_model.decode(torch.tensor(row["codes"])[None, :levels]).audio_values[0, 0, : len(audio)]
        np.testing.assert_allclose(audio, alone.clamp(-1, 1).numpy(), atol=2**-14)
    # with metadata.parquet, the folder is a data set again
    again = {row["clip_id"]: (clip.name, row["text"]) for clip, row in stream_rows(SourceConfig(str(output)))}
    assert again == {name: (f"{name.rsplit('.')[0]}.{ending}", f"says {name}") for name in GOOD}


def test_clips_of_one_name_get_files_of_their_own(tokens, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(detokenize, "CLIPS_AT_ONCE", 3)
    output = tmp_path / "audio"
    arguments = ["detokenize", tokens, "--to", output, "--model", checkpoint, "--id-column", "speaker"]
    assert mimi(*arguments) == 0
    names = [f"{row['speaker']}~{number}.flac" for number, row in enumerate(rows(tokens))]
    assert sorted(path.name for path in output.glob("*.flac")) == sorted(names)
    for name, row in zip(names, rows(tokens), strict=True):
        assert soundfile.info(output / name).frames == row["num_samples"]
    # what is there stays, and what is missing comes
    (output / names[0]).unlink()
    (output / names[1]).write_bytes(b"mine")
    assert mimi(*arguments) == 0
    assert (output / names[0]).exists()
    assert (output / names[1]).read_bytes() == b"mine"


def test_what_cannot_be_decoded_gets_one_sentence(tokens, checkpoint, tmp_path, tiny_model, capsys):
    def refused(folder: Path, *options: object) -> str:
        capsys.readouterr()
        assert mimi("detokenize", folder, "--to", tmp_path / "audio", *options) == 2
        assert not list(tmp_path.glob("audio/*"))
        return capsys.readouterr().err

    model = ["--model", checkpoint]
    assert "There are no tokens in" in refused(tmp_path / "corpus", *model)
    assert "There are no tokens at" in refused(tmp_path / "nowhere", *model)
    assert "has 4 codebooks, not 5" in refused(tokens, *model, "--num-quantizers", 5)
    assert "has no column 'id' for --id-column; it has text" in refused(tokens, *model, "--id-column", "id")
    assert "It made these tokens: say with --model where it is" in refused(tokens)
    with torch.no_grad():
        tiny_model.quantizer.semantic_residual_vector_quantizer.layers[0].codebook.embed_sum.add_(1)
    tiny_model.save_pretrained(tmp_path / "other")
    assert "with other codebooks, those of tiny" in refused(tokens, "--model", tmp_path / "other")
    (tokens / "tokens.json").unlink()
    assert "are not all there yet" in refused(tokens, *model)
