"""A stand-in for the Hub's HTTP API on 127.0.0.1, as huggingface_hub 2.4.0 uses it, with faults to choose.

It keeps repositories as lists of commits. Files of Git LFS are accepted only with the size and SHA-256 that were announced.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.utils.sha import git_hash

TOKEN = "hf_secretsecretsecretsecret"
SIGNATURE = "X-Amz-Signature=signedsecret"
LFS_FROM = 2**20  # bytes; safetensors files are always in LFS
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Repo:
    """`commits` are {path: bytes} each; `lfs` are the paths that are in Git LFS."""

    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": ATTRIBUTES}])
    messages: list[str] = field(default_factory=list)
    lfs: set[str] = field(default_factory=set)

    @property
    def files(self) -> dict[str, bytes]:
        return {name: data for name, data in self.commits[-1].items() if name != ".gitattributes"}

    def head(self, index: int = -1) -> str:
        return hashlib.sha1(f"{len(self.commits) + index if index < 0 else index}".encode()).hexdigest()


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path" matches `pattern`."""

    pattern: str
    status: int = 0
    message: str = ""
    content: Any = None  # of the answer, instead of a message
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body that are read before the connection is closed
    act: Callable[[], Any] | None = None  # called before the right answer
    lost: bool = False  # the request is carried out, but the connection is closed instead of an answer
    times: int = 1


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, part: int | None = None) -> None:
        """`part`: bytes of a part of a multipart upload; None: each file is sent in one request."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.part = part
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # of Git LFS
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, int]] = []  # ("METHOD path", bytes of the body)
        self.role = "write"  # of the token
        self.lies: dict[str, str] = {}  # {path: SHA-256 or blob id that is listed}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def sent(self, pattern: str) -> list[tuple[str, int]]:
        return [(line, size) for line, size in self.requests if re.search(pattern, line)]

    def fail(self, pattern: str, status: int = 0, **how: Any) -> None:
        self.faults.append(Fault(pattern, status, **how))

    def handle_error(self, *_: Any) -> None:
        pass  # a client that breaks off


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet
    server: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        self.answer(
            status, {"error": message}, X_Error_Message=message, **({"X_Error_Code": code} if code else {})
        )

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        size = int(self.headers.get("Content-Length") or 0)
        fault = next(
            (fault for fault in self.server.faults if fault.times and re.search(fault.pattern, line)), None
        )
        if fault is not None:
            fault.times -= 1
            if fault.cut_after is not None:
                self.server.requests.append((f"{line} (cut)", len(self.rfile.read(fault.cut_after))))
                self.close_connection = True
                self.connection.close()
                return
        body = self.rfile.read(size) if size else self.chunks()
        self.server.requests.append((line, len(body)))
        if fault is not None and fault.act:
            fault.act()
        elif fault is not None and fault.lost:
            self.wfile, self.close_connection = io.BytesIO(), True
        elif fault is not None:
            self.answer(fault.status, fault.content or {"error": fault.message}, **fault.headers)
            return
        signed = path.startswith("/storage/")
        if signed != (SIGNATURE in self.path) or (signed and "Authorization" in self.headers):
            self.refuse(403, "a signed address is needed, and no token")
        elif not signed and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(401, "Invalid credentials in Authorization header")
        else:
            self.route(line, body)

    do_GET = do_POST = do_PUT = do_HEAD = handle_request  # noqa: N815

    def chunks(self) -> bytes:
        """A body without a length: httpx2 sends files in chunks."""
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while length := int(self.rfile.readline(), 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def route(self, line: str, body: bytes) -> None:
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, line):
                getattr(self, method)(*match.groups(), **({"body": body} if body else {}))
                return
        self.refuse(404, f"the stand-in does not know {line}")

    # --- accounts and repositories

    def whoami(self) -> None:
        orgs = [{"name": "ours", "roleInOrg": "write"}]
        self.answer(
            200,
            {"name": "me", "type": "user", "orgs": orgs, "auth": {"accessToken": {"role": self.server.role}}},
        )

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked["organization"] or "me"
        name = f"{owner}/{asked['name']}"
        if owner not in ("me", "ours") or self.server.role == "read":
            self.refuse(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        elif name in self.server.repos:
            self.refuse(409, "You already created this model repo")
        else:
            self.server.repos[name] = Repo(private=asked.get("visibility") == "private")
            self.answer(200, {"url": f"{self.server.url}/{name}", "name": name})

    def repo(self, name: str) -> Repo | None:
        """A repository; None, after the answer, if there is none."""
        if name not in self.server.repos:
            self.refuse(404, "Repository not found", "RepoNotFound")
        return self.server.repos.get(name)

    def info(self, name: str, _: str | None = None) -> None:
        if repo := self.repo(name):
            siblings = [{"rfilename": path} for path in repo.commits[-1]]
            self.answer(
                200,
                {"id": name, "sha": repo.head(), "private": repo.private, "siblings": siblings, "tags": []},
            )

    def may_write(self, name: str) -> None:
        if self.repo(name):
            if self.server.role == "read":
                self.refuse(403, "Forbidden")
            else:
                self.answer(200, {})

    def tree(self, name: str, revision: str) -> None:
        if repo := self.repo(name):
            index = next(i for i in range(len(repo.commits)) if revision in ("main", repo.head(i)))
            files = repo.commits[-1 if revision == "main" else index]
            self.answer(200, [self.entry(repo, path, data) for path, data in files.items()])

    def entry(self, repo: Repo, path: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
        if path in repo.lfs:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        if lie := self.server.lies.get(path):
            (entry["lfs"] if path in repo.lfs else entry)["oid"] = lie
        return entry

    # --- uploads

    def validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        parts = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        card = yaml.safe_load(parts[1]) if parts else {}
        errors = [
            {"message": f"{key}: {value!r}"}
            for key in ("base_model", "datasets")
            for value in ([card[key]] if isinstance(card.get(key), str) else card.get(key) or [])
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", value)
        ]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, name: str, body: bytes) -> None:
        if repo := self.repo(name):
            now = repo.commits[-1]
            self.answer(200, {"files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") or file["size"] >= LFS_FROM else "regular",
                    "shouldIgnore": False,
                    "oid": self.entry(repo, file["path"], now[file["path"]])["oid"] if file["path"] in now else None,
                }
                for file in json.loads(body)["files"]
            ]})  # fmt: skip

    def batch(self, name: str, body: bytes) -> None:
        asked = json.loads(body)
        assert set(asked["transfers"]) == {"basic", "multipart"}, "Xet is switched off"
        if self.repo(name):
            self.answer(
                200, {"transfer": "basic", "objects": [self.action(**entry) for entry in asked["objects"]]}
            )

    def action(self, oid: str, size: int) -> dict[str, Any]:
        if oid in self.server.objects:
            return {"oid": oid, "size": size}
        address = f"{self.server.url}/storage/{oid}"
        upload: dict[str, Any] = {"href": f"{address}?{SIGNATURE}"}
        if part := self.server.part:
            count = -(-size // part)
            urls = {f"{number:05}": f"{address}/{number}?{SIGNATURE}" for number in range(1, count + 1)}
            upload = {"href": f"{address}/complete?{SIGNATURE}", "header": {"chunk_size": str(part), **urls}}
        return {"oid": oid, "size": size, "actions": {"upload": upload}}

    def put(self, oid: str, body: bytes = b"") -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.refuse(400, "The SHA-256 you specified did not match what we received")
        else:
            self.server.objects[oid] = body
            self.answer(200)

    def put_part(self, oid: str, number: str, body: bytes) -> None:
        self.server.parts.setdefault(oid, {})[int(number)] = body
        self.answer(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')

    def complete(self, oid: str, body: bytes) -> None:
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        self.put(oid, b"".join(self.server.parts.get(oid, {})[number] for number in numbers))

    def commit(self, name: str, body: bytes) -> None:
        repo = self.repo(name)
        if repo is None:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        header, files = lines[0]["value"], dict(repo.commits[-1])
        if header.get("parentCommit", repo.head()) != repo.head():
            self.refuse(412, "A commit has happened since. Please refresh and try again.")
            return
        for line in lines[1:]:
            path = line["value"]["path"]
            repo.lfs.discard(path)
            if line["key"] == "file":
                files[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                if line["value"]["oid"] not in self.server.objects:
                    self.refuse(400, f"{path}: this file of Git LFS was not uploaded")
                    return
                files[path] = self.server.objects[line["value"]["oid"]]
                repo.lfs.add(path)
            else:
                assert line["key"] == "deletedFile"
                del files[path]
        repo.commits.append(files)
        repo.messages.append(header["summary"])
        self.answer(
            200, {"commitUrl": f"{self.server.url}/{name}/commit/{repo.head()}", "commitOid": repo.head()}
        )

    # --- downloads

    def resolve(self, name: str, revision: str, path: str) -> None:
        if repo := self.repo(name):
            data = repo.commits[-1].get(path)
            if data is None:
                self.refuse(404, "Entry not found", "EntryNotFound")
                return
            checksum = hashlib.sha256(data).hexdigest() if path in repo.lfs else git_hash(data)
            self.answer(200, data, ETag=f'"{checksum}"', X_Repo_Commit=repo.head())


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET /api/whoami-v2", "whoami"),
    ("POST /api/repos/create", "create"),
    ("POST /api/validate-yaml", "validate"),
    (rf"GET /api/models/{REPO}/auth-check/write", "may_write"),
    (rf"GET /api/models/{REPO}/tree/(\w+)", "tree"),
    (rf"GET /api/models/{REPO}(/revision/\w+)?", "info"),
    (rf"POST /api/models/{REPO}/preupload/main", "preupload"),
    (rf"POST /api/models/{REPO}/commit/main", "commit"),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /storage/(\w{64})", "put"),
    (r"PUT /storage/(\w{64})/(\d+)", "put_part"),
    (r"POST /storage/(\w{64})/complete", "complete"),
    (rf"(?:GET|HEAD) /{REPO}/resolve/(\w+)/(.+)", "resolve"),
]
