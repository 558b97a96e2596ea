"""What must not leave this machine: secrets, and paths that tell about it, in files that are about to be published."""

import itertools
import mmap
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SECRETS = {
    "a Hugging Face token": rb"hf_(?<!\whf_)[A-Za-z0-9]{30,}",
    "a Hugging Face token of an organisation": rb"api_org_[A-Za-z0-9]{30,}",
    "a GitHub token": rb"gh[opsur]_(?<!\w....)[A-Za-z0-9]{36,}",
    "a fine-grained GitHub token": rb"github_pat_\w{22,}",
    "a GitLab token": rb"glpat-[\w-]{20,}",
    "an API key": rb"sk-(?<!\wsk-)[\w-]{20,}",
    "an AWS key": rb"A(?:KI|SI)A(?<!\w....)[0-9A-Z]{16}\b",
    "a Google key": rb"AIza[\w-]{35}",
    "a Slack token": rb"xox[abeoprs]-[\w-]{10,}",
    "a PyPI token": rb"pypi-AgEI[\w-]{50,}",
    "a private key": rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a password in an address": rb"://[^\s/:@\"'<>]+:[^\s/@\"'<>]+@[\w-]+",
}
"""What each kind looks like. Each begins with letters as they are, which are found fast, and looks back from there."""
NAMED = (
    "a secret",
    re.compile(rb"(?i)(?:key|secret|token|passw(?:or)?d)\\?[\"']?\s*[:=]\s*\\?[\"'][\w+/=.-]{16,}\\?[\"']"),
)
"""One by its name; looked for in text alone, which is slow."""
PRIVATE_PATH = rb"/(?<![\w.:/~-]/)(?:home|Users|root)/[\w.-]+[\w./-]*"
WINDOWS_PATH = rb":\\{1,2}Users\\{1,2}[\w.-]+[\w.\\-]*"
"""Below a home folder, wherever it is from."""
ABSOLUTE_PATH = rb"/(?<![\w.:/~\\-]/)[\w.-]+/[\w.-]+[\w./-]*"
"""An absolute path, which is private if it leads into this machine."""
SYSTEM = {"bin", "dev", "etc", "lib", "lib64", "proc", "sbin", "sys", "usr"}
"""Folders that are alike on all machines."""
REVOKE = "take it out and revoke it where it was issued: a secret in a file is no longer one"
RENAME = "it tells about this machine: write the name alone, or a path relative to the repository"

Patterns = list[tuple[str, re.Pattern[bytes]]]


class Finding(NamedTuple):
    """Something that must not be published."""

    path: str
    """Of the file, in the repository."""
    place: str
    """Line number, `metadata` of a safetensors file, or byte offset in another binary file."""
    what: str
    """Its kind and, for a path, the path; of a secret only its first letters."""
    advice: str

    def __str__(self) -> str:
        return f"{self.path}:{self.place}: {self.what}; {self.advice}"


def scan(folder: Path, known: Iterable[str] = ()) -> list[Finding]:
    """Search every file below a folder. Of safetensors files it reads the metadata; compressed data hides from it.

    Args:
        folder: what is to be published.
        known: secrets to look for as they are, such as the token in use.
    """
    literal = [("the token in use", re.compile(re.escape(secret.encode()))) for secret in known if secret]
    patterns = [*literal, *((what, re.compile(pattern)) for what, pattern in SECRETS.items())]
    findings = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
        name = path.relative_to(folder).as_posix()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if path.suffix == ".safetensors":
                header = data[8 : 8 + int.from_bytes(data[:8], "little")]
                findings += [Finding(name, "metadata", *found) for found, _ in _search(header, [*patterns, NAMED])]
            elif data.find(b"\0") >= 0:
                findings += [Finding(name, f"byte {start}", *found) for found, start in _search(data, patterns)]
            else:
                for found, start in _search(data, [*patterns, NAMED]):
                    findings.append(Finding(name, str(data[:start].count(b"\n") + 1), *found))
    return list(dict.fromkeys(findings))


def _search(data: bytes | mmap.mmap, patterns: Patterns) -> Iterator[tuple[tuple[str, str], int]]:
    """What is found, with what to do about it, and where it starts; what looks like two secrets is the first."""
    covered: set[int] = set()
    for what, pattern in patterns:
        for match in pattern.finditer(data):
            if covered.isdisjoint(range(*match.span())):
                covered |= set(range(*match.span()))
                yield (f"{what} ({_text(match)[:6]}...)", REVOKE), match.start()
    for match in itertools.chain(re.finditer(PRIVATE_PATH, data), re.finditer(WINDOWS_PATH, data)):
        yield (f"a private path ({_text(match)})", RENAME), match.start()
    for match in re.finditer(ABSOLUTE_PATH, data):
        first, second = Path(_text(match)).parts[1:3]
        if first not in SYSTEM | {"home", "Users", "root"} and Path("/", first, second).exists():
            yield (f"a path of this machine ({_text(match)})", RENAME), match.start()


def _text(match: re.Match[bytes]) -> str:
    return match[0].decode(errors="replace")
