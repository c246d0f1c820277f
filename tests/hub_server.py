"""A small local stand-in for the Hugging Face hub, spoken to by the real huggingface_hub client.

It answers what a data set download needs. As on the hub, archives are LFS files, whose content comes from another host
after a redirect, and everything else is a git blob. Faults are planted per file or per request. Model repositories take
uploads: what was committed lies in `HubServer.models`, and `HubServer.token` is the one that may write.
"""

import base64
import hashlib
import json
import threading
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

BLOCK = 2**14  # bytes written at a time


@dataclass
class Model:
    """A model repository: its branches, each a list of commits, each a mapping of paths to contents."""

    private: bool
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{}]})
    messages: list[str] = field(default_factory=list)


class HubServer:
    """One repository with its commits. ``with HubServer() as hub:`` starts it; `url` is what HF_ENDPOINT takes."""

    def __init__(self, repo: str = "ibm-esa-geospatial/ImpactMesh-Flood") -> None:
        self.repo = repo
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.faults: dict[str, list[dict]] = defaultdict(list)
        self.refusals: list[tuple[int, dict[str, str]]] = []  # answers to the next requests for a revision
        self.requests: list[tuple[str, str]] = []  # (method, address)
        self.sent: Counter[str] = Counter()  # bytes of each file's content that went out
        self.token = "hf_writer"
        self.models: dict[str, Model] = {}
        self.lfs: dict[str, bytes] = {}
        self.weights: dict[tuple[str, str], str] = {}  # by model repository and revision: a commit
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def speak_to(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let huggingface_hub in this process, which is offline but for that, speak to this server."""
        files = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        given = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": files, "HF_HUB_OFFLINE": False}
        for name, value in (given | {"HF_HUB_DISABLE_XET": True}).items():  # it speaks LFS
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        huggingface_hub.close_session()  # one that an earlier test opened may know a proxy

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Add a commit with these files, let a branch point to it, and return its sha."""
        digests = [f"{path} {hashlib.sha256(content).hexdigest()}" for path, content in sorted(files.items())]
        sha = hashlib.sha1(f"{ref} {len(self.commits)} {digests}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def serve(self, repo: str, files: dict[str, bytes], revision: str | None = None) -> None:
        """Give out a model repository's files, on `main`, or at the commit that is named."""
        commit = revision or hashlib.sha1(repo.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.weights[repo, revision or "main"] = commit

    def fault(self, path: str, **fault: object) -> None:
        """Plant a fault for a file's next read: other `content`, an end after `cut_after` bytes, a `rate` a second."""
        self.faults[path].append(fault)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        self.hub: HubServer = self.server.hub
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append((self.command, self.path))
        host = "cdn" if self.headers.get("Host", "").startswith("localhost") else "hub"
        address = urlsplit(self.path)
        api, resolve = f"/api/datasets/{self.hub.repo}/", f"/datasets/{self.hub.repo}/resolve/"
        with suppress(ConnectionError):
            if host == "cdn":
                query = parse_qs(address.query)
                self.send_content(query["commit"][0], query["path"][0])
            elif address.path.startswith(resolve):
                revision, path = address.path.removeprefix(resolve).split("/", 1)
                self.send_file(unquote(revision), unquote(path))
            elif address.path.startswith(api):
                self.send_api(address.path.removeprefix(api).split("/"))
            elif address.path.startswith(("/api/repos/", "/api/models/", "/api/validate-yaml", "/lfs/")):
                self.take_upload(address.path.strip("/").split("/"))
            elif "/resolve/" in address.path:
                repo, rest = unquote(address.path).strip("/").split("/resolve/")
                revision, path = rest.split("/", 1)
                self.send_file(self.hub.weights.get((repo, revision), ""), path)
            elif address.path.endswith(".git/info/lfs/objects/batch"):
                self.send_lfs_batch()
            else:
                self.send_error_code(401, "RepoNotFound")  # what the hub says where there is no token

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send_api(self, parts: list[str]) -> None:
        what, revision = parts[0], unquote(parts[1])
        if what == "commits" and self.hub.refusals:
            status, headers = self.hub.refusals.pop(0)
            return self.send(status, b"", headers)
        sha = self.hub.refs.get(revision, revision)
        if sha not in self.hub.commits:
            return self.send_error_code(404, "RevisionNotFound")
        files = self.hub.commits[sha]
        if what == "commits":
            entry = {"id": sha, "title": "", "message": "", "date": "2026-01-01T00:00:00Z", "authors": []}
            return self.send_json([entry])
        if what == "revision":
            siblings = [{"rfilename": path} for path in sorted(files)]
            return self.send_json({"id": self.hub.repo, "sha": sha, "siblings": siblings, "private": False, "tags": []})
        entries = [{"type": "file", "path": path, **_description(path, files[path])} for path in sorted(files)]
        if what == "paths-info":
            asked = parse_qs(self.body.decode()).get("paths", [])
            return self.send_json([entry for entry in entries if entry["path"] in asked])
        folders = sorted({path.rsplit("/", 1)[0] for path in files if "/" in path})
        entries = [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders] + entries
        return self.send_json(entries)

    def take_upload(self, parts: list[str]) -> None:
        """Answer what huggingface_hub asks on the way to a commit in a model repository."""
        if parts[0] == "lfs":
            self.hub.lfs[hashlib.sha256(self.body).hexdigest()] = self.body  # not under the name that was promised
            return self.send(200, b"", {})
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.send(401, b"", {"X-Error-Message": "Invalid username or password."})
        if parts[1] == "validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if parts[1] == "repos":
            asked = json.loads(self.body)
            repo = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] == "someone-else":
                return self.send(403, b"", {"X-Error-Message": "You don't have the rights to create a model there."})
            if repo in self.hub.models:
                return self.send(409, json.dumps({"url": f"{self.hub.url}/{repo}"}).encode(), {})
            self.hub.models[repo] = Model(asked.get("visibility") == "private")
            return self.send_json({"url": f"{self.hub.url}/{repo}"})
        repo, model = "/".join(parts[2:4]), self.hub.models.get("/".join(parts[2:4]))
        if model is None:
            return self.send_error_code(404, "RepoNotFound")
        if len(parts) == 4:
            return self.send_json({"id": repo, "sha": "0" * 40, "private": model.private, "tags": [], "siblings": []})
        what, branch = parts[4], unquote(parts[5])
        if what == "branch":
            model.branches.setdefault(branch, [{}])
            return self.send_json({})
        if branch not in model.branches:
            return self.send_error_code(404, "RevisionNotFound")
        if what == "preupload":
            files = json.loads(self.body)["files"]
            modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in files}
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            return self.send_json({"files": files})
        return self.take_commit(repo, model, branch)

    def take_commit(self, repo: str, model: Model, branch: str) -> None:
        tree = dict(model.branches[branch][-1])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                model.messages.append(value["summary"])
            elif entry["key"] == "lfsFile":
                tree[value["path"]] = self.hub.lfs[value["oid"]]
            else:
                tree[value["path"]] = base64.b64decode(value["content"])
        model.branches[branch].append(tree)
        sha = f"{len(model.branches[branch]):040x}"
        self.send_json({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    def send_lfs_batch(self) -> None:
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.lfs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        self.send_json({"transfer": "basic", "objects": objects})

    def send_file(self, revision: str, path: str) -> None:
        sha = self.hub.refs.get(revision, revision)
        content = self.hub.commits.get(sha, {}).get(path)
        if content is None:
            return self.send_error_code(404, "EntryNotFound")
        if not _is_lfs(path):
            return self.send_content(sha, path)
        description = _description(path, content)
        headers = {
            "X-Repo-Commit": sha,
            "ETag": f'"{description["oid"]}"',
            "X-Linked-ETag": f'"{description["lfs"]["oid"]}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"http://localhost:{self.hub.port}/cdn?commit={sha}&path={quote(path, safe='')}",
        }
        return self.send(302, b"", headers)

    def send_content(self, sha: str, path: str) -> None:
        content = self.hub.commits[sha][path]
        etag = _description(path, content)["oid"]
        faults = self.hub.faults[path] if self.command == "GET" else []
        fault = faults.pop(0) if faults else {}
        content = fault.get("content", content)
        start, stop = 0, len(content)
        if (asked := self.headers.get("Range", "")).startswith("bytes="):
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1, stop) if last else stop
            if start >= len(content):
                return self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"} if asked else {}
        self.send_head(206 if asked else 200, stop - start, headers)
        end = min(stop, start + fault.get("cut_after", stop))
        for place in range(start, end if self.command == "GET" else start, BLOCK):
            block = content[place : min(place + BLOCK, end)]
            self.hub.sent[path] += len(block)  # before it is written: a client that has the last byte may ask at once
            self.wfile.write(block)
            time.sleep(len(block) / fault["rate"] if "rate" in fault else 0)
        self.close_connection |= end < stop
        return None

    def send_json(self, data: object) -> None:
        self.send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def send_error_code(self, status: int, code: str) -> None:
        self.send(status, b"", {"X-Error-Code": code})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_head(status, len(body), headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


def _is_lfs(path: str) -> bool:
    return path.endswith((".tar", ".pt"))


def _description(path: str, content: bytes) -> dict:
    """A file as the hub's tree lists it."""
    if not _is_lfs(path):
        return {"oid": hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest(), "size": len(content)}
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"oid": digest, "size": len(content), "pointerSize": 134}
    return {"oid": hashlib.sha1(digest.encode()).hexdigest(), "size": len(content), "lfs": lfs}
