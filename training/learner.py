"""The networks and one optimizer step of theirs: what they see, what they are told, and what moves.

`A` parts of a step, `W` processes, `B` clips of a part, `L` samples, `T` frames.
"""

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from modeling_mimi import MimiModel

from .codebooks import CodebookTrainer
from .codec import PARTS, averaged_codec, build_codec, part_parameters
from .config import TrainingConfig
from .data import Batch
from .discriminators import MultiScaleSTFTDiscriminator
from .distillation import Distillation
from .draws import Draws, draw, step_seed
from .ema import WeightAverage
from .meters import Meters
from .objective import Example, Objective
from .optimization import build_optimizer, gradient_norm, learning_rate, scale_gradients, set_learning_rate

Output = tuple[Any, Tensor]
"""The codec's `MimiOutput` of an example, and the reconstruction (B, 1, L), silent beyond the clip's end."""


class Learner:
    """The networks with their optimizers, averages and codebooks, and the step that moves them all.

    `codec`, `discriminator` and `distillation` are the modules as they are; `parallel_*` are the same modules as
    processes run them together.
    """

    def __init__(self, config: TrainingConfig, accelerator: Accelerator):
        self.config = config
        self.accelerator = accelerator
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.codec = build_codec(config.model)
        self.objective = Objective(config, self.codec.config, accelerator.device, accelerator.autocast)
        self.discriminator: Any = None
        self.parallel_discriminator: Any = None
        self.discriminator_optimizer: Any = None
        self.distillation: Any = None
        self.parallel_distillation: Any = None
        self.parts = {part: part_parameters(self.codec, part) for part in PARTS}
        trained: list[nn.Module] = [self.codec]
        if self.objective.teacher is not None and "distillation" in self.objective.weights:
            self.distillation = Distillation(self.codec.config.codebook_dim, self.objective.teacher.hidden_size)
            self.parallel_distillation = accelerator.prepare(self.distillation)
            self.parts["distillation"] = list(self.distillation.parameters())
            trained.append(self.distillation)
        if self.objective.has_discriminator:
            self._build_discriminator()
        self.parallel_codec = accelerator.prepare(self.codec)
        self.optimizer = accelerator.prepare(build_optimizer(trained, config.optimizer))
        self.average = WeightAverage(self.codec, config.weights_decay)
        self.codebooks = self._build_codebooks() if "quantizer" in config.model.trainable else None
        self.meters = Meters()

    def _build_discriminator(self) -> None:
        self.discriminator = MultiScaleSTFTDiscriminator(self.config.discriminator)
        if self.config.model.compile:
            self.discriminator.compile()
        self.parallel_discriminator = self.accelerator.prepare(self.discriminator)
        optimizer = build_optimizer([self.discriminator], self.config.discriminator_optimizer)
        self.discriminator_optimizer = self.accelerator.prepare(optimizer)

    def _build_codebooks(self) -> CodebookTrainer:
        codebooks = CodebookTrainer(
            self.codec.quantizer,
            self.config.codebooks,
            self.rank,
            self.world_size,
            total=lambda x: self.accelerator.reduce(x, "sum"),
            gather=self.accelerator.gather,
        )
        if self.config.model.pretrained is None:
            codebooks.restart()
        return codebooks

    # ---- state

    def _stateful(self) -> dict[str, Any]:
        """What has a state that all processes share, by its name in a checkpoint."""
        parts = {
            "codec": self.codec,
            "distillation": self.distillation,
            "discriminator": self.discriminator,
            "optimizer": self.optimizer,
            "discriminator_optimizer": self.discriminator_optimizer,
            "average": self.average,
            "balancer": self.objective.balancer,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Everything that all processes share; the codebooks are buffers of the codec."""
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """`KeyError` if the state lacks a network of this recipe."""
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        if self.codebooks is not None:
            self.codebooks.refresh()

    # ---- the step

    def step(self, step: int, batches: list[Batch]) -> bool:
        """Step number `step`, from 0, on this process's `A` parts of the batch.

        Returns whether it counts: not if gradients were not finite or exploded, and then nothing has moved but
        perhaps the discriminator.
        """
        draws = self._draw(step, batches)
        examples = [self._example(batch, draws, part) for part, batch in enumerate(batches)]
        self._initialize_codebooks(examples, draws)
        # taken in parts, the codec runs twice: the discriminator moves after it has seen the whole batch
        output = self._run_codec(examples[0], draws, 0) if len(examples) == 1 else None
        good = not self.objective.discriminator_learns(step) or self._discriminator_step(step, examples, draws, output)
        good = good and self._codec_step(step, examples, draws, output)
        if good:
            self._follow(step, draws)
        else:
            self._discard()
        return good

    def _follow(self, step: int, draws: Draws) -> None:
        """What follows the optimizers: codebooks, balancer, averages, meters."""
        if self.codebooks is not None:
            self.meters.add({"codebook/replaced": float(self.codebooks.update(step, draws.generator))})
        if self.objective.balancer is not None:
            self.objective.balancer.update(self.mean)
        self.average.update(self.codec)
        self.meters.add({"num_quantizers": float(draws.num_quantizers)})
        self.meters.commit()

    def _discard(self) -> None:
        self.meters.discard()
        if self.codebooks is not None:
            self.codebooks.discard()
        if self.objective.balancer is not None:
            self.objective.balancer.discard()

    def observations(self) -> dict[str, float]:
        """What a log entry says: means since the last one, and where the codebooks and the balancer stand."""
        values = self.meters.take(self.mean)
        if self.codebooks is not None:
            for name, levels in self.codebooks.statistics().items():
                values |= {f"codebook/{name}_{level}": value for level, value in enumerate(levels, 1)}
        if self.objective.balancer is not None:
            values |= {f"balancer/{name}": norm for name, norm in self.objective.balancer.norms().items()}
        return values

    def averaged(self) -> MimiModel:
        """The averaged weights as a model for inference."""
        return averaged_codec(self.codec, self.average.average)

    def num_parameters(self) -> dict[str, int]:
        """Parameters of each network."""
        networks = {"codec": self.codec, "discriminator": self.discriminator, "distillation": self.distillation}
        return {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items() if net is not None}

    def mean(self, x: Tensor) -> Tensor:
        """A tensor averaged over processes."""
        return self.accelerator.reduce(x.to(self.accelerator.device, torch.float32), "mean")

    # ---- what the networks see

    def _draw(self, step: int, batches: list[Batch]) -> Draws:
        # whatever else draws does so by step and process too, and is alike after a resume
        torch.manual_seed(step_seed(self.config.seed, step) + self.rank)
        shape = len(batches), self.world_size, len(batches[0].audio)
        ready = self.codec.config.num_quantizers if self.codebooks is None else self.codebooks.ready
        return draw(self.codec.config, self.config.seed, step, shape, ready)

    def _example(self, batch: Batch, draws: Draws, part: int) -> Example:
        device = self.accelerator.device
        audio, mask = batch.audio.to(device, non_blocking=True), batch.mask.to(device, non_blocking=True)
        return Example(audio, mask, self.codec.get_audio_codes_mask(mask), draws.crop[part, self.rank].to(device))

    def _initialize_codebooks(self, examples: list[Example], draws: Draws) -> None:
        """While a level that the step uses has no entries yet, take them from the batch."""
        if self.codebooks is None:
            return
        for _ in range(draws.num_quantizers):
            if all(self.codebooks.initialized[: draws.num_quantizers]):
                return
            with torch.no_grad():
                for part, example in enumerate(examples):
                    output, _ = self._run_codec(example, draws, part)
                    self.codebooks.observe(output.audio_codes, output.residuals, example.frame_mask)
            self.codebooks.initialize(draws.generator)

    def _run_codec(self, example: Example, draws: Draws, part: int) -> Output:
        unquantized = draws.unquantized[part, self.rank].to(example.audio.device)
        output = self.parallel_codec(example.audio, num_quantizers=draws.num_quantizers, unquantized=unquantized)
        return output, output.audio_values.float() * example.mask.unsqueeze(1)

    # ---- what moves

    def _discriminator_step(self, step: int, examples: list[Example], draws: Draws, output: Output | None) -> bool:
        rate = learning_rate(
            step - self.objective.discriminator_start,
            self.config.steps - self.objective.discriminator_start,
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

    def _codec_step(self, step: int, examples: list[Example], draws: Draws, output: Output | None) -> bool:
        rate = learning_rate(step, self.config.steps, self.config.optimizer)
        set_learning_rate(self.optimizer, rate)
        self.meters.add({"learning_rate": rate})
        parts = len(examples)
        for part, example in enumerate(examples):
            with self._synchronized(part == parts - 1, self.parallel_codec, self.parallel_distillation):
                quantization, reconstruction = output or self._run_codec(example, draws, part)
                # judged by the bare module, without gradients for its weights: none are left over for its next step
                with self._frozen_discriminator(self.objective.is_adversarial(step)) as discriminator:
                    losses = self.objective.codec_losses(
                        quantization, reconstruction, example, discriminator, self.parallel_distillation
                    )
                    self.accelerator.backward(self.objective.backward(losses, reconstruction) / parts)
            if self.codebooks is not None:
                self.codebooks.observe(quantization.audio_codes, quantization.residuals, example.frame_mask)
            self.meters.add({f"loss/{name}": value for name, value in losses.items()})
        return self._apply(self.optimizer, self.parts, self.config.optimizer.max_gradient_norm)

    @contextlib.contextmanager
    def _synchronized(self, last: bool, *modules: nn.Module | None) -> Generator[None]:
        """Let processes exchange gradients in the last part of a step only."""
        with contextlib.ExitStack() as stack:
            for module in modules:
                if module is not None and not last:
                    stack.enter_context(self.accelerator.no_sync(module))
            yield

    @contextlib.contextmanager
    def _frozen_discriminator(self, adversarial: bool) -> Generator[nn.Module | None]:
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
