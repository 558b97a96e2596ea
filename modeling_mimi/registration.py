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
"""Making transformers' Auto classes give this Mimi: an explicit call, because it changes what other code loads."""

import functools
from collections.abc import Callable

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioTokenization,
    EncodecFeatureExtractor,
    PreTrainedConfig,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_mimi import MimiConfig
from .feature_extraction_mimi import MimiFeatureExtractor
from .modeling_mimi import MimiModel
from .pipeline_mimi import PIPELINES


def register() -> None:
    """
    Let `AutoConfig`, `AutoModel`, `AutoModelForAudioTokenization` and `AutoFeatureExtractor` give the classes of this
    package for every checkpoint of type `"mimi"`, in this process, and `pipeline` know the tasks `audio-to-codes`,
    `codes-to-audio` and `audio-to-audio`. Models that contain a Mimi (CSM, Moshi) then get ours, too. Calling it again
    changes nothing.
    """
    AutoConfig.register("mimi", MimiConfig, exist_ok=True)
    AutoModel.register(MimiConfig, MimiModel, exist_ok=True)
    AutoModelForAudioTokenization.register(MimiConfig, MimiModel, exist_ok=True)
    AutoFeatureExtractor.register(MimiConfig, MimiFeatureExtractor, exist_ok=True)
    if not getattr(AutoFeatureExtractor.from_pretrained, "knows_mimi", False):
        ours = _ours_for_mimi(AutoFeatureExtractor.from_pretrained)
        AutoFeatureExtractor.from_pretrained = ours  # ty: ignore[invalid-assignment] replacing it is the point
    for task, pipeline_class in PIPELINES.items():
        if PIPELINE_REGISTRY.supported_tasks.get(task, {}).get("impl") is not pipeline_class:
            PIPELINE_REGISTRY.register_pipeline(task, pipeline_class, pt_model=AutoModel)


def _ours_for_mimi(from_pretrained: Callable) -> Callable:
    """
    Give our feature extractor where stock's would be given for a Mimi.

    The files of every Mimi name stock's `EncodecFeatureExtractor`, which stock users need and EnCodec shares, and that
    name outranks what is registered: so the model type has to be asked for.
    """

    @functools.wraps(from_pretrained)
    def wrapper(pretrained_model_name_or_path, **kwargs):
        extractor = from_pretrained(pretrained_model_name_or_path, **kwargs)
        if type(extractor) is EncodecFeatureExtractor:
            kwargs.pop("trust_remote_code", None)
            try:
                config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
            except OSError:  # a feature extractor without a model
                return extractor
            if config.get("model_type") == "mimi":
                return MimiFeatureExtractor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return extractor

    wrapper.__dict__["knows_mimi"] = True
    return wrapper
