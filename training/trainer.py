"""When things happen: the loop, its steps, checkpoints, validation and the log.

`A` parts of a step, `W` processes, `B` clips of a part, `L` samples, `T` frames.
"""

import contextlib
import logging
import math
import shutil
import signal
import time
from collections.abc import Generator
from pathlib import Path

import draccus
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from modeling_mimi import MimiFeatureExtractor

from .checkpoints import Checkpoints
from .config import RecipeError, TrainingConfig
from .data import WindowLoader, load_clips
from .history import History
from .learner import Learner
from .push import Push
from .reporting import Reporter, flat
from .validation import merge, validate

logger = logging.getLogger(__name__)


class Trainer:
    """A run of training: `Trainer(config).train()` starts it, or goes on with it.

    With `push`, the first process offers it the run so far after every checkpoint.
    """

    def __init__(self, config: TrainingConfig, push: Push | None = None):
        self.config = config
        self.push = push
        self.folder = Path(config.output_dir)
        self.accelerator = Accelerator(
            mixed_precision="no" if config.precision == "fp32" else config.precision,
            log_with=list(config.trackers) or None,
            project_dir=self.folder,
            # codebooks are written alike by all processes; sending rank 0's each step would be waste
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.part_size, rest = divmod(config.data.batch_size, self.world_size * config.accumulation_steps)
        if rest:
            raise RecipeError(
                f"data.batch_size {config.data.batch_size} does not divide over {self.world_size} processes with "
                f"{config.accumulation_steps} accumulation steps each."
            )
        torch.manual_seed(config.seed)
        self.learner = Learner(config, self.accelerator)
        self.sampling_rate = self.learner.codec.config.sampling_rate
        self.loader = WindowLoader(
            config.data, self.sampling_rate, self.part_size, config.seed, self.rank, self.world_size
        )
        self.history = History(self.folder)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep_checkpoints)
        self.reporter = Reporter(self.accelerator, config, self.history)
        self.step = 0
        self.elapsed_s = 0.0
        self.skipped = self.skipped_in_a_row = 0
        self.best: dict | None = None
        self.stopping = False

    # ---- the loop

    def train(self) -> None:
        """Train to the last step, from the newest checkpoint if there is one.

        SIGTERM or Ctrl-C saves and leaves; starting again goes on.

        Raises:
            FloatingPointError: too many steps in a row had gradients that are not finite or explode.
        """
        self._resume()
        self.reporter.start(self.step)
        config, every = self.config, self.config.validation.every
        self.clips = self._load_clips()
        batches = iter(self.loader)
        self.started = self.logged = time.monotonic()
        self.logged_wait_s = 0.0
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        with self._stop_signals(), bar, contextlib.closing(self.loader):
            while self.step < config.steps and not self.stopping:
                self._count(self.learner.step(self.step, [next(batches) for _ in range(config.accumulation_steps)]))
                self.step += 1
                bar.update()
                last = self.step == config.steps
                self.stopping = self._any_process(self.stopping)
                if self.step % config.log_every == 0 or last:
                    bar.set_postfix(self._log())
                better = bool(self.clips) and (self.step % every == 0 or last) and self._validate()
                if self.step % config.checkpoint_every == 0 or better or last or self.stopping:
                    self._save()
                    if self.push is not None and self.accelerator.is_main_process and not (last or self.stopping):
                        self.push.offer(self.step, self._write_results)
        if self.step == config.steps:
            if self.push is not None:
                self.push.wait()  # it reads what is written now
            self._write_results()
        elif self.accelerator.is_main_process:
            logger.warning("Stopped and saved after step %d: the same command goes on.", self.step)
        self.accelerator.end_training()

    def _load_clips(self) -> list[tuple[str, Tensor]]:
        settings = self.config.validation
        if not settings.sources:
            return []
        clips = load_clips(settings.sources, self.sampling_rate, settings.clips, settings.clip_s)
        return [(clip.name, clip.audio) for clip in clips]

    @contextlib.contextmanager
    def _stop_signals(self) -> Generator[None]:
        """While inside, SIGTERM and SIGINT ask for a stop after the step."""

        def stop(signum, frame):
            self.stopping = True

        signals = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, stop) for number in signals]
        try:
            yield
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)

    def _any_process(self, flag: bool) -> bool:
        if self.world_size == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(int(flag), device=self.accelerator.device), "sum"))

    def _count(self, good: bool) -> None:
        if good:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        logger.warning("Step %d was skipped: its gradients are not finite or exploded.", self.step)
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            raise FloatingPointError(
                f"Training diverged: the last {self.skipped_in_a_row} steps up to {self.step} had gradients that are "
                f"not finite or above exploding_norm = {self.config.exploding_norm:g}. The newest checkpoint is in "
                f"{self.checkpoints.folder}: go on from it with a lower learning rate or max_gradient_norm."
            )

    # ---- the log, and what is kept

    def _log(self) -> dict[str, str]:
        """Write a log entry; returns what the progress bar shows."""
        values = self.learner.observations()
        now, wait_s = time.monotonic(), self.loader.report()["wait_s"]
        interval = now - self.logged
        steps = self.step - self.logged_step
        heard_s = steps * self.config.data.batch_size * self.config.data.segment_s
        timing = torch.tensor([heard_s / interval, (wait_s - self.logged_wait_s) / interval])
        values |= dict(zip(("audio_seconds_per_second", "data_wait"), self.learner.mean(timing).tolist(), strict=True))
        self.logged, self.logged_wait_s, self.logged_step = now, wait_s, self.step
        values["skipped_steps"] = self.skipped
        self.reporter.train(self.step, values)
        shown = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
        return {name: f"{value:.3g}" for name, value in shown.items()}

    def _validate(self) -> bool:
        """Measure the averaged weights, each process its share of the clips; returns whether they are the best."""
        part = validate(
            self.learner.averaged(),
            self.clips[self.rank :: self.world_size],
            self.learner.objective.mel,
            examples=self.config.validation.examples,
            progress=self.accelerator.is_main_process,
        )
        result = merge(gather_object([part]))
        self.reporter.validation(self.step, result, self.clips, self.sampling_rate)
        name = self.config.best_metric
        sign = -1 if name == "mel_distance" else 1
        better = sign * result.scores[name] > (-math.inf if self.best is None else sign * self.best[name])
        if better:
            self.best = {"step": self.step, **result.scores}
        return better

    def _save(self) -> None:
        """Write everything that the run needs to go on, and the averaged weights as a model directory."""
        shared = {
            "step": self.step,
            "elapsed_s": self._elapsed(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "best": self.best,
            "config": draccus.encode(self.config),
            **self.learner.state_dict(),
        }
        # no random state: each step seeds the generators anew
        own = {"loader": self.loader.state_dict(), "meters": self.learner.meters.state_dict()}
        self.checkpoints.save(
            self.step,
            shared,
            own,
            self.rank,
            self.accelerator.wait_for_everyone,
            extra=self._write_readable,
            best=self.best["step"] if self.best else None,
        )

    def _write_readable(self, folder: Path) -> None:
        (folder / "config.yaml").write_text(str(draccus.dump(self.config)))
        self._export(folder / "model")

    def _export(self, folder: Path) -> None:
        """The averaged weights in stock's layout, weight norm folded, with the feature extractor."""
        self.learner.averaged().cpu().save_pretrained(folder)
        MimiFeatureExtractor(sampling_rate=self.sampling_rate).save_pretrained(folder)

    def _resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        found = self.checkpoints.load(self.rank)
        self.logged_step = 0
        if found is None:
            if self.accelerator.is_main_process:
                self.history.rewind(-1)
            return
        shared, own = found
        self._name_changes(shared["config"])
        try:
            self.learner.load_state_dict(shared)
        except (KeyError, RuntimeError, ValueError) as error:
            raise RecipeError(
                f"The checkpoints in {self.checkpoints.folder} are not of this recipe's networks ({error}): give "
                "another output_dir, or model.pretrained to start from their weights."
            ) from error
        self.step = self.logged_step = shared["step"]
        self.elapsed_s = shared["elapsed_s"]
        self.skipped, self.skipped_in_a_row, self.best = shared["skipped"], shared["skipped_in_a_row"], shared["best"]
        self.loader.load_state_dict(own["loader"])
        self.learner.meters.load_state_dict(own["meters"])
        if self.accelerator.is_main_process:
            self.history.rewind(self.step)
            logger.warning("Going on after step %d of %d in %s.", self.step, self.config.steps, self.folder)

    def _name_changes(self, before: dict) -> None:
        """Say which fields differ from those that the checkpoint was written with."""
        now = flat(draccus.encode(self.config))
        changes = [f"{name} {old} -> {now.get(name)}" for name, old in flat(before).items() if now.get(name) != old]
        if changes and self.accelerator.is_main_process:
            logger.warning("Going on with a changed recipe: %s.", "; ".join(changes))

    def _elapsed(self) -> float:
        """Seconds of training in all, over every restart."""
        return self.elapsed_s + time.monotonic() - self.started

    def _write_results(self) -> None:
        """Export the averaged weights, and sum the run up, so far."""
        if not self.accelerator.is_main_process:
            return
        temporary, final = self.folder / ".model", self.folder / "model"
        shutil.rmtree(temporary, ignore_errors=True)
        self._export(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        self.reporter.finish(
            {
                "steps": self.step,
                "audio_hours": self.step * self.config.data.batch_size * self.config.data.segment_s / 3600,
                "training_hours": self._elapsed() / 3600,
                "skipped_steps": self.skipped,
                "parameters": self.learner.num_parameters(),
                "best_checkpoint": self.best,
                "data": self.loader.report(),
            }
        )
