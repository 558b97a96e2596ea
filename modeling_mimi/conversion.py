# Copyright 2026 The open Mimi contributors
# SPDX-License-Identifier: Apache-2.0
"""Kyutai's native checkpoint files to the transformers layout and back, value for value.

The native file (`tokenizer-e351c8d8-checkpoint125.safetensors`, read by moshi, rustymimi, candle and MLX) differs from
the transformers layout in three ways: other names; q, k and v, each (H, H), fused into one (3H, H); and inside a head
the rows of q and k interleaved, for Kyutai rotate neighbouring pairs of channels where transformers rotates halves.
"""

import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

StateDict = dict[str, torch.Tensor]
Names = dict[str, tuple[str, ...]]  # a native name to ours: one, or three where q, k and v are fused

# Fields that no shape shows, as in the released model. Our native files carry them as metadata, which others ignore.
UNSEEN_FIELDS: dict[str, Any] = {
    "sampling_rate": 24_000,
    "num_attention_heads": 8,
    "sliding_window": 250,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "pad_mode": "constant",
    "dilation_growth_rate": 2,
}
METADATA_KEY = "open_mimi"


def _affine(native: str, ours: str) -> Names:
    return {f"{native}.{parameter}": (f"{ours}.{parameter}",) for parameter in ("weight", "bias")}


HALVES = ("encoder", "decoder")
CONVOLUTION = _affine("conv.conv", "conv")
TRANSPOSED = _affine("convtr.convtr", "conv")
RESIDUAL_UNIT = _affine("block.1.conv.conv", "block.1.conv") | _affine("block.3.conv.conv", "block.3.conv")
SHORTCUT = _affine("shortcut.conv.conv", "shortcut.conv")
TRANSFORMER_LAYER: Names = {
    **_affine("norm1", "input_layernorm"),
    "self_attn.in_proj_weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "self_attn.out_proj.weight": ("self_attn.o_proj.weight",),
    "layer_scale_1.scale": ("self_attn_layer_scale.scale",),
    **_affine("norm2", "post_attention_layernorm"),
    "linear1.weight": ("mlp.fc1.weight",),
    "linear2.weight": ("mlp.fc2.weight",),
    "layer_scale_2.scale": ("mlp_layer_scale.scale",),
}
RESAMPLING: Names = {
    "downsample.conv.conv.conv.weight": ("downsample.conv.weight",),
    "upsample.convtr.convtr.convtr.weight": ("upsample.conv.weight",),
}
BRANCHES = {"rvq_first": "semantic_residual_vector_quantizer", "rvq_rest": "acoustic_residual_vector_quantizer"}
PROJECTIONS: Names = {f"{side}_proj.weight": (f"{side}_proj.weight",) for side in ("input", "output")}
CODEBOOK: Names = {
    "_codebook.embedding_sum": ("codebook.embed_sum",),
    "_codebook.cluster_usage": ("codebook.cluster_usage",),
    "_codebook._initialized": ("codebook.initialized",),
}
# Endings that moshi also reads. Written are those of the released file, which are all that candle reads.
ALIASES = {
    "self_attn.in_proj.weight": "self_attn.in_proj_weight",
    "self_attn.in_projs.0.weight": "self_attn.in_proj_weight",
    "self_attn.out_projs.0.weight": "self_attn.out_proj.weight",
    "_codebook.inited": "_codebook._initialized",
    "_codebook.cluster_size": "_codebook.cluster_usage",
    "_codebook.embed_avg": "_codebook.embedding_sum",
    "_codebook.embed_sum": "_codebook.embedding_sum",
}


def from_native(state_dict: StateDict, num_attention_heads: int = 8) -> StateDict:
    """Rename and unfuse a native state dict into the layout of [`MimiModel`] and of the files of `kyutai/mimi`.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            Tensors under native names, in any spelling that moshi reads. Weight norm is folded.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Heads of both transformers, which no shape shows.

    Returns:
        `dict[str, torch.Tensor]`: the same values under our names; tensors that only change their name are shared.

    Raises:
        `ValueError`: if names are missing or unexpected, or the attention does not split into that many heads.
    """
    native, layout = _open_native(state_dict)
    flat: StateDict = {}
    for name, our_names in _name_table(layout).items():
        parts = [native[name]] if len(our_names) == 1 else _split_attention(native[name], num_attention_heads, name)
        flat.update(zip(our_names, parts, strict=True))
    return flat


def to_native(state_dict: StateDict, num_attention_heads: int = 8) -> StateDict:
    """Exact inverse of [`from_native`]: what `tokenizer-e351c8d8-checkpoint125.safetensors` holds.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            Tensors under our names, of both halves of the model.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Heads of both transformers.

    Returns:
        `dict[str, torch.Tensor]`: the same values under native names; tensors that only change their name are shared.

    Raises:
        `ValueError`: if names are missing (as a whole half may be) or unexpected, or q, k and v are not all (H, H).
    """
    table = _name_table(_Layout.of(state_dict))
    _require_names(state_dict, [name for our_names in table.values() for name in our_names], "transformers")
    native: StateDict = {}
    for name, our_names in table.items():
        parts = [state_dict[our_name] for our_name in our_names]
        native[name] = parts[0] if len(parts) == 1 else _fuse_attention(parts, num_attention_heads, name)
    return native


def detect_format(source: str | os.PathLike | Iterable[str]) -> str:
    """Tell the two layouts apart by their names.

    Args:
        source (`str`, `os.PathLike` or iterable of `str`):
            Path of a safetensors file, or the names of its tensors.

    Returns:
        `str`: `"native"` or `"transformers"`.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if it is not a safetensors file, or the names are of neither layout.
    """
    if isinstance(source, str | os.PathLike):
        source = _read(Path(source))[0]
    names = list(source)
    for layout, stem in (("native", "model"), ("transformers", "layers")):
        if any(name.startswith(tuple(f"{half}.{stem}." for half in HALVES)) for name in names):
            return layout
    hint = ""
    if any(name.startswith(("encoder.encoder", "decoder.decoder")) for name in names):
        hint = "; stock transformers uses such names in memory only: convert what its save_pretrained() writes"
    raise ValueError(f"these are not the weights of a Mimi in a known layout: {_first(names)}{hint}")


def infer_config_fields(state_dict: StateDict, **overrides) -> dict[str, Any]:
    """Fields of [`MimiConfig`] that the shapes in a native state dict show, and the rest as in the released model.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            Tensors under native names.
        overrides (*optional*):
            Fields that the caller knows better, above all those in `UNSEEN_FIELDS`.

    Returns:
        `dict[str, Any]`: keyword arguments of [`MimiConfig`].

    Raises:
        `ValueError`: if names are missing or unexpected.
    """
    native, layout = _open_native(state_dict)
    num_filters, audio_channels, kernel_size = native["encoder.model.0.conv.conv.weight"].shape
    unit_width, _, residual_kernel_size = native["encoder.model.1.block.1.conv.conv.weight"].shape
    last_module = len(layout.seanet("encoder")) - 1
    hidden_size, _, last_kernel_size = native[f"encoder.model.{last_module}.conv.conv.weight"].shape
    codebook_size, codebook_dim = native["quantizer.rvq_first.vq.layers.0._codebook.embedding_sum"].shape
    upsample = native["upsample.convtr.convtr.convtr.weight"].shape if layout.is_resampled else (0, 1, 2)  # stride 1
    transposed = [i for i, names in enumerate(layout.seanet("decoder")) if names is TRANSPOSED]
    ratios = [native[f"decoder.model.{i}.convtr.convtr.weight"].shape[-1] // 2 for i in transposed]
    known = {**UNSEEN_FIELDS, **overrides}
    return {
        "frame_rate": known["sampling_rate"] / (math.prod(ratios) * (upsample[2] // 2)),
        "audio_channels": audio_channels,
        "num_filters": num_filters,
        "kernel_size": kernel_size,
        "last_kernel_size": last_kernel_size,
        "residual_kernel_size": residual_kernel_size,
        "compress": num_filters // unit_width,
        "upsampling_ratios": ratios,
        "num_residual_layers": layout.num_residual_layers,
        "use_conv_shortcut": layout.use_conv_shortcut,
        "hidden_size": hidden_size,
        "num_hidden_layers": layout.num_hidden_layers,
        "intermediate_size": native["encoder_transformer.transformer.layers.0.linear1.weight"].shape[0],
        "upsample_groups": hidden_size // upsample[1],
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
        "vector_quantization_hidden_dimension": native["quantizer.rvq_first.input_proj.weight"].shape[0],
        "num_semantic_quantizers": layout.num_semantic_quantizers,
        "num_quantizers": layout.num_semantic_quantizers + layout.num_acoustic_quantizers,
        "num_key_value_heads": known["num_attention_heads"],
        **known,
    }


def load_native(source: str | os.PathLike, **overrides) -> tuple[dict[str, Any], StateDict]:
    """Read a native file.

    Args:
        source (`str` or `os.PathLike`):
            Path of a native `.safetensors` file, or `owner/repository/file.safetensors` on the Hub.
        overrides (*optional*):
            Fields of [`MimiConfig`] that neither shapes nor the metadata that [`convert`] writes can show.

    Returns:
        `tuple[dict, dict[str, torch.Tensor]]`: keyword arguments of [`MimiConfig`], and the tensors under our names.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if it is a directory, a pickle, not a safetensors file, or not in the native layout.
    """
    native, metadata = _read(_native_path(source))
    fields = infer_config_fields(native, **{**json.loads(metadata.get(METADATA_KEY, "{}")), **overrides})
    return fields, from_native(native, fields["num_attention_heads"])


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str | None = None,
    *,
    overwrite: bool = False,
    **config_overrides,
) -> Path:
    """Convert a checkpoint between the two layouts. The target appears whole or not at all.

    Args:
        source (`str` or `os.PathLike`):
            A native `.safetensors` file (or `owner/repository/file.safetensors` on the Hub), or a directory (or
            repository on the Hub) in the transformers layout.
        target (`str` or `os.PathLike`):
            A name that ends in `.safetensors` asks for a native file, any other for a directory.
        to (`str`, *optional*):
            `"native"` or `"transformers"`, to be told if the target's name asks for the other.
        overwrite (`bool`, *optional*, defaults to `False`):
            Replace an existing file. In an existing directory, only files of the same names are replaced.
        config_overrides (*optional*):
            Fields of [`MimiConfig`] to set, above all those in `UNSEEN_FIELDS`.

    Returns:
        `pathlib.Path`: the target.

    Raises:
        `FileExistsError`: if the target exists, unless `overwrite`.
        `FileNotFoundError`: if the source does not exist; on the Hub, what huggingface_hub raises then.
        `ValueError`: if the source is no Mimi that converts, or already in the layout asked for.
    """
    target = Path(target)
    layout = "native" if target.suffix == ".safetensors" else "transformers"
    if to not in (None, layout):
        raise ValueError(f"to={to!r}, but {target} is the name of a {layout} target: .safetensors means native")
    if not overwrite and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists; pass overwrite=True to replace it")
    with _staged(target) as staged:
        (_write_native if layout == "native" else _write_transformers)(source, staged, config_overrides)
    return target


def _write_transformers(source: str | os.PathLike, folder: Path, overrides: dict[str, Any]) -> None:
    from .configuration_mimi import MimiConfig
    from .feature_extraction_mimi import MimiFeatureExtractor
    from .modeling_mimi import MimiModel

    fields, state_dict = load_native(source, **overrides)
    config = MimiConfig(**fields)
    model = MimiModel(config)
    model.load_state_dict(state_dict)
    model.save_pretrained(folder)
    extractor = MimiFeatureExtractor(feature_size=config.audio_channels, sampling_rate=config.sampling_rate)
    extractor.save_pretrained(folder)


def _write_native(source: str | os.PathLike, path: Path, overrides: dict[str, Any]) -> None:
    from .configuration_mimi import MimiConfig

    if Path(source).is_file():
        raise ValueError(f"{source} is a file in the {detect_format(source)} layout; this way converts a directory")
    weights, _ = _read(_locate(source, "model.safetensors"))
    config = MimiConfig.from_dict({**json.loads(_locate(source, "config.json").read_text()), **overrides})
    fixed = {"hidden_act": "gelu", "norm_eps": 1e-5, "upsample_groups": config.hidden_size}
    if wrong := [f"{k}={getattr(config, k)!r} ({v!r})" for k, v in fixed.items() if getattr(config, k) != v]:
        raise ValueError(f"native readers cannot build this model, but only the value in brackets: {', '.join(wrong)}")
    native = to_native(weights, config.num_attention_heads)
    unseen = {name: getattr(config, name) for name in UNSEEN_FIELDS}
    fields = infer_config_fields(native, **unseen)
    released = MimiConfig(num_quantizers=32)
    if unlike := [f"{k}={v!r} ({getattr(released, k)!r})" for k, v in fields.items() if v != getattr(released, k)]:
        warnings.warn(
            f"unlike the released model (in brackets), this one has {', '.join(unlike)}. moshi's get_mimi() has to be "
            "told so by its mimi_config; rustymimi reads the file only if nothing but num_quantizers differs",
            stacklevel=3,
        )
    save_file(native, path, metadata={"format": "pt", METADATA_KEY: json.dumps(unseen)})


@contextmanager
def _staged(target: Path) -> Generator[Path]:
    """Lend a path beside the target, and move what was written there into place if the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        staged = Path(folder, target.name)
        yield staged
        if target.is_dir():
            for file in staged.iterdir():
                file.replace(target / file.name)
        else:
            staged.replace(target)


class _Layout(NamedTuple):
    """The counts that decide which names a model has, the same in both layouts."""

    num_ratios: int
    num_residual_layers: int
    use_conv_shortcut: bool
    num_hidden_layers: int
    is_resampled: bool
    num_semantic_quantizers: int
    num_acoustic_quantizers: int

    @classmethod
    def of(cls, names: Iterable[str]) -> "_Layout":
        """Count in the fuller half, so that what the other half lacks is found missing."""

        def count(pattern: str, kinds: Iterable[str]) -> int:
            return max(len({m[1] for name in names if (m := re.match(kind + pattern, name))}) for kind in kinds)

        num_ratios = max(0, count(r"\.(?:model|layers)\.(\d+)\.conv(?:tr)?\.", HALVES) - 2)
        return cls(
            num_ratios=num_ratios,
            num_residual_layers=count(r"\.(?:model|layers)\.(\d+)\.block\.", HALVES) // max(1, num_ratios),
            use_conv_shortcut=any(".shortcut." in name for name in names),
            num_hidden_layers=count(r"_transformer\.(?:transformer\.)?layers\.(\d+)\.", HALVES),
            is_resampled=any(name.startswith(("downsample.", "upsample.")) for name in names),
            num_semantic_quantizers=count(r"\S*\.layers\.(\d+)\.", [r"quantizer\.(?:rvq_first|semantic)"]),
            num_acoustic_quantizers=count(r"\S*\.layers\.(\d+)\.", [r"quantizer\.(?:rvq_rest|acoustic)"]),
        )

    def seanet(self, half: str) -> list[Names]:
        """The names in each module of a SEANet, in order; activations have none."""
        units = [RESIDUAL_UNIT | (SHORTCUT if self.use_conv_shortcut else {})] * self.num_residual_layers
        block = [*units, {}, CONVOLUTION] if half == "encoder" else [{}, TRANSPOSED, *units]
        return [CONVOLUTION, *block * self.num_ratios, {}, CONVOLUTION]


def _name_table(layout: _Layout) -> Names:
    modules: list[tuple[str, str, Names]] = [("", "", RESAMPLING)] if layout.is_resampled else []
    for half in HALVES:
        for i, names in enumerate(layout.seanet(half)):
            modules.append((f"{half}.model.{i}.", f"{half}.layers.{i}.", names))
        stem = f"{half}_transformer."
        for i in range(layout.num_hidden_layers):
            modules.append((f"{stem}transformer.layers.{i}.", f"{stem}layers.{i}.", TRANSFORMER_LAYER))
    counts = (layout.num_semantic_quantizers, layout.num_acoustic_quantizers)
    for (native, ours), count in zip(BRANCHES.items(), counts, strict=True):
        modules.append((f"quantizer.{native}.", f"quantizer.{ours}.", PROJECTIONS))
        for i in range(count):
            modules.append((f"quantizer.{native}.vq.layers.{i}.", f"quantizer.{ours}.layers.{i}.", CODEBOOK))
    return {
        native + name: tuple(ours + our_name for our_name in our_names)
        for native, ours, names in modules
        for name, our_names in names.items()
    }


def _open_native(state_dict: StateDict) -> tuple[StateDict, _Layout]:
    """Check a native state dict and bring it to the released file's spellings and plain convolution weights."""
    native = {}
    for name, tensor in state_dict.items():
        alias = next((alias for alias in ALIASES if name.endswith(f".{alias}")), "")
        native[name.removesuffix(alias) + ALIASES.get(alias, "")] = tensor
    for name in [name for name in native if name.endswith(".weight_g")]:
        stem = name.removesuffix("_g")
        if f"{stem}_v" in native:
            magnitude, direction = native.pop(name), native.pop(f"{stem}_v")
            native[stem] = direction * (magnitude / direction.norm(dim=(1, 2), keepdim=True))
    layout = _Layout.of(native)
    _require_names(native, _name_table(layout), "native")
    return native, layout


def _split_attention(fused: torch.Tensor, num_heads: int, name: str) -> tuple[torch.Tensor, ...]:
    """(3H, H) with q and k interleaved to three (H, H) with split halves."""
    width = fused.shape[-1]
    if fused.shape != (3 * width, width) or width % (2 * num_heads):
        raise ValueError(f"{name} of shape {tuple(fused.shape)} is not the q, k and v of {num_heads} heads")
    q, k, v = fused.unflatten(0, (3, width))
    return (*(x.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2) for x in (q, k)), v)


def _fuse_attention(qkv: list[torch.Tensor], num_heads: int, name: str) -> torch.Tensor:
    """Three (H, H) with split halves to (3H, H) with q and k interleaved."""
    width = qkv[0].shape[-1]
    if (shapes := [tuple(x.shape) for x in qkv]) != 3 * [(width, width)] or width % (2 * num_heads):
        raise ValueError(f"{name} cannot be made of q, k and v of {num_heads} heads and shapes {shapes}")
    q, k, v = qkv
    return torch.cat([*(x.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2) for x in (q, k)), v])


def _require_names(names: Iterable[str], expected: Iterable[str], layout: str) -> None:
    missing, unexpected = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"expected a Mimi in the {layout} layout, and this looks like the {detect_format(names)} one. "
            f"Names missing: {_first(missing)}; unexpected: {_first(unexpected)}"
        )


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "none") + more


def _native_path(source: str | os.PathLike) -> Path:
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{source} is a directory, and a native source is one .safetensors file")
    if path.suffix != ".safetensors":
        raise ValueError(f"{source} is not a .safetensors file; pickles can run any code and are never read")
    if path.exists() or path.is_absolute() or len(path.parts) < 3:
        return path
    return _locate("/".join(path.parts[:2]), "/".join(path.parts[2:]))


def _locate(folder: str | os.PathLike, filename: str) -> Path:
    """A file of a directory, or of the repository `owner/name` on the Hub if there is no such directory."""
    path = Path(folder)
    if path.is_dir() or path.is_absolute() or len(path.parts) != 2:
        return path / filename
    return Path(hf_hub_download(str(folder), filename))


def _read(path: Path) -> tuple[StateDict, dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
