"""What the Hub of the tests holds: repositories with their commits, large objects, a log, and faults to order."""

import hashlib
import itertools
import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKEN, READER = "hf_" + "writer" * 6, "hf_" + "reader" * 6
LFS_BYTES = 10_000_000


@dataclass(frozen=True)
class File:
    """A file of a commit; `sha256` is set if it is in LFS."""

    content: bytes
    sha256: str | None = None

    @property
    def oid(self) -> str:
        """Of the git blob: for LFS, of the pointer."""
        blob = self.pointer if self.sha256 else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def pointer(self) -> bytes:
        lines = "version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.content)}"
        return "".join(f"{line}\n" for line in lines).encode()


INITIAL = {".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}


@dataclass(frozen=True)
class Commit:
    title: str
    files: dict[str, File]
    parent: "Commit | None" = None

    @property
    def sha(self) -> str:
        parts = [self.title, self.parent.sha if self.parent else "", *(p + f.oid for p, f in self.files.items())]
        return hashlib.sha1("\0".join(parts).encode()).hexdigest()

    def history(self) -> "list[Commit]":
        """Newest first."""
        return [self, *(self.parent.history() if self.parent else [])]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    refs: dict[str, Commit] = field(default_factory=lambda: {"main": Commit("initial commit", dict(INITIAL))})

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a `refs/...` name or an id means."""
        name = revision.removeprefix("refs/heads/")
        commits = itertools.chain.from_iterable(head.history() for head in self.refs.values())
        return (
            self.refs.get(name) or next((c for c in commits if c.sha == name), None) or fail(404, "RevisionNotFound")
        )


class HubError(Exception):
    """An answer that is not 200."""


def fail(status: int, code: str = "", message: str = "", **headers: str) -> Any:
    raise HubError(status, code, message, headers)


@dataclass
class Hub:
    """Its state, its log, and the faults that it is asked for."""

    url: str = ""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    """`METHOD path` of every request."""
    puts: int = 0
    """LFS uploads so far."""
    dropped_puts: set[int] = field(default_factory=set)
    """LFS uploads, counted from 1, whose connection breaks half-way."""
    held_puts: set[int] = field(default_factory=set)
    """LFS uploads that are never answered, until the Hub closes."""
    holding: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        return self.repos[kind, repo_id]

    def add(self, repo_id: str, files: dict[str, bytes], kind: str = "model", revision: str = "main") -> Commit:
        """Put files into a repository past the API; large and binary ones go to LFS."""
        repo = self.repos.setdefault((kind, repo_id), Repo())
        parent = repo.refs.get(revision) or repo.refs["main"]
        new = {path: File(data, _sha256(data) if is_lfs(data, len(data)) else None) for path, data in files.items()}
        self.objects |= {file.sha256: file.content for file in new.values() if file.sha256}
        repo.refs[revision] = Commit("added", {**parent.files, **new}, parent)
        return repo.refs[revision]

    def count(self, pattern: str) -> int:
        """Requests so far that match."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def environment(self, home: Path, **changes: str) -> dict[str, str]:
        """For a client in a process of its own, with nothing but this Hub in the world."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": TOKEN}
        return {**kept, **own, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **changes}


def is_lfs(sample: bytes, size: int) -> bool:
    return size > LFS_BYTES or b"\0" in sample[:512]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
