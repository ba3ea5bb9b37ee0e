"""A Hub of our own on the loopback: what huggingface_hub asks of https://huggingface.co, over HTTP, kept in a folder.

Repositories with branches and commits, git's and LFS's ids, basic and multipart uploads to signed addresses, downloads
with ranges. It is strict: a wrong token, hash, size, part or parent is refused as the Hub refuses it, and a request
that it does not know is answered 404 and noted in `unknown`.
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
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ENTRY, REPO, REVISION = "EntryNotFound", "RepoNotFound", "RevisionNotFound"
LFS_TYPE = "application/vnd.git-lfs+json"
REPO_ID = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True)
class Blob:
    """A file's content: `oid` is the SHA-256 of an LFS file, and git's SHA-1 of any other."""

    oid: str
    size: int
    path: Path
    is_lfs: bool


@dataclass(frozen=True)
class Commit:
    oid: str
    files: dict[str, Blob]
    summary: str
    parent: str | None


@dataclass
class Repo:
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, Blob] = field(default_factory=dict)  # by oid: uploaded, committed or not

    def commit(self, branch: str, files: dict[str, Blob], summary: str) -> Commit:
        parent = self.branches[branch].oid if branch in self.branches else None
        made = Commit(hashlib.sha1(secrets.token_bytes(20)).hexdigest(), files, summary, parent)
        self.commits[made.oid] = self.branches[branch] = made
        return made


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class HubServer(ThreadingHTTPServer):
    """The server.

    Args:
        folder: where contents are kept.
        tokens: token -> user, who may write to the user's own repositories.
        chunk_size: LFS files with more bytes are asked for in parts of this size.
    """

    daemon_threads = True

    def __init__(self, folder: Path, tokens: dict[str, str], chunk_size: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.tokens, self.chunk_size = folder, tokens, chunk_size
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/storage"  # another host, as the Hub's is
        self.key = secrets.token_hex(8)  # signs the addresses of the storage
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, int]] = []  # method, path, status
        self.unknown: list[tuple[str, str]] = []
        self.received: list[str] = []  # oids of LFS files, each time one has been received whole
        self.before_upload: Callable[[str], None] = lambda oid: None  # may raise HubError, or wait
        self.lock = threading.RLock()

    def handle_error(self, request, client_address) -> None:
        """A client that was killed is no error of the server's."""

    def content(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch."""
        return {name: blob.path.read_bytes() for name, blob in self.repos[repo_id].branches[branch].files.items()}


@contextmanager
def serve(folder: Path, tokens: dict[str, str], chunk_size: int = 10**9) -> Iterator[HubServer]:
    """A running server, stopped at the end of the block."""
    server = HubServer(folder, tokens, chunk_size)
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
        url = urlsplit(self.path)
        self.query = url.query
        self.body = self.read_body()
        known = [
            (match, handler)
            for method, pattern, handler in ROUTES
            if method == self.command and (match := pattern.fullmatch(url.path))
        ]
        if not known:
            self.server.unknown.append((self.command, self.path))
            return self.send(404, {"error": "no such route"})
        match, handler = known[0]
        try:
            handler(self, **{name: unquote(value) for name, value in match.groupdict().items() if value is not None})
        except HubError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self.send(error.status, {"error": str(error)}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, status: int, content: dict | list | bytes = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.server.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # Who asks, for what

    def user(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        if given.removeprefix("Bearer ") not in self.server.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.server.tokens[given.removeprefix("Bearer ")]

    def writer(self, owner: str) -> None:
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user != owner:
            raise HubError(403, f"You don't have the rights to write in the namespace {owner}")

    def repo(self, name: str, write: bool = False) -> Repo:
        owner = name.split("/")[0]
        user = self.user()
        found = self.server.repos.get(name)
        if found is None or (found.private and user != owner):
            raise HubError(404 if user else 401, "Repository not found", REPO)
        if write:
            self.writer(owner)
        return found

    def at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.branches.get(revision) or repo.commits.get(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", REVISION)
        return commit

    def json(self, kind: str = "application/json") -> dict:
        if self.headers.get("Content-Type") != kind:
            raise HubError(415, f"Content-Type must be {kind}")
        return json.loads(self.body)

    def signed(self, path: str) -> str:
        return f"{self.server.storage}/{path}?key={self.server.key}"

    def check_signature(self) -> None:
        if self.query != f"key={self.server.key}":
            raise HubError(403, "the address is not signed")
        if "Authorization" in self.headers:
            raise HubError(400, "the Hub's token is none of the storage's business")

    # The account and its repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        self.send(200, {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        asked = self.json()
        if asked.get("type", "model") != "model" or asked.keys() - {"name", "organization", "type", "visibility"}:
            raise HubError(400, f"cannot make {asked}")
        owner = asked["organization"] or self.user()
        self.writer(owner)
        name = f"{owner}/{asked['name']}"
        exists = name in self.server.repos
        if not exists:
            repo = self.server.repos[name] = Repo(private=asked.get("visibility") == "private")
            attributes = self.store_regular(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
            repo.commit("main", {".gitattributes": attributes}, "initial commit")
        answer = {"url": f"{self.server.endpoint}/{name}", "name": name}
        self.send(409 if exists else 200, answer | ({"error": "You already created this repo"} if exists else {}))

    @route("POST", f"/api/models/{REPO_ID}/branch/(?P<branch>[^/]+)")
    def branch(self, repo: str, branch: str) -> None:
        found = self.repo(repo, write=True)
        if branch in found.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        found.branches[branch] = self.at(found, self.json().get("startingPoint", "main"))
        self.send(200, {})

    @route("GET", f"/api/models/{REPO_ID}(?:/revision/(?P<revision>[^/]+))?")
    def info(self, repo: str, revision: str = "main") -> None:
        found = self.repo(repo)
        commit = self.at(found, revision)
        facts = {"_id": repo, "id": repo, "modelId": repo, "sha": commit.oid, "private": found.private, "tags": []}
        self.send(200, facts | {"siblings": [{"rfilename": name} for name in commit.files]})

    @route("GET", f"/api/models/{REPO_ID}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        files = self.at(self.repo(repo), revision).files
        below = {name: blob for name, blob in files.items() if not folder or name.startswith(f"{folder}/")}
        if folder and not below:
            raise HubError(404, f"{folder} does not exist on {revision}", ENTRY)
        if "recursive=true" not in self.query.lower():
            raise HubError(400, "this server lists recursively")
        entries = [{"type": "file", "path": n, "size": b.size, "oid": b.oid} for n, b in below.items()]
        self.send(200, entries)

    # Uploads

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        asked = self.json()
        front = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
        errors = []
        try:
            metadata = yaml.safe_load(front[1]) if front else {}
            if "license" in metadata and not isinstance(metadata["license"], str):
                errors = [{"message": '"license" must be a string'}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    @route("POST", f"/api/models/{REPO_ID}/preupload/(?P<revision>[^/]+)")
    def preupload(self, repo: str, revision: str) -> None:
        files = self.at(self.repo(repo, write=True), revision).files
        ignored = files[".gitignore"].path.read_text().split() if ".gitignore" in files else []
        answers = []
        for asked in self.json()["files"]:
            sample = base64.b64decode(asked["sample"], validate=True)
            is_lfs = asked["path"].endswith(".safetensors") or b"\0" in sample
            answer = {"path": asked["path"], "uploadMode": "lfs" if is_lfs else "regular"}
            answer["shouldIgnore"] = any(fnmatch(asked["path"], pattern) for pattern in ignored)
            present = files.get(asked["path"])
            answers.append(answer | ({"oid": present.oid} if present else {}))
        self.send(200, {"files": answers})

    @route("POST", f"/{REPO_ID}.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str) -> None:
        found = self.repo(repo, write=True)
        asked = self.json(LFS_TYPE)
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256" or "basic" not in asked["transfers"]:
            raise HubError(422, f"cannot {asked}")
        objects = []
        for item in asked["objects"]:
            oid, size = item["oid"], item["size"]
            if oid in found.lfs:
                objects.append({"oid": oid, "size": size})
                continue
            upload: dict = {"href": self.signed(f"{repo}/{oid}/{size}")}
            if size > self.server.chunk_size:
                parts = range(1, -(-size // self.server.chunk_size) + 1)
                header = {str(part): self.signed(f"{repo}/{oid}/{size}/{part}") for part in parts}
                upload = {"href": self.signed(f"{repo}/{oid}/{size}/complete")}
                upload["header"] = {"chunk_size": str(self.server.chunk_size), **header}
            verify = {"href": f"{self.server.endpoint}/{repo}.git/info/lfs/objects/verify"}
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        self.send(200, {"transfer": "basic", "objects": objects})

    @route("PUT", f"/storage/{REPO_ID}/(?P<oid>[0-9a-f]{{64}})/(?P<size>[0-9]+)(?:/(?P<part>[0-9]+))?")
    def put(self, repo: str, oid: str, size: str, part: str | None = None) -> None:
        self.check_signature()
        self.server.before_upload(oid)
        if part is None:
            self.store_lfs(repo, oid, int(size), self.body)
            return self.send(200)
        chunk = self.server.chunk_size
        if len(self.body) != min(chunk, int(size) - (int(part) - 1) * chunk):
            raise HubError(400, f"part {part} has {len(self.body)} bytes")
        (self.server.folder / f"{oid}.{part}").write_bytes(self.body)
        self.send(200, headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    @route("POST", f"/storage/{REPO_ID}/(?P<oid>[0-9a-f]{{64}})/(?P<size>[0-9]+)/complete")
    def complete(self, repo: str, oid: str, size: str) -> None:
        self.check_signature()
        asked = self.json(LFS_TYPE)
        parts = [(self.server.folder / f"{oid}.{part['partNumber']}").read_bytes() for part in asked["parts"]]
        etags = [f'"{hashlib.md5(part).hexdigest()}"' for part in parts]
        if asked["oid"] != oid or [part["etag"] for part in asked["parts"]] != etags:
            raise HubError(400, "the parts are not those that were sent")
        self.store_lfs(repo, oid, int(size), b"".join(parts))
        self.send(200, {})

    @route("POST", f"/{REPO_ID}.git/info/lfs/objects/verify")
    def verify(self, repo: str) -> None:
        found, asked = self.repo(repo, write=True), self.json()
        if asked["oid"] not in found.lfs or found.lfs[asked["oid"]].size != asked["size"]:
            raise HubError(404, f"there is no {asked}")
        self.send(200, {})

    @route("POST", f"/api/models/{REPO_ID}/commit/(?P<revision>[^/]+)")
    def commit(self, repo: str, revision: str) -> None:
        found = self.repo(repo, write=True)
        if self.headers["Content-Type"] != "application/x-ndjson":
            raise HubError(415, "Content-Type must be application/x-ndjson")
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        with self.server.lock:
            if revision not in found.branches:
                raise HubError(404, f"Invalid rev id: {revision}", REVISION)
            parent = header["value"].get("parentCommit")
            if header["key"] != "header" or parent not in (None, found.branches[revision].oid):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(found.branches[revision].files)
            for operation in operations:
                value = operation["value"]
                if operation["key"] == "file" and value["encoding"] == "base64":
                    files[value["path"]] = self.store_regular(base64.b64decode(value["content"], validate=True))
                elif operation["key"] == "lfsFile" and value["algo"] == "sha256":
                    if value["oid"] not in found.lfs or found.lfs[value["oid"]].size != value["size"]:
                        raise HubError(400, f"{value['path']} points at an LFS file that was not uploaded")
                    files[value["path"]] = found.lfs[value["oid"]]
                elif operation["key"] == "deletedFile":
                    if value["path"] not in files:
                        raise HubError(404, "A file with this name doesn't exist", ENTRY)
                    del files[value["path"]]
                else:
                    raise HubError(400, f"cannot {operation}")
            made = found.commit(revision, files, header["value"]["summary"])
        url = f"{self.server.endpoint}/{repo}/commit/{made.oid}"
        self.send(200, {"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})

    def store_regular(self, content: bytes) -> Blob:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (self.server.folder / oid).write_bytes(content)
        return Blob(oid, len(content), self.server.folder / oid, is_lfs=False)

    def store_lfs(self, repo: str, oid: str, size: int, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid or len(content) != size:
            raise HubError(400, f"what has been sent is not {oid} of {size} bytes")
        (self.server.folder / oid).write_bytes(content)
        self.server.repos[repo].lfs[oid] = Blob(oid, size, self.server.folder / oid, is_lfs=True)
        self.server.received.append(oid)

    # Downloads

    @route("GET HEAD", f"/{REPO_ID}/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
    def resolve(self, repo: str, revision: str, name: str) -> None:
        commit = self.at(self.repo(repo), revision)
        if name not in commit.files:
            raise HubError(404, "Entry not found", ENTRY)
        blob, headers = commit.files[name], {"X-Repo-Commit": commit.oid}
        if blob.is_lfs:
            linked = {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.oid}"'}
            self.send(302, headers=headers | linked | {"Location": self.signed(f"{repo}/{blob.oid}")})
        else:
            self.send_blob(blob, headers)

    @route("GET HEAD", f"/storage/{REPO_ID}/(?P<oid>[0-9a-f]{{64}})")
    def storage(self, repo: str, oid: str) -> None:
        self.check_signature()
        self.send_blob(self.server.repos[repo].lfs[oid], {})

    def send_blob(self, blob: Blob, headers: dict[str, str]) -> None:
        content, status = blob.path.read_bytes(), 200
        headers = headers | {"ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or blob.size - 1), blob.size - 1)
            if first > last:
                raise HubError(416, "no such range")
            content, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{blob.size}"
        self.send(status, content, headers)
