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
"""The open Mimi: Kyutai's streaming speech codec as an exact, trainable and fast Hugging Face model."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_mimi import MimiConfig
    from .feature_extraction_mimi import MimiFeatureExtractor
    from .modeling_mimi import MimiModel
    from .modeling_streaming import MimiStream
    from .pipeline_mimi import (
        MimiAudioToAudioPipeline,
        MimiAudioToCodesPipeline,
        MimiCodesToAudioPipeline,
        save_pipelines,
    )
    from .registration import register

__all__ = [
    "MimiAudioToAudioPipeline",
    "MimiAudioToCodesPipeline",
    "MimiCodesToAudioPipeline",
    "MimiConfig",
    "MimiFeatureExtractor",
    "MimiModel",
    "MimiStream",
    "register",
    "save_pipelines",
]

_HOMES = {
    "MimiAudioToAudioPipeline": "pipeline_mimi",
    "MimiAudioToCodesPipeline": "pipeline_mimi",
    "MimiCodesToAudioPipeline": "pipeline_mimi",
    "MimiConfig": "configuration_mimi",
    "MimiFeatureExtractor": "feature_extraction_mimi",
    "MimiModel": "modeling_mimi",
    "MimiStream": "modeling_streaming",
    "register": "registration",
    "save_pipelines": "pipeline_mimi",
}


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: `mimi --help` need not wait for PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
