"""From a staged folder to the Hub: what differs from what is there goes up in one commit, or nothing does.

Large files reach the Hub's storage first and show nowhere until the commit names them. So a run that was killed leaves
the repository as it was, and the next one sends only what is missing.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import httpx, sha

LFS_BYTES = 10_000_000
"""The Hub keeps files above this, and binary ones, in LFS; of files that it has, it says so itself."""
OURS = re.compile(
    r"[^/]+\.safetensors(\.index\.json)?|(modeling|configuration|feature_extraction|pipeline)_\w+\.py"
    r"|(samples|evaluation)/.+"
)
"""What a model repository has from here: a file of it that is no longer made would be stale, and is removed."""
HUB_ERRORS = (OSError, RuntimeError, ValueError, httpx.HTTPError)
"""What its client raises."""


class PublishError(Exception):
    """Nothing was published; the message says why, and what to do."""


class Target(NamedTuple):
    """Where to publish."""

    repo_id: str
    repo_type: Literal["model", "dataset", "space"] = "model"
    revision: str = "main"
    private: bool = False
    create_pr: bool = False

    def __str__(self) -> str:
        kind = {"model": "the model", "dataset": "the data set", "space": "the Space"}[self.repo_type]
        return f"{kind} {self.repo_id}" + (f" at {self.revision}" if self.revision != "main" else "")


class Change(NamedTuple):
    """A file, here against there."""

    path: str
    size: int
    """Bytes; of a removed file, those that it had."""
    lfs: bool
    state: Literal["new", "changed", "same", "removed"]


class Remote(NamedTuple):
    """What the Hub has."""

    commit: str
    files: dict[str, RepoFile]
    private: bool


def fetch(target: Target, api: HfApi) -> Remote | None:
    """What the Hub has there now; `None` if there is no such repository or branch.

    Raises:
        PublishError: the Hub does not say.
    """
    repo, kind = target.repo_id, target.repo_type
    try:
        info = api.repo_info(repo, repo_type=kind, revision=target.revision)
        entries = api.list_repo_tree(repo, repo_type=kind, revision=info.sha, recursive=True)
        files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        return Remote(str(info.sha), files, bool(info.private))
    except GatedRepoError as error:
        raise PublishError(explain(error, target)) from error
    except (RepositoryNotFoundError, RevisionNotFoundError):  # a refused token is another error
        return None
    except HUB_ERRORS as error:
        raise PublishError(explain(error, target)) from error


def compare(folder: Path, remote: Remote | None, target: Target) -> list[Change]:
    """Every staged file, and what is stale on the Hub, by path."""
    there = remote.files if remote else {}
    changes = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        known = there.get(name)
        if known is None:
            with path.open("rb") as file:
                lfs = size > LFS_BYTES or b"\0" in file.read(512)
            changes.append(Change(name, size, lfs, "new"))
        else:
            same = known.size == size and _digest(path, known) == (known.lfs.sha256 if known.lfs else known.blob_id)
            changes.append(Change(name, size, bool(known.lfs), "same" if same else "changed"))
    kept = {change.path for change in changes}
    stale = [file for name, file in there.items() if name not in kept and OURS.fullmatch(name)]
    if target.repo_type == "model":
        changes += [Change(file.path, file.size, bool(file.lfs), "removed") for file in stale]
    return sorted(changes)


def publish(folder: Path, target: Target, message: str, api: HfApi) -> tuple[str | None, list[Change]]:
    """Make the repository what the staged folder is, in one commit.

    Args:
        folder: what goes up, all of it.
        target: where to; a repository or branch that is missing is made.
        message: of the commit.
        api: the Hub.

    Returns:
        The address of the commit or pull request, `None` if nothing differed, and what was compared.

    Raises:
        PublishError: the Hub cannot be reached or refuses; it shows what it showed before.
    """
    if not (api.token or get_token()):
        raise PublishError("There is no token: log in with `hf auth login`, or set HF_TOKEN to one that may write.")
    try:
        remote = _open(folder, target, api)
        changes = compare(folder, remote, target)
        operations = list(_operations(folder, changes))
        if not operations:
            return None, changes
        # not upload_folder: with Xet it makes several commits, and between them half a repository shows
        commit = api.create_commit(
            target.repo_id,
            operations,
            commit_message=message,
            repo_type=target.repo_type,
            revision=target.revision,
            create_pr=target.create_pr,
            parent_commit=remote.commit,  # whoever else publishes at the same time is not overwritten
        )
    except HUB_ERRORS as error:
        raise PublishError(explain(error, target)) from error
    return commit.pr_url or commit.commit_url, changes


def _open(folder: Path, target: Target, api: HfApi) -> Remote:
    """What the Hub has, after making the repository and the branch if they are missing."""
    repo, kind = target.repo_id, target.repo_type
    remote = fetch(target, api)
    if remote is None:
        sdk = _sdk(folder / "README.md") if kind == "space" else None
        api.create_repo(repo, repo_type=kind, private=target.private, space_sdk=sdk, exist_ok=True)
        if target.revision != "main":
            api.create_branch(repo, repo_type=kind, branch=target.revision, exist_ok=True)
        remote = fetch(target, api)
    if remote is None:
        raise PublishError(f"The Hub does not show {target}, not even after making it: try again in a minute.")
    if target.private and not remote.private:
        raise PublishError(f"{target.repo_id} is public already: make it private in its settings first.")
    return remote


def _operations(folder: Path, changes: list[Change]) -> Iterator[CommitOperationAdd | CommitOperationDelete]:
    for change in changes:
        if change.state == "removed":
            yield CommitOperationDelete(change.path)
        elif change.state != "same":
            yield CommitOperationAdd(change.path, folder / change.path)


def _digest(path: Path, known: RepoFile) -> str:
    """Of a file here, in the way that the Hub names the one that it has."""
    with path.open("rb") as file:
        return sha.sha_fileobj(file).hex() if known.lfs else sha.git_hash(file.read())


def _sdk(card: Path) -> str:
    """What the card of a Space says that it is built with."""
    header = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8"), re.S)
    sdk = (yaml.safe_load(header[1]) or {}).get("sdk") if header else None
    if sdk is None:
        raise PublishError(
            "README.md names no `sdk` in its header, which every Space needs: gradio, docker or static."
        )
    return sdk


def explain(error: Exception, target: Target) -> str:
    """One sentence on what went wrong between us and the Hub, and what to do."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # of an upload: which file, not why
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = error.response.headers.get("X-Error-Message") or getattr(error, "server_message", None)
        reasons = {
            401: "The Hub refuses the token: log in again with `hf auth login`, or set HF_TOKEN to a valid one.",
            403: f"The token may not write to {target}: the Hub says {said!r}.",
            404: f"The Hub has no {target.repo_id}, or the token may not see it.",
            412: f"Somebody changed {target} meanwhile: the same command tries again.",
            409: f"Somebody changes {target} right now: the same command tries again.",
            429: "The Hub has had too many requests: the same command goes on later.",
        }
        if isinstance(error, GatedRepoError):
            return f"{target.repo_id} is gated: ask for access on its page, with the account of the token."
        fallback = f"The Hub answers {status} for {target}" + (f": {said}" if said else ".")
        return reasons.get(status, fallback)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: nothing can be published without the Hub."
    if isinstance(error, httpx.HTTPError):
        return f"The Hub cannot be reached ({type(error).__name__}): the same command goes on where it stopped."
    return " ".join(str(error).split())
