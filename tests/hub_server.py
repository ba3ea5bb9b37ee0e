"""A Hub on the loopback: the part of https://huggingface.co's HTTP API that a push and a download use.

It has repositories with branches and commits, and LFS uploads; it refuses a wrong token, hash, size or parent. A
request that it does not know is answered 404 and noted in `unknown`.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
MODEL = f"/api/models/{REPO}"


@dataclass(frozen=True)
class Commit:
    oid: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)  # by SHA-256: uploaded, committed or not

    def commit(self, branch: str, files: dict[str, bytes]) -> Commit:
        made = Commit(secrets.token_hex(20), files)
        self.commits[made.oid] = self.branches[branch] = made
        return made


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class HubServer(ThreadingHTTPServer):
    """The server; a token's user may write to the user's own repositories."""

    daemon_threads = True

    def __init__(self, tokens: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens, self.endpoint = tokens, f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []  # method, path
        self.unknown: list[tuple[str, str]] = []
        self.received: list[str] = []  # SHA-256 of LFS files, each time one was received whole
        self.before_upload: Callable[[str], None] = lambda oid: None  # may raise HubError, or wait
        self.lock = threading.RLock()

    def handle_error(self, request, client_address) -> None:
        """A killed client is no error of the server."""

    def content(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo].branches[branch].files


@contextmanager
def serve(tokens: dict[str, str]) -> Iterator[HubServer]:
    server = HubServer(tokens)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(methods: str, pattern: str):
    def add(handler: Callable) -> Callable:
        ROUTES.extend((method, re.compile(pattern), handler) for method in methods.split())
        return handler

    return add


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args) -> None:
        pass

    def answer(self) -> None:
        path, (method, raw) = urlsplit(self.path).path, (self.command, self.path)
        self.server.requests.append((method, raw))
        self.body = self.read_body()
        for known, pattern, handler in ROUTES:
            if known == method and (match := pattern.fullmatch(path)):
                named = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                try:
                    return handler(self, **named)
                except HubError as error:
                    code = {"X-Error-Code": error.code} if error.code else {}
                    return self.send(error.status, {"error": str(error)}, {"X-Error-Message": str(error)} | code)
        self.server.unknown.append((method, raw))
        self.send(404, {"error": "no such route"})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, status: int, content: dict | list | bytes = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def user(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is not None and given.removeprefix("Bearer ") not in self.server.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.server.tokens.get((given or "").removeprefix("Bearer "))

    def repo(self, name: str, write: bool = False) -> Repo:
        owner, user, found = name.split("/")[0], self.user(), self.server.repos.get(name)
        if found is None or (found.private and user != owner):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise HubError(403 if user else 401, f"You don't have the rights to write in {owner}")
        return found

    def at(self, repo: Repo, revision: str) -> Commit:
        if found := repo.branches.get(revision) or repo.commits.get(revision):
            return found
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        if not (user := self.user()):
            raise HubError(401, "Invalid username or password.")
        self.send(200, {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked["organization"] or self.user()
        if owner != self.user():
            raise HubError(403, f"You don't have the rights to write in {owner}")
        name = f"{owner}/{asked['name']}"
        exists = name in self.server.repos
        if not exists:
            repo = self.server.repos[name] = Repo(private=asked.get("visibility") == "private")
            repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.send(409 if exists else 200, {"url": f"{self.server.endpoint}/{name}", "name": name})

    @route("POST", f"{MODEL}/branch/(?P<branch>[^/]+)")
    def branch(self, repo: str, branch: str) -> None:
        found = self.repo(repo, write=True)
        exists = branch in found.branches
        found.branches.setdefault(branch, found.branches["main"])
        self.send(409 if exists else 200, {"error": "Reference already exists"} if exists else {})

    @route("GET", f"{MODEL}(?:/revision/(?P<revision>[^/]+))?")
    def info(self, repo: str, revision: str = "main") -> None:
        found = self.repo(repo)
        commit = self.at(found, revision)
        siblings = [{"rfilename": name} for name in commit.files]
        facts = {"_id": repo, "id": repo, "modelId": repo, "sha": commit.oid, "private": found.private, "tags": []}
        self.send(200, facts | {"siblings": siblings})

    @route("GET", f"{MODEL}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        files = {name: data for name, data in self.at(self.repo(repo), revision).files.items()
                 if name.startswith(folder)}  # fmt: skip
        if not files:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        self.send(200, [{"type": "file", "path": n, "size": len(b), "oid": git_sha(b)} for n, b in files.items()])

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        license = yaml.safe_load(front[1]).get("license", "") if front else ""
        errors = [] if isinstance(license, str) else [{"message": '"license" must be a string'}]
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    @route("POST", f"{MODEL}/preupload/(?P<revision>[^/]+)")
    def preupload(self, repo: str, revision: str) -> None:
        files = self.at(self.repo(repo, write=True), revision).files
        ignored = files.get(".gitignore", b"").decode().split()
        answers = []
        for asked in json.loads(self.body)["files"]:
            is_lfs = asked["path"].endswith(".safetensors") or b"\0" in base64.b64decode(asked["sample"])
            present = files.get(asked["path"])
            oid = {} if present is None else {"oid": (sha256 if is_lfs else git_sha)(present)}
            ignore = any(fnmatch(asked["path"], pattern) for pattern in ignored)
            mode = "lfs" if is_lfs else "regular"
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": ignore} | oid)
        self.send(200, {"files": answers})

    @route("POST", f"/{REPO}.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str) -> None:
        found, objects = self.repo(repo, write=True), []
        for item in json.loads(self.body)["objects"]:
            href = f"{self.server.endpoint}/storage/{repo}/{item['oid']}/{item['size']}"
            actions = {} if item["oid"] in found.lfs else {"actions": {"upload": {"href": href}}}
            objects.append({"oid": item["oid"], "size": item["size"]} | actions)
        self.send(200, {"transfer": "basic", "objects": objects})

    @route("PUT", f"/storage/{REPO}/(?P<oid>[0-9a-f]{{64}})/(?P<size>[0-9]+)")
    def put(self, repo: str, oid: str, size: str) -> None:
        self.server.before_upload(oid)
        if sha256(self.body) != oid or len(self.body) != int(size):
            raise HubError(400, f"the content must be {oid}, of {size} bytes")
        self.server.repos[repo].lfs[oid] = self.body
        self.server.received.append(oid)
        self.send(200)

    @route("POST", f"{MODEL}/commit/(?P<revision>[^/]+)")
    def commit(self, repo: str, revision: str) -> None:
        found = self.repo(repo, write=True)
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        with self.server.lock:
            before = self.at(found, revision)
            if header["value"].get("parentCommit") not in (None, before.oid):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(before.files)
            for operation in operations:
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile" and value["oid"] in found.lfs:
                    files[value["path"]] = found.lfs[value["oid"]]
                elif operation["key"] == "deletedFile" and value["path"] in files:
                    del files[value["path"]]
                else:
                    raise HubError(400, f"cannot {operation}")
            made = found.commit(revision, files)
        url = f"{self.server.endpoint}/{repo}/commit/{made.oid}"
        self.send(200, {"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})

    @route("GET HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
    def resolve(self, repo: str, revision: str, name: str) -> None:
        commit = self.at(self.repo(repo), revision)
        if name not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        data = commit.files[name]
        self.send(200, data, {"X-Repo-Commit": commit.oid, "ETag": f'"{sha256(data)}"'})


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
