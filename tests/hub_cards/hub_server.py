"""A Hub for tests: the calls that `huggingface_hub` makes, over HTTP on a loopback address, all in memory.

    with serve() as hub:
        subprocess.run(command, env=hub.environment(home))

The client reads its address at import, so it runs in a process of its own, or with an `HfApi(endpoint=hub.url)`.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_state import READER, TOKEN, Commit, File, Hub, HubError, Repo, fail, is_lfs


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A Hub that runs while inside."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


ROUTES: list[tuple[str, re.Pattern, Callable]] = []
API = r"/api/(?P<kind>model|dataset|space)s/(?P<repo_id>[^/]+/[^/]+)"
FILES = r"/(?:(?P<kinds>dataset|space)s/)?(?P<repo_id>[^/]+/[^/]+)"


def route(method: str, pattern: str) -> Callable:
    """Answer `METHOD pattern` with what the function returns, as JSON; groups of the pattern are its arguments."""

    def keep(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return keep


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self) -> None:
        parts, self.received = urlsplit(self.path), None
        self.query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        self.hub.requests.append(f"{self.command} {unquote(parts.path)}")
        try:
            for method, pattern, function in ROUTES:
                method_fits = self.command == method or (self.command, method) == ("HEAD", "GET")
                if method_fits and (match := pattern.fullmatch(parts.path)):
                    groups = {name: value and unquote(value) for name, value in match.groupdict().items()}
                    if "kinds" in groups:
                        groups["kind"] = groups.pop("kinds") or "model"
                    return function(self, **groups)
            fail(404, message=f"this Hub knows no {self.command} {parts.path}")
        except HubError as error:
            status, code, message, headers = error.args
            self.body()
            named = {"X-Error-Code": code, "X-Error-Message": message or code, **headers}
            self.send(json.dumps({"error": message or code}).encode(), status, **named)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, value: Any) -> None:
        self.send(json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def body(self) -> bytes:
        """What the client sends with this request."""
        if self.received is None and self.headers.get("Transfer-Encoding") == "chunked":
            self.received = b""
            while length := int(self.rfile.readline(), 16):
                self.received += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        elif self.received is None:
            self.received = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return self.received

    def token(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token not in (None, TOKEN, READER):
            fail(401, message="Invalid credentials in Authorization header")
        return token

    def readable(self, repo_id: str, kind: str) -> Repo:
        token, repo = self.token(), self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and token is None):
            fail(404 if token else 401, "RepoNotFound", "Repository not found")
        if repo.gated and token != TOKEN:
            fail(403, "GatedRepo", "Access to this model is restricted")
        return repo

    def writable(self, repo_id: str, kind: str) -> Repo:
        repo = self.readable(repo_id, kind)
        self.writer()
        return repo

    def writer(self) -> None:
        if self.token() != TOKEN:
            fail(403 if self.token() else 401, message="You are not allowed to write here")


@route("POST", "/api/repos/create")
def _create(call: _Handler) -> None:
    call.writer()
    wanted = json.loads(call.body())
    name, kind = f"{wanted['organization']}/{wanted['name']}", wanted.get("type") or "model"
    if (kind, name) in call.hub.repos:
        fail(409, message="You already created this repository")
    call.hub.repos[kind, name] = Repo(private=wanted.get("visibility") == "private")
    call.json({"url": f"{call.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"})


@route("POST", "/api/validate-yaml")
def _validate(call: _Handler) -> None:
    content = json.loads(call.body())["content"]
    if not re.match(r"---\n.+?\n---\n", content, re.S):
        answer = {"errors": [{"message": "the card has no metadata"}], "warnings": []}
        return call.send(json.dumps(answer).encode(), 400)
    return call.json({"errors": [], "warnings": []})


@route("GET", API + "(?:/revision/(?P<revision>[^/]+))?")
def _info(call: _Handler, kind: str, repo_id: str, revision: str | None) -> None:
    repo = call.readable(repo_id, kind)
    commit = repo.at(revision or "main")
    siblings = [{"rfilename": path} for path in commit.files]
    call.json({"id": repo_id, "sha": commit.sha, "private": repo.private, "tags": [], "siblings": siblings})


@route("GET", API + "/refs")
def _refs(call: _Handler, kind: str, repo_id: str) -> None:
    refs = call.readable(repo_id, kind).refs
    full = {name: name if "/" in name else f"refs/heads/{name}" for name in refs}
    named = [{"name": name, "ref": full[name], "targetCommit": refs[name].sha} for name in refs]
    pulls = [ref for ref in named if "/pr/" in ref["ref"]]
    branches = [ref for ref in named if ref not in pulls]
    call.json({"branches": branches, "converts": [], "tags": [], "pullRequests": pulls})


@route("GET", API + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
def _tree(call: _Handler, kind: str, repo_id: str, revision: str, folder: str | None) -> None:
    files = call.readable(repo_id, kind).at(revision).files
    start = f"{folder.rstrip('/')}/" if folder else ""
    inside = [path for path in files if path.startswith(start)]
    if folder and not inside:
        fail(404, "EntryNotFound", f"{folder} does not exist")
    folders = {str(parent) for path in inside for parent in Path(path).parents if str(parent).startswith(start)} - {
        "."
    }
    rows = [describe(path, files[path]) for path in inside]
    rows += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
    if call.query.get("recursive", "").lower() not in ("true", "1"):
        rows = [row for row in rows if "/" not in row["path"].removeprefix(start)]
    call.json(rows)


@route("POST", API + "/paths-info/(?P<revision>[^/]+)")
def _paths_info(call: _Handler, kind: str, repo_id: str, revision: str) -> None:
    text = call.body().decode()
    asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
    files = call.readable(repo_id, kind).at(revision).files
    call.json([describe(path, files[path]) for path in asked if path in files])


def describe(path: str, file: File) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
    if file.sha256:
        row["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
    return row


@route("POST", API + "/branch/(?P<branch>[^/]+)")
def _branch(call: _Handler, kind: str, repo_id: str, branch: str) -> None:
    repo, start = call.writable(repo_id, kind), json.loads(call.body() or b"{}").get("startingPoint", "main")
    if branch in repo.refs:
        fail(409, message="Reference already exists")
    repo.refs[branch] = repo.at(start)
    call.json({})


@route("POST", API + "/preupload/(?P<revision>[^/]+)")
def _preupload(call: _Handler, kind: str, repo_id: str, revision: str) -> None:
    there = call.writable(repo_id, kind).at(revision).files
    answer = []
    for file in json.loads(call.body())["files"]:
        known = there.get(file["path"])
        mode = "lfs" if is_lfs(base64.b64decode(file["sample"]), file["size"]) else "regular"
        oid = known and (known.sha256 or known.oid)
        answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    call.json({"files": answer})


@route("POST", FILES + r"\.git/info/lfs/objects/batch")
def _batch(call: _Handler, kind: str, repo_id: str) -> None:
    call.writable(repo_id, kind)
    objects = json.loads(call.body())["objects"]
    for item in objects:
        if item["oid"] not in call.hub.objects:
            links = {"upload": f"/lfs/{item['oid']}", "verify": "/lfs/verify"}
            item["actions"] = {name: {"href": call.hub.url + path} for name, path in links.items()}
    call.json({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def _put(call: _Handler, oid: str) -> None:
    with call.hub.lock:
        call.hub.puts += 1
        number = call.hub.puts
    if number in call.hub.dropped_puts:
        call.rfile.read(1000)
        call.close_connection = True
        return call.connection.shutdown(2)
    if number in call.hub.held_puts:
        call.hub.holding.set()
        call.hub.closing.wait()
        call.close_connection = True
        return None
    content = call.body()
    if hashlib.sha256(content).hexdigest() != oid:
        fail(400, message="the content is not that of the object")
    call.hub.objects[oid] = content
    return call.send(b"")


@route("POST", "/lfs/verify")
def _verify(call: _Handler) -> None:
    call.writer()
    wanted = json.loads(call.body())
    if len(call.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
        fail(404, message="there is no such object")
    call.json({})


@route("POST", API + "/commit/(?P<revision>[^/]+)")
def _commit(call: _Handler, kind: str, repo_id: str, revision: str) -> None:
    repo, lines = call.writable(repo_id, kind), [json.loads(line) for line in call.body().splitlines()]
    with call.hub.lock:
        parent, header = repo.at(revision), lines[0]["value"]
        if header.get("parentCommit") not in (None, parent.sha):
            fail(412, message="The branch has moved since its parent commit")
        files = dict(parent.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                files.pop(value["path"], None) or fail(400, message="A file with this name doesn't exist")
            elif line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            else:
                content = call.hub.objects.get(value["oid"])
                files[value["path"]] = File(content, value["oid"]) if content is not None else fail(400)
        number = 1 + sum("/pr/" in name for name in repo.refs)
        target = f"refs/pr/{number}" if call.query.get("create_pr") else revision
        repo.refs[target] = Commit(header["summary"], files, parent)
    sha, page = repo.refs[target].sha, f"{call.hub.url}/{repo_id}"
    call.json(
        {"commitOid": sha, "commitUrl": f"{page}/commit/{sha}", "pullRequestUrl": f"{page}/discussions/{number}"}
    )


@route("GET", FILES + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def _resolve(call: _Handler, kind: str, repo_id: str, revision: str, path: str) -> None:
    commit = call.readable(repo_id, kind).at(revision)
    known = {"X-Repo-Commit": commit.sha}
    file = commit.files.get(path) or fail(404, "EntryNotFound", f"{path} does not exist", **known)
    headers = {"ETag": f'"{file.sha256 or file.oid}"', "Accept-Ranges": "bytes", **known}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))
    if wanted is None:
        return call.send(file.content, **headers)
    start, stop = int(wanted[1]), min(int(wanted[2] or len(file.content)) + 1, len(file.content))
    if start >= stop:
        fail(416, message="there is nothing at that range")
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(file.content)}"
    return call.send(file.content[start:stop], 206, **headers)
