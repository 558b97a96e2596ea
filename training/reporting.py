"""What a person sees of a run: trackers, audio and pictures of validation, the summary and the curves."""

import dataclasses
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor

from .config import TrainingConfig
from .history import History, write_summary
from .pictures import curves, figure_to_image, spectrograms
from .validation import Validation


class Reporter:
    """Writes on the first process; the others call it and nothing happens."""

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, history: History):
        self.accelerator = accelerator
        self.config = config
        self.history = history
        self.folder = Path(config.output_dir)

    def start(self, step: int) -> None:
        """Open the trackers of a run that begins, or goes on after `step`."""
        if not self.config.trackers:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.init_trackers(
            "mimi",
            config=flat(dataclasses.asdict(self.config)),
            init_kwargs={"tensorboard": {"purge_step": step + 1}} if "tensorboard" in self.config.trackers else {},
        )

    def train(self, step: int, values: dict[str, float]) -> None:
        """A log entry."""
        if self.accelerator.is_main_process:
            self.history.append(step, values)
            self.accelerator.log(values, step=step)

    def validation(
        self, step: int, result: Validation, clips: Sequence[tuple[str, Tensor]], sampling_rate: int
    ) -> None:
        """Scores, and for the first clips both waves as audio and their spectrograms as pictures."""
        if not self.accelerator.is_main_process:
            return
        self.history.append(step, result.values(), kind="validation")
        self.accelerator.log({f"validation/{name}": value for name, value in result.values().items()}, step=step)
        folder = self.folder / "validation" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        waves = dict(clips)
        for number, (name, reconstruction) in enumerate(result.reconstructions.items(), 1):
            reconstruction = reconstruction.nan_to_num().clamp(-1, 1)
            stem = f"{number:02d}-{Path(name).stem}"
            soundfile.write(folder / f"{stem}.flac", reconstruction.numpy(), sampling_rate)
            original = self.folder / "validation" / "original" / f"{stem}.flac"
            if not original.exists():
                original.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(original, waves[name].clamp(-1, 1).numpy(), sampling_rate)
            picture = spectrograms(
                waves[name], reconstruction, sampling_rate, f"{Path(name).name}, step {step:,}", folder / f"{stem}.png"
            )
            self._track_example(step, stem, reconstruction, figure_to_image(picture), sampling_rate)

    def _track_example(self, step: int, name: str, wave: Tensor, image: Any, sampling_rate: int) -> None:
        for tracker in self.accelerator.trackers:
            label = f"validation/{name}"
            if tracker.name == "tensorboard":
                tracker.writer.add_image(label, image, step, dataformats="HWC")
                tracker.writer.add_audio(label, wave, step, sample_rate=sampling_rate)
                continue
            tracker.log_images({label: image[None]}, step=step)
            if tracker.name == "wandb":
                import wandb  # ty: ignore[import-not-found]

                tracker.log({f"{label}/audio": wandb.Audio(wave.numpy(), sampling_rate)}, step=step)

    def finish(self, facts: dict[str, Any]) -> None:
        """`summary.json`, which the model card is made from, and `curves.png`."""
        if not self.accelerator.is_main_process:
            return
        validations = self.history.read("validation")
        curves(self.history.read(), self.folder / "curves.png")
        write_summary(
            self.folder / "summary.json",
            {
                **facts,
                "last_validation": validations[-1] if validations else None,
                "hardware": hardware(self.accelerator),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "recipe": _public(dataclasses.asdict(self.config)),
            },
        )


def hardware(accelerator: Accelerator) -> dict[str, Any]:
    """What the run is computed on."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device.type,
        "name": name,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }


def _public(value: Any) -> Any:
    """Nested fields without the folders of this machine: a path from the root is cut to its last name."""
    if isinstance(value, dict):
        return {name: _public(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by dotted name, as trackers take them: numbers and text."""
    found = {}
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found
