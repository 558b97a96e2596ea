"""Cards of data sets of codes, and the code of all cards, which runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import Dataset
from test_cards import CHECKPOINT, ROOT, change

from hub_cards.card import CardError, dataset_card, model_card
from modeling_mimi import MimiModel, save_pipelines


def write_tokens(directory: Path, codec: str, codes: np.ndarray) -> Path:
    """A data set of codes (K, T) in the form of `mimi tokenize`."""
    (directory / "data").mkdir(parents=True)
    row = {"clip_id": "a", "codes": codes.tolist(), "num_frames": codes.shape[1], "num_samples": codes.shape[1] * 1920}
    tokens = Dataset.from_list([row])
    tokens.to_parquet(str(directory / "data" / "train-00000-00000000.parquet"))
    summary = {
        "codec": {
            "model": codec,
            "fingerprint": "0123456789abcdef",
            "num_quantizers": len(codes),
            "dtype": "float32",
            "sampling_rate": 24_000,
            "frame_rate": 12.5,
            "frame_size": 1920,
            "codebook_size": 2048,
        },
        "source": {
            "dataset": "google/fleurs",
            "name": "nl_nl",
            "revision": None,
            "split": "train",
            "where": {"language": ["nl"]},
        },
        "clips": 12_345,
        "hours": 20.5,
        "frames": 922_500,
        "shards": 3,
        "bytes": 10_500_000,
        "errors": {"silent": 2, "not audio": 1},
        "features": tokens.features.to_dict(),
        "libraries": {"torch": "2.13.0", "datasets": "5.2.0"},
    }
    (directory / "tokens.json").write_text(json.dumps(summary))
    return directory


def test_card_of_a_data_set_of_codes(tmp_path):
    folder = write_tokens(tmp_path / "tokens", "me/mimi", np.zeros((8, 3), dtype=int))
    card = dataset_card(folder, "me/tokens")
    data = card.data.to_dict()
    assert data["size_categories"] == ["10K<n<100K"]
    assert data["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    for text in (
        "| audio | `google/fleurs`, `nl_nl`, train, language nl |",
        "8 codebooks of 2,048 entries at 12.5 Hz: 1.1 kbit/s",
        "| clips | 12,345 |",
        "| left out | 3 clips",
        "| `codes` | list of list of int64 |",
        "fingerprint `0123456789abcdef`",
        "That of the audio is the first to look at",
    ):
        assert text in card.text, text
    (folder / "card.yaml").write_text("license: cc-by-4.0\nlanguage: [nl]\n")
    assert dataset_card(folder).data.license == "cc-by-4.0"
    change(folder / "tokens.json", "codec.fingerprint")
    with pytest.raises(CardError, match=r'tokens.json has no "codec.fingerprint".*`mimi tokenize'):
        dataset_card(folder)
    with pytest.raises(CardError, match=r"tokens.json is missing: `mimi tokenize"):
        dataset_card(tmp_path)


# ---- code

RUN = """
import json
import transformers
transformers.logging.disable_progress_bar()
names = {"home": lambda: type(names["model"]).__module__.split(".")[0]}
for number, (block, checks) in enumerate(json.load(open("blocks.json")), 1):
    exec(compile(block, f"block {number}", "exec"), names)
    for check in checks:
        assert eval(check, names), (number, check)
print("ran", number)
"""
STREAMED = ["(torch.cat(heard, -1)[..., : speech.shape[-1]] - speech).abs().max() < 1e-4"]
PIPED = ["tokens['audio_codes'].equal(codes[0])", "output['audio'].shape == audio.shape"]


def blocks_of(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.S)


def published(folder: Path, repo_id: str) -> str:
    """The checkpoint as it is published, and its card."""
    directory = shutil.copytree(CHECKPOINT, folder / repo_id)
    MimiModel.from_pretrained(CHECKPOINT).save_pretrained(directory)
    save_pipelines(directory)
    return str(model_card(directory, repo_id))


def test_every_block_runs(tmp_path):
    """Those of the card in the repository, of the published one, and of a data set, as their readers run them.

    A process has what names a repository as a folder in its working directory, where transformers and datasets look
    first. One process, for its imports take longest; `register` changes what it loads, so the rest comes before.
    """
    card = published(tmp_path, "me/mimi")
    assert 'pipeline("audio-to-codes", model="me/mimi", trust_remote_code=True)' in card
    (tmp_path / "mimi_small").symlink_to(CHECKPOINT)
    tokens = write_tokens(tmp_path / "me" / "tokens", "me/mimi", np.arange(8 * 5).reshape(8, 5))
    [of_tokens] = blocks_of(str(dataset_card(tokens, "me/tokens")))
    bare = blocks_of((CHECKPOINT / "README.md").read_text())
    *remote, registered = blocks_of(card)
    assert (len(remote), len(bare)) == (4, 4)
    stock, home = ["codes.shape[:2] == (1, 8)", "home() == 'transformers'"], "home() == '{}'".format
    run = [
        (of_tokens, [*stock[1:], "speech.shape == (1, 1, 5 * 1920)"]),
        *zip(remote, [stock, [home("transformers_modules")], STREAMED, PIPED], strict=True),
        *zip(bare, [stock, [home("modeling_mimi")], STREAMED, PIPED], strict=True),
        (registered, [home("modeling_mimi")]),
    ]
    (tmp_path / "blocks.json").write_text(json.dumps(run))
    audio, rate = soundfile.read(ROOT / "tests" / "data" / "nathalie_1010.flac")
    soundfile.write(tmp_path / "speech.wav", audio[: rate + 100], rate)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", RUN], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "ran 10" in ran.stdout
