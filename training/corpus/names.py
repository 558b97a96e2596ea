"""Names of files for clips: safe on every system, told by the clip's own name, and no two alike."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath

import numpy as np

UNSAFE = re.compile(r"[^\w.,()+@=-]+")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""What Windows keeps for devices."""
MAX_LENGTH = 100
"""Characters of a folder or a file."""


def safe_stem(name: str) -> str:
    """A relative path without suffix, for anything: `../a b/c?.wav` gives `a_b/c_`."""
    parts = [part for part in re.split(r"[\\/]+", name.replace("://", "/").replace("::", "/")) if part.strip(" .")]
    if not parts:
        return "clip"
    stem = PurePosixPath(parts[-1])
    if re.fullmatch(r"\.[A-Za-z][A-Za-z0-9]{1,4}", stem.suffix):  # no suffix is what follows a dot in `speaker.0001`
        parts[-1] = stem.stem
    folders = [_safe_part(part).replace(".", "_") for part in parts[:-1]]  # no folder is called as a file may be
    return "/".join([*folders, _safe_part(parts[-1])])


def _safe_part(part: str) -> str:
    part = unicodedata.normalize("NFC", part)
    part = UNSAFE.sub("_", part).strip(" .") or "_"
    if len(part.encode()) > MAX_LENGTH:
        part = part.encode()[:MAX_LENGTH].decode(errors="ignore")
    return f"_{part}" if RESERVED.fullmatch(part) else part


class Names:
    """Gives each of many clips a path of its own; which one depends on all names, and not on the order of asking.

    A path that several clips would have, on a disk that may not tell `A` from `a`, gets the clip's number behind it.

    Args:
        names: Of all clips, in their order; memory holds 8 bytes of each.
    """

    def __init__(self, names: Iterable[str]):
        keys = np.fromiter((_key(safe_stem(name)) for name in names), dtype=np.uint64)
        keys, counts = np.unique(keys, return_counts=True)
        self._shared = set(keys[counts > 1].tolist())

    def stem(self, name: str, number: int) -> str:
        """The path of clip `number`, without suffix."""
        stem = safe_stem(name)
        return f"{stem}~{number}" if _key(stem) in self._shared else stem  # no stem has a ~ of its own


def _key(stem: str) -> int:
    return int.from_bytes(hashlib.blake2b(stem.casefold().encode(), digest_size=8).digest(), "big")
