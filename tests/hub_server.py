"""A loopback server that speaks the Hub's HTTP protocol, as far as models and data sets come and go over it.

Routes and answers follow https://huggingface.co/docs/hub/api and the git-lfs batch API. It checks what the
Hub checks: tokens, the card's metadata, hashes and sizes of uploads, that a commit names only objects it has.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
import yaml

TOKEN = "hf_" + "a" * 34
HANG_UP = 0  # a status for `refuse`: close the connection without an answer
REGULAR = (".json", ".md", ".yaml", ".gitattributes")


@dataclass
class Repo:
    """commits: id -> {path: content}; refs: branch -> commit id."""

    private: bool
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        contents = {path: sha256(content) for path, content in sorted(files.items())}
        seed = f"{len(self.commits)} {branch} {contents}"
        commit = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class HubServer:
    """State and address of the server. Use as a context manager."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.tokens: dict[str, set[str]] = {}  # token -> namespaces it may write to
        self.log: list[str] = []  # "METHOD /path" of every request
        self.fetched: list[tuple[str, int, int]] = []  # object, first byte and end of all that was read of storage
        self.refusals: list[tuple[str, int, dict[str, str]]] = []
        self.lock = threading.Lock()
        handler = type("Handler", (Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"
        self.storage = f"http://localhost:{self.http.server_port}/storage"  # another host, as the Hub's is

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def refuse(self, pattern: str, status: int, **headers: str) -> None:
        """Answer requests whose "METHOD /path" matches `pattern` with `status` alone, from now on."""
        self.refusals.append((pattern, status, {name.replace("_", "-"): value for name, value in headers.items()}))

    def requests(self, pattern: str) -> list[str]:
        return [request for request in self.log if re.search(pattern, request)]

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo]
        return found.commits[found.resolve(revision)]


class Refused(Exception):
    def __init__(self, status: int, **headers: str) -> None:
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}


NO_REPO = {"X_Error_Code": "RepoNotFound", "X_Error_Message": "Repository not found"}


NAME = r"((?:datasets/)?[^/]+/[^/]+)"  # of a repository: data sets have a place of their own
API = rf"/api/(?:models/)?{NAME}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", rf"{API}(?:/revision/([^/]+))?", "info"),
        ("GET", rf"{API}/tree/([^/]+)(?:/(.*))?", "tree"),
        ("POST", rf"{API}/paths-info/([^/]+)", "paths"),
        ("POST", rf"{API}/preupload/([^/]+)", "preupload"),
        ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/storage/([0-9a-f]{64})", "store"),
        ("POST", r"/storage/verify", "verify"),
        ("GET", r"/storage/([0-9a-f]{64})", "fetch"),
        ("POST", rf"{API}/commit/([^/]+)", "commit"),
        ("HEAD|GET", rf"/{NAME}/resolve/([^/]+)/(.+)", "resolve"),
    )

    # -- plumbing -------------------------------------------------------------------------------

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            self.body = b"".join(iter(self.read_chunk, b""))
        else:
            self.body = self.rfile.read(length)
        request = f"{self.command} {url.path}"
        self.hub.log.append(request)
        try:
            self.check_refusals(request)
            for methods, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in methods.split("|"):
                    with self.hub.lock:
                        getattr(self, name)(*(part and unquote(part) for part in match.groups()))
                    return
            raise Refused(404, X_Error_Message=f"no route for {request}")
        except Refused as refused:
            if refused.status == HANG_UP:
                self.close_connection = True
                return
            message = refused.headers.get("X-Error-Message", "refused")
            self.send(refused.status, json.dumps({"error": message}).encode(), **refused.headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def read_chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        chunk = self.rfile.read(size)
        self.rfile.readline()
        return chunk

    def check_refusals(self, request: str) -> None:
        for pattern, status, headers in self.hub.refusals:
            if re.search(pattern, request):
                raise Refused(status, **headers)

    def send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, answer: object, **headers: str) -> None:
        self.send(200, json.dumps(answer).encode(), **{"Content-Type": "application/json"}, **headers)

    def log_message(self, *arguments: object) -> None:
        pass

    # -- what the Hub checks --------------------------------------------------------------------

    def namespaces(self) -> set[str]:
        """Those that the request's token may write to; empty without a token."""
        authorization = self.headers.get("Authorization", "")
        if not authorization:
            return set()
        if (token := authorization.removeprefix("Bearer ")) not in self.hub.tokens:
            raise Refused(401, X_Error_Message="Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def readable(self, name: str) -> Repo:
        repo, mine = self.hub.repos.get(name), self.namespaces()
        if repo is None or (repo.private and name.split("/")[-2] not in mine):
            raise Refused(404 if mine else 401, **NO_REPO)
        return repo

    def writable(self, name: str) -> Repo:
        repo, mine = self.readable(name), self.namespaces()
        if name.split("/")[-2] not in mine:
            raise Refused(403 if mine else 401, X_Error_Message="You don't have the rights to write here")
        return repo

    def revision(self, repo: Repo, revision: str) -> str:
        commit = repo.resolve(revision)
        if commit is None:
            raise Refused(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        return commit

    # -- repositories ---------------------------------------------------------------------------

    def create(self) -> None:
        wish, mine = json.loads(self.body), self.namespaces()
        if not mine:
            raise Refused(401, X_Error_Message="Invalid username or password.")
        owner = wish.get("organization") or sorted(mine)[0]
        if owner not in mine:
            raise Refused(403, X_Error_Message=f"You don't have the rights to create a model under {owner}")
        name = f"{'datasets/' * (wish.get('type') == 'dataset')}{owner}/{wish['name']}"
        answer = {"url": f"{self.hub.endpoint}/{name}", "name": name.removeprefix("datasets/")}
        if name in self.hub.repos:
            self.send(409, json.dumps({"error": "You already created this model repo", **answer}).encode())
            return
        repo = self.hub.repos[name] = Repo(private=bool(wish.get("private")) or wish.get("visibility") == "private")
        repo.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.json(answer)

    def info(self, name: str, revision: str | None) -> None:
        repo = self.readable(name)
        commit = self.revision(repo, revision or "main")
        self.json(
            {
                "_id": "0",
                "id": name.removeprefix("datasets/"),
                "modelId": name,
                "sha": commit,
                "private": repo.private,
                "gated": repo.gated,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": path} for path in repo.commits[commit]],
            }
        )

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        repo = self.readable(name)
        files = repo.commits[self.revision(repo, revision)]
        inside = f"{folder}/" if folder else ""
        below = [path for path in sorted(files) if path.startswith(inside)]
        if not below:
            raise Refused(404, X_Error_Code="EntryNotFound", X_Error_Message=f"{folder} does not exist")
        folders = dict.fromkeys(str(parent) for path in below for parent in PurePosixPath(path).parents[:-1])
        found = [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders if path.startswith(inside)]
        found += [self.entry(path, files[path]) for path in below]
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            found = [entry for entry in found if "/" not in entry["path"].removeprefix(inside)]
        self.json(found)

    def paths(self, name: str, revision: str) -> None:
        repo = self.readable(name)
        files = repo.commits[self.revision(repo, revision)]
        wish = json.loads(self.body) if "json" in self.headers["Content-Type"] else parse_qs(self.body.decode())
        self.json([self.entry(path, files[path]) for path in wish["paths"] if path in files])

    def entry(self, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if not path.endswith(REGULAR):
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
        return entry

    # -- uploads --------------------------------------------------------------------------------

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = [] if match and isinstance(yaml.safe_load(match[1]), dict) else [{"message": "no metadata"}]
        self.send(400 if errors else 200, json.dumps({"errors": errors, "warnings": []}).encode())

    def preupload(self, name: str, revision: str) -> None:
        repo = self.writable(name)
        present = repo.commits[self.revision(repo, revision)]
        answer = []
        for file in json.loads(self.body)["files"]:
            regular = file["path"].endswith(REGULAR)
            content = present.get(file["path"])
            oid = content and (git_hash(content) if regular else sha256(content))
            mode = "regular" if regular else "lfs"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": answer})

    def batch(self, name: str) -> None:
        self.writable(name)
        wish = json.loads(self.body)
        assert wish["operation"] == "upload"
        assert "basic" in wish["transfers"]
        answer = []
        for item in wish["objects"]:
            found = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                store, verify = f"{self.hub.storage}/{item['oid']}", f"{self.hub.storage}/verify"
                found["actions"] = {"upload": {"href": store}, "verify": {"href": verify}}
            answer.append(found)
        self.json({"transfer": "basic", "objects": answer})

    def store(self, oid: str) -> None:
        if sha256(self.body) != oid:
            raise Refused(400, X_Error_Message="content does not have the hash it was announced with")
        self.hub.objects[oid] = self.body
        self.send(200)

    def verify(self) -> None:
        wish = json.loads(self.body)
        content = self.hub.objects.get(wish["oid"])
        if content is None or len(content) != wish["size"]:
            raise Refused(404, X_Error_Message="no such object")
        self.json({})

    def commit(self, name: str, revision: str) -> None:
        repo = self.writable(name)
        files = dict(repo.commits[self.revision(repo, revision)])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, X_Error_Message=f"object {value['oid']} was never uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        commit = repo.commit(files, revision)
        self.json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}", "commitOid": commit})

    # -- downloads ------------------------------------------------------------------------------

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.readable(name)
        if repo.gated and name.split("/")[-2] not in self.namespaces():
            raise Refused(403, X_Error_Code="GatedRepo", X_Error_Message=f"Access to model {name} is restricted")
        commit = self.revision(repo, revision)
        content = repo.commits[commit].get(path)
        if content is None:
            raise Refused(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_hash(content)}"', "Accept-Ranges": "bytes"}
        if path.endswith(REGULAR):
            self.send(200, content, **headers)
            return
        digest = sha256(content)
        self.hub.objects[digest] = content
        large = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        self.send(302, **headers, **large, Location=f"{self.hub.storage}/{digest}")

    def fetch(self, oid: str) -> None:
        content = self.hub.objects[oid]
        wish = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or f"bytes=0-{max(len(content) - 1, 0)}")
        first, end = int(wish[1]), min(int(wish[2]) + 1, len(content))
        if self.command == "GET":
            self.hub.fetched.append((oid, first, end))
        partial = {"Content-Range": f"bytes {first}-{end - 1}/{len(content)}"} if "Range" in self.headers else {}
        self.send(206 if partial else 200, content[first:end], ETag=f'"{oid}"', **partial)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def point_client_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does when it is set before the client is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (huggingface_hub.constants, huggingface_hub.file_download):  # the latter in older clients
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
