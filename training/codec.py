"""The model that a run trains: fresh or pretrained, its parts, and which of them train."""

import torch
from torch import nn
from torch._functorch import config as functorch

from modeling_mimi import MimiConfig, MimiModel
from modeling_mimi.modeling_transformer import MimiLayerScale, MimiTransformer

from .config import ModelConfig

PARTS = {
    "encoder": ("encoder", "encoder_transformer", "downsample"),
    "quantizer": ("quantizer",),
    "decoder": ("upsample", "decoder_transformer", "decoder"),
}


def build_codec(config: ModelConfig) -> MimiModel:
    """The model in training mode, with what does not train frozen."""
    if config.pretrained is None:
        model = MimiModel(MimiConfig(**config.config))
        widen_convolutions(model, config.initial_gain)
    else:
        model = MimiModel.from_pretrained(config.pretrained, revision=config.revision, **config.config)
    model = model.float().train()
    if config.weight_norm:
        model.apply_weight_norm()
    for part in PARTS:
        for parameter in part_parameters(model, part):
            parameter.requires_grad_(part in config.trainable)
    for name in config.without:
        hold_at_identity(getattr(model, name))
    if model.config.num_semantic_quantizers == model.config.num_quantizers:
        # without acoustic levels their projections would never get a gradient, which data-parallel wrappers refuse
        model.quantizer.acoustic_residual_vector_quantizer.requires_grad_(False)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        # the balancer goes back through the discriminator once per loss, which buffers given away do not survive
        functorch.donated_buffer = False  # ty: ignore[invalid-assignment]
        model.compile()
    return model


@torch.no_grad()
def widen_convolutions(model: MimiModel, gain: float) -> None:
    """Multiply the convolutions' weights, not their biases; codebooks and transformers stay."""
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            module.weight.mul_(gain)


def hold_at_identity(transformer: MimiTransformer) -> None:
    """Zero the layer scales, so that each layer adds nothing: an ablation that stock's layout can hold."""
    for module in transformer.modules():
        if isinstance(module, MimiLayerScale):
            nn.init.zeros_(module.scale)
    transformer.requires_grad_(False)


def part_parameters(model: MimiModel, part: str) -> list[nn.Parameter]:
    """All parameters of a part, trained or not."""
    modules = [getattr(model, name) for name in PARTS[part]]
    return [parameter for module in modules if module is not None for parameter in module.parameters()]


def averaged_codec(model: MimiModel, average: dict) -> MimiModel:
    """A model for inference with averaged weights, weight norm folded; `model` gives the shape.

    The weights are loaded by name and strictly, so an average of something else is an error, not a silent no-op.
    """
    averaged = MimiModel(model.config).to(model.device)
    if any(name.endswith("original0") for name in average):
        averaged.apply_weight_norm()
    averaged.load_state_dict(average, strict=True)
    averaged.remove_weight_norm()
    return averaged.eval()
