"""When things happen: the loop, its steps, checkpoints, validation and the log.

`A` parts of a step, `W` processes, `B` clips of a part, `L` samples, `T` frames.
"""

import contextlib
import logging
import math
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import draccus
import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from modeling_mimi import MimiFeatureExtractor

from .checkpoints import Checkpoints
from .codebooks import CodebookTrainer
from .codec import PARTS, averaged_codec, build_codec, part_parameters
from .config import TrainingConfig
from .data import WindowLoader, load_clips
from .discriminators import MultiScaleSTFTDiscriminator
from .distillation import Distillation
from .ema import WeightAverage
from .history import History
from .meters import Meters
from .objective import Example, Objective
from .optimization import build_optimizer, gradient_norm, learning_rate, scale_gradients, set_learning_rate
from .reporting import Reporter, flat
from .validation import merge, validate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draws:
    """The randomness of one step, the same on all processes, a function of seed and step alone."""

    num_quantizers: int
    """Codebooks that the step uses."""
    unquantized: Tensor
    """(A, W, B): clips whose decoder gets unquantized latents."""
    crop: Tensor
    """(A, W, B) in [0, 1): place of the discriminator's crop."""
    generator: torch.Generator
    """For draws of the codebooks."""


class Trainer:
    """A run of training: `Trainer(config).train()` starts it, or goes on with it."""

    def __init__(self, config: TrainingConfig):
        self.config = config
        self.folder = Path(config.output_dir)
        self.accelerator = Accelerator(
            mixed_precision="no" if config.precision == "fp32" else config.precision,
            log_with=list(config.trackers),
            project_dir=self.folder,
            # codebooks are written alike by all processes; sending rank 0's each step would be waste
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.part_size, rest = divmod(config.data.batch_size, self.world_size * config.accumulation_steps)
        if rest:
            raise ValueError(
                f"data.batch_size {config.data.batch_size} does not divide over {self.world_size} processes with "
                f"{config.accumulation_steps} accumulation steps each."
            )
        torch.manual_seed(config.seed)
        self._build()
        self.step = 0
        self.elapsed_s = 0.0
        self.skipped = self.skipped_in_a_row = 0
        self.best: dict | None = None
        self.stopping = False

    # ---- what there is

    def _build(self) -> None:
        config, prepare = self.config, self.accelerator.prepare
        device = self.accelerator.device
        self.codec = build_codec(config.model)  # as it is; `self.parallel_*` are as they run
        self.sampling_rate = self.codec.config.sampling_rate
        self.objective = Objective(config, self.codec.config, device, self.accelerator.autocast)
        self.discriminator: nn.Module | None = None
        self.distillation: nn.Module | None = None
        trained: list[nn.Module] = [self.codec]
        if "distillation" in self.objective.weights:
            self.distillation = Distillation(self.codec.config.codebook_dim, self.objective.teacher.hidden_size)
            trained.append(self.distillation)
        if self.objective.has_discriminator:
            self.discriminator = MultiScaleSTFTDiscriminator(config.discriminator)
            if config.model.compile:
                self.discriminator.compile()
            self.parallel_discriminator = prepare(self.discriminator)
            self.discriminator_optimizer = prepare(
                build_optimizer([self.discriminator], config.discriminator_optimizer)
            )
        self.parallel_codec = prepare(self.codec)
        self.parallel_distillation = prepare(self.distillation) if self.distillation is not None else None
        self.optimizer = prepare(build_optimizer(trained, config.optimizer))
        self.parts = {part: part_parameters(self.codec, part) for part in PARTS}
        if self.distillation is not None:
            self.parts["distillation"] = list(self.distillation.parameters())
        self.average = WeightAverage(self.codec, config.weights_decay)
        self.codebooks = None
        if "quantizer" in config.model.trainable:
            self.codebooks = CodebookTrainer(
                self.codec.quantizer,
                config.codebooks,
                self.rank,
                self.world_size,
                self._total,
                self.accelerator.gather,
            )
            if config.model.pretrained is None:
                self.codebooks.restart()
        self.loader = WindowLoader(
            config.data, self.sampling_rate, self.part_size, config.seed, self.rank, self.world_size
        )
        self.meters = Meters()
        self.history = History(self.folder)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep_checkpoints)
        self.reporter = Reporter(self.accelerator, self.config, self.history)

    def _total(self, x: Tensor) -> Tensor:
        return self.accelerator.reduce(x, "sum")

    def _mean(self, x: Tensor) -> Tensor:
        return self.accelerator.reduce(x.to(self.accelerator.device, torch.float32), "mean")

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
        clips = load_clips(
            config.validation.sources, self.sampling_rate, config.validation.clips, config.validation.clip_s
        )
        self.clips = [(clip.name, clip.audio) for clip in clips]
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
                self._train_step(batches)
                self.step += 1
                bar.update()
                last = self.step == config.steps
                self.stopping = self._any_process(self.stopping)
                if self.step % config.log_every == 0 or last:
                    bar.set_postfix(self._log())
                if self.clips and (self.step % every == 0 or last):
                    self._validate()
                if self.step % config.checkpoint_every == 0 or last or self.stopping:
                    self._save()
        if self.step == config.steps:
            self._finish()
        elif self.accelerator.is_main_process:
            logger.warning("Stopped and saved after step %d: the same command goes on.", self.step)
        self.accelerator.end_training()

    @contextlib.contextmanager
    def _stop_signals(self) -> Iterator[None]:
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
        return bool(self._total(torch.tensor(int(flag), device=self.accelerator.device)))

    # ---- one step

    def _train_step(self, batches: Iterator) -> None:
        config, accumulation = self.config, self.config.accumulation_steps
        draws = self._draw()
        examples = [self._example(next(batches), draws, part) for part in range(accumulation)]
        self._initialize_codebooks(examples, draws)
        rate = learning_rate(self.step, config.steps, config.optimizer)
        set_learning_rate(self.optimizer, rate)
        adversarial = self.objective.is_adversarial(self.step)
        # taken in parts, the codec runs twice: the discriminator moves after it has seen the whole batch
        output = self._run_codec(examples[0], draws, 0) if accumulation == 1 else None
        good = True
        if adversarial:
            good = self._discriminator_step(examples, draws, output)
        good = good and self._codec_step(examples, draws, output, adversarial)
        if good:
            if self.codebooks is not None:
                replaced = self.codebooks.update(self.step, draws.generator)
                self.meters.add({"codebook/replaced": float(replaced)})
            if self.objective.balancer is not None:
                self.objective.balancer.update(self._mean)
            self.average.update(self.codec)
            self.meters.add({"num_quantizers": float(draws.num_quantizers), "learning_rate": rate})
        self._count(good)

    def _initialize_codebooks(self, examples: list[Example], draws: Draws) -> None:
        """While a level that the step uses has no entries yet, take them from the batch."""
        if self.codebooks is None or all(self.codebooks.initialized[: draws.num_quantizers]):
            return
        with torch.no_grad():
            for part, example in enumerate(examples):
                output, _ = self._run_codec(example, draws, part)
                self.codebooks.observe(output.audio_codes, output.residuals, example.frame_mask)
        self.codebooks.initialize(draws.generator)

    def _draw(self) -> Draws:
        codec, settings = self.codec.config, self.config
        seed = np.random.SeedSequence([settings.seed, self.step]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed >> 1))
        # whatever else draws does so by step and process too, and is alike after a resume
        torch.manual_seed(int(seed >> 1) + self.rank)
        lowest = min(codec.num_semantic_quantizers + 1, codec.num_quantizers)
        if codec.num_semantic_quantizers == codec.num_quantizers:
            lowest = 1
        num_quantizers = codec.num_quantizers
        if codec.quantizer_dropout:
            num_quantizers = int(torch.randint(lowest, codec.num_quantizers + 1, (), generator=generator))
        if self.codebooks is not None:
            num_quantizers = min(num_quantizers, self.codebooks.ready)
        shape = settings.accumulation_steps, self.world_size, self.part_size
        unquantized = torch.rand(shape, generator=generator) < codec.unquantized_rate
        return Draws(num_quantizers, unquantized, torch.rand(shape, generator=generator), generator)

    def _example(self, batch, draws: Draws, part: int) -> Example:
        device = self.accelerator.device
        audio, mask = batch.audio.to(device, non_blocking=True), batch.mask.to(device, non_blocking=True)
        return Example(audio, mask, self.codec.get_audio_codes_mask(mask), draws.crop[part, self.rank].to(device))

    def _run_codec(self, example: Example, draws: Draws, part: int):
        """Audio through the codec; what lies beyond a clip's end is silence."""
        unquantized = draws.unquantized[part, self.rank].to(example.audio.device)
        output = self.parallel_codec(example.audio, num_quantizers=draws.num_quantizers, unquantized=unquantized)
        return output, output.audio_values.float() * example.mask.unsqueeze(1)

    def _discriminator_step(self, examples: list[Example], draws: Draws, output) -> bool:
        rate = learning_rate(
            self.step - self.objective.start,
            self.config.steps - self.objective.start,
            self.config.discriminator_optimizer,
        )
        set_learning_rate(self.discriminator_optimizer, rate)
        self.meters.add({"discriminator_learning_rate": rate})
        parts = len(examples)
        for part, example in enumerate(examples):
            if output is None:
                with torch.no_grad():
                    _, reconstruction = self._run_codec(example, draws, part)
            else:
                _, reconstruction = output
            with self._synchronized(part == parts - 1, self.parallel_discriminator):
                loss, accuracies = self.objective.discriminator_loss(
                    self.parallel_discriminator, example, reconstruction
                )
                self.accelerator.backward(loss / parts)
            self.meters.add({"loss/discriminator": loss, **accuracies})
        return self._apply(
            self.discriminator_optimizer,
            {"discriminator": list(self.discriminator.parameters())},
            self.config.discriminator_optimizer.max_gradient_norm,
        )

    def _codec_step(self, examples: list[Example], draws: Draws, output, adversarial: bool) -> bool:
        parts = len(examples)
        for part, example in enumerate(examples):
            with self._synchronized(part == parts - 1, self.parallel_codec, self.parallel_distillation):
                quantization, reconstruction = output or self._run_codec(example, draws, part)
                # judged by the bare module, without gradients for its weights: none are left over for its next step
                with self._frozen_discriminator(adversarial) as discriminator:
                    losses = self.objective.codec_losses(
                        quantization, reconstruction, example, discriminator, self.parallel_distillation
                    )
                    self.accelerator.backward(self.objective.backward(losses, reconstruction) / parts)
            if self.codebooks is not None:
                self.codebooks.observe(quantization.audio_codes, quantization.residuals, example.frame_mask)
            self.meters.add({f"loss/{name}": value for name, value in losses.items()})
        return self._apply(self.optimizer, self.parts, self.config.optimizer.max_gradient_norm)

    @contextlib.contextmanager
    def _synchronized(self, last: bool, *modules: nn.Module | None) -> Iterator[None]:
        """Let processes exchange gradients in the last part of a step only."""
        with contextlib.ExitStack() as stack:
            for module in modules:
                if module is not None and not last:
                    stack.enter_context(self.accelerator.no_sync(module))
            yield

    @contextlib.contextmanager
    def _frozen_discriminator(self, adversarial: bool) -> Iterator[nn.Module | None]:
        if not adversarial:
            yield None
            return
        self.discriminator.requires_grad_(False)
        try:
            yield self.discriminator
        finally:
            self.discriminator.requires_grad_(True)

    def _apply(self, optimizer, parts: dict[str, list[nn.Parameter]], max_norm: float | None) -> bool:
        """Step on the gradients of `parts` and clear them; not if their norm is not finite or explodes."""
        device = self.accelerator.device
        norms = torch.stack([gradient_norm(parameters, device) for parameters in parts.values()]).cpu()
        total = float(norms.norm())
        good = total <= self.config.exploding_norm  # false for NaN
        if good:
            if max_norm is not None and total > max_norm:
                for parameters in parts.values():
                    scale_gradients(parameters, max_norm / total)
            optimizer.step()
            self.meters.add({f"gradient_norm/{part}": norm for part, norm in zip(parts, norms, strict=True)})
        optimizer.zero_grad(set_to_none=True)
        return good

    def _count(self, good: bool) -> None:
        if good:
            self.skipped_in_a_row = 0
            self.meters.commit()
            return
        self.meters.discard()
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.codebooks is not None:
            self.codebooks.discard()
        if self.objective.balancer is not None:
            self.objective.balancer.discard()
        self.optimizer.zero_grad(set_to_none=True)
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
        values = self.meters.take(self._mean)
        now, wait_s = time.monotonic(), self.loader.report()["wait_s"]
        interval = now - self.logged
        steps = self.step - self.logged_step
        heard_s = steps * self.config.data.batch_size * self.config.data.segment_s
        timing = torch.tensor([heard_s / interval, (wait_s - self.logged_wait_s) / interval])
        values |= dict(zip(("audio_seconds_per_second", "data_wait"), self._mean(timing).tolist(), strict=True))
        self.logged, self.logged_wait_s, self.logged_step = now, wait_s, self.step
        if self.codebooks is not None:
            for name, levels in self.codebooks.statistics().items():
                values |= {f"codebook/{name}_{level}": value for level, value in enumerate(levels, 1)}
        if self.objective.balancer is not None:
            values |= {f"balancer/{name}": norm for name, norm in self.objective.balancer.norms().items()}
        values["skipped_steps"] = self.skipped
        self.reporter.train(self.step, values)
        shown = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
        return {name: f"{value:.3g}" for name, value in shown.items()}

    def _validate(self) -> None:
        """Measure the averaged weights; each process takes its share of the clips."""
        model = averaged_codec(self.codec, self.average.average)
        mine = self.clips[self.rank :: self.world_size]
        part = validate(
            model,
            mine,
            self.objective.mel,
            examples=self.config.validation.examples,
            progress=self.accelerator.is_main_process,
        )
        result = merge(gather_object([part]))
        self.reporter.validation(self.step, result, self.clips, self.sampling_rate)
        name = self.config.best_metric
        score = result.scores[name] * (-1 if name == "mel_distance" else 1)
        best = -math.inf if self.best is None else self.best[name] * (-1 if name == "mel_distance" else 1)
        if score > best:
            self.best = {"step": self.step, **result.scores}

    def _save(self) -> None:
        """Write everything that the run needs to go on, and the averaged weights as a model directory."""
        shared = {
            "step": self.step,
            "elapsed_s": self._elapsed(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "best": self.best,
            "config": draccus.encode(self.config),
            **{name: part.state_dict() for name, part in self._stateful().items()},
        }
        own = {
            "loader": self.loader.state_dict(),
            "meters": self.meters.state_dict(),
            "random": torch.get_rng_state(),
        }
        self.checkpoints.save(
            self.step,
            shared,
            own,
            self.rank,
            self.accelerator.wait_for_everyone,
            extra=self._write_readable,
            best=self.best["step"] if self.best else None,
        )

    def _stateful(self) -> dict[str, Any]:
        """What has a state that all processes share, by its name in a checkpoint."""
        parts = {
            "codec": self.codec,
            "distillation": self.distillation,
            "discriminator": self.discriminator,
            "optimizer": self.optimizer,
            "discriminator_optimizer": self.discriminator_optimizer if self.discriminator is not None else None,
            "average": self.average,
            "balancer": self.objective.balancer,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _write_readable(self, folder: Path) -> None:
        (folder / "config.yaml").write_text(draccus.dump(self.config))
        self._export(folder / "model")

    def _export(self, folder: Path) -> None:
        """The averaged weights in stock's layout, weight norm folded, with the feature extractor."""
        averaged_codec(self.codec, self.average.average).cpu().save_pretrained(folder)
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
        for name, part in self._stateful().items():
            if name not in shared:
                raise ValueError(
                    f"The checkpoints in {self.checkpoints.folder} have no {name}, which this recipe needs: give "
                    "another output_dir, or model.pretrained to start from their weights."
                )
            part.load_state_dict(shared[name])
        self.step = self.logged_step = shared["step"]
        self.elapsed_s = shared["elapsed_s"]
        self.skipped, self.skipped_in_a_row, self.best = shared["skipped"], shared["skipped_in_a_row"], shared["best"]
        if self.codebooks is not None:
            self.codebooks.refresh()
        if own is not None:
            self.loader.load_state_dict(own["loader"])
            self.meters.load_state_dict(own["meters"])
            torch.set_rng_state(own["random"])
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

    def _finish(self) -> None:
        """Export the averaged weights, and sum the run up."""
        if not self.accelerator.is_main_process:
            return
        temporary, final = self.folder / ".model", self.folder / "model"
        shutil.rmtree(temporary, ignore_errors=True)
        self._export(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        count = {"codec": self.codec, "discriminator": self.discriminator, "distillation": self.distillation}
        self.reporter.finish(
            {
                "steps": self.step,
                "audio_hours": self.step * self.config.data.batch_size * self.config.data.segment_s / 3600,
                "training_hours": self._elapsed() / 3600,
                "skipped_steps": self.skipped,
                "parameters": {
                    name: sum(p.numel() for p in module.parameters())
                    for name, module in count.items()
                    if module is not None
                },
                "best_checkpoint": self.best,
                "data": self.loader.report(),
            }
        )
