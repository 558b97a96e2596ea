# Copyright 2026 The open Mimi contributors
# SPDX-License-Identifier: Apache-2.0
"""The open Mimi: Kyutai's streaming speech codec as an exact, trainable and fast Hugging Face model."""

from .configuration_mimi import MimiConfig
from .feature_extraction_mimi import MimiFeatureExtractor
from .modeling_mimi import MimiModel
from .modeling_streaming import MimiStream
from .registration import register

__all__ = ["MimiConfig", "MimiFeatureExtractor", "MimiModel", "MimiStream", "register"]
