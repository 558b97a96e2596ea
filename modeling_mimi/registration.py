# Copyright 2026 The open Mimi contributors
# SPDX-License-Identifier: Apache-2.0
"""Making transformers' Auto classes give this Mimi: an explicit call, because it changes what other code loads."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization

from .configuration_mimi import MimiConfig
from .feature_extraction_mimi import MimiFeatureExtractor
from .modeling_mimi import MimiModel


def register() -> None:
    """
    Let `AutoConfig`, `AutoModel`, `AutoModelForAudioTokenization` and `AutoFeatureExtractor` give the classes of this package for
    every checkpoint of type `"mimi"`, in this process. Models that contain a Mimi (CSM, Moshi) then get ours, too.
    """
    AutoConfig.register("mimi", MimiConfig, exist_ok=True)
    AutoModel.register(MimiConfig, MimiModel, exist_ok=True)
    AutoModelForAudioTokenization.register(MimiConfig, MimiModel, exist_ok=True)
    AutoFeatureExtractor.register(MimiConfig, MimiFeatureExtractor, exist_ok=True)
