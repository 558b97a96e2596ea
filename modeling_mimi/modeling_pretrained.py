# Copyright 2026 The open Mimi contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What every Mimi model shares: how weights are initialised, loaded, laid out in memory, normed and saved."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME, auto_docstring

from .configuration_mimi import MimiConfig
from .modeling_convolution import MimiConv1d, MimiConvTranspose1d
from .modeling_quantizer import MimiCodebook
from .modeling_seanet import MimiSEANet
from .modeling_transformer import MimiLayerScale


@auto_docstring
class MimiPreTrainedModel(PreTrainedModel):
    config: MimiConfig
    base_model_prefix = "mimi"
    main_input_name = "input_values"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MimiTransformerLayer", "MimiResnetBlock", "MimiSplitResidualVectorQuantizer"]
    _keep_in_fp32_modules_strict = ["quantizer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation of convolutions, as Kyutai train with; stock's is 2.45 times wider."""
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            fan_in = nn.init._calculate_fan_in_and_fan_out(module.weight)[0]
            bound = fan_in**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, MimiLayerScale):
            init.constant_(module.scale, self.config.layer_scale_initial_scale)
        elif isinstance(module, MimiCodebook):
            init.ones_(module.initialized)
            init.ones_(module.cluster_usage)
            init.zeros_(module.embed_sum)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """
        As in [`PreTrainedModel`], from safetensors alone; the weights are then laid out in memory as the kernels take
        them.

        Raises:
            `OSError`: if there are no weights in safetensors.
        """
        kwargs["use_safetensors"] = True
        try:
            loaded = super().from_pretrained(*args, **kwargs)
        except OSError as error:
            if f"file named {SAFE_WEIGHTS_NAME}" not in str(error):
                raise
            raise OSError(
                f"{args[0] if args else 'The model'} has no {SAFE_WEIGHTS_NAME}. Pickles, such as {WEIGHTS_NAME}, can "
                "run any code and are never read: load one that you trust with stock transformers, and save it again."
            ) from error
        (loaded[0] if isinstance(loaded, tuple) else loaded).channels_last_()
        return loaded

    def channels_last_(self) -> "MimiPreTrainedModel":
        """Lay the convolutions' weights out channels-last: the same weights and shapes, and the fast kernels."""
        for module in self.modules():
            if isinstance(module, (MimiConv1d, MimiConvTranspose1d)):
                module.channels_last_()
        return self

    def apply_weight_norm(self) -> None:
        """Train SEANet's convolutions as direction and magnitude, as Kyutai do. Saving folds them back."""
        for convolution in self._seanet_convolutions():
            if not nn.utils.parametrize.is_parametrized(convolution):
                nn.utils.parametrizations.weight_norm(convolution)

    def remove_weight_norm(self) -> None:
        """Fold directions and magnitudes into plain weights, for inference."""
        for convolution in self._seanet_convolutions():
            if nn.utils.parametrize.is_parametrized(convolution):
                nn.utils.parametrize.remove_parametrizations(convolution, "weight")
        self.channels_last_()

    def _seanet_convolutions(self) -> Iterator[nn.Conv1d | nn.ConvTranspose1d]:
        for seanet in (module for module in self.modules() if isinstance(module, MimiSEANet)):
            yield from (m for m in seanet.modules() if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d)))

    def save_pretrained(self, save_directory, *args, state_dict: dict[str, Tensor] | None = None, **kwargs):
        """As in [`PreTrainedModel`]; weight norm is folded in what is saved, and stays switched on in the model."""
        state_dict = self.state_dict() if state_dict is None else dict(state_dict)
        for name in [name for name in state_dict if name.endswith(".parametrizations.weight.original0")]:
            prefix = name.removesuffix(".parametrizations.weight.original0")
            magnitude, direction = state_dict.pop(name), state_dict.pop(name[:-1] + "1")
            state_dict[f"{prefix}.weight"] = torch._weight_norm(direction, magnitude, 0)
        # the code that travels along serves both Auto classes; transformers notes only the one it was registered for
        self.config.auto_map = {
            **(getattr(self.config, "auto_map", None) or {}),
            "AutoModelForAudioTokenization": f"{type(self).__module__.rsplit('.', 1)[-1]}.{type(self).__name__}",
        }
        if offered := getattr(self.config, "custom_pipelines", None):  # that file stays behind, see `save_pipelines`
            ours = {task for task, entry in offered.items() if entry["impl"].startswith("pipeline_mimi.")}
            self.config.custom_pipelines = {task: entry for task, entry in offered.items() if task not in ours}
        return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
