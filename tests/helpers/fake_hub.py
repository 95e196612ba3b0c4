"""A Hub on this machine: the few addresses that ``huggingface_hub`` asks to make a repository, fill it and read it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

TOKEN = "token-of-the-fake-hub"
COMMIT = "c0ffee" * 6 + "c0de"


class FakeHub:
    """Repositories by name, each a dict of files; ``broken`` gives the status of requests whose path holds a text."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.licences: dict[str, str] = {}
        self.uploads: dict[str, bytes] = {}
        self.commits: list[dict] = []
        self.asked: list[str] = []
        self.broken: dict[str, int] = {}
        self.large = (".safetensors",)
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, name: str, files: dict[str, bytes] | None = None, private: bool = False) -> None:
        """A repository that exists already."""
        self.repositories[name] = {".gitattributes": b"", **(files or {})}
        if private:
            self.private.add(name)

    def close(self) -> None:
        """Stop answering."""
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self):
        path, body = urlsplit(self.path).path, self._body()
        self.hub.asked.append(f"{self.command} {path}")
        for part, status in self.hub.broken.items():
            if part in path:
                return self._send(status, {"error": "this hub\nis broken"})
        steps = path.strip("/").split("/")
        if self.command == "PUT" and steps[0] == "upload":
            self.hub.uploads[steps[1]] = body
            return self._send(200, {})
        writes = self.command == "POST" and path != "/verify"
        if writes and self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            refused = "license: no-such-licence" in json.loads(body)["content"]
            problems = [{"message": '"license" must be one of a list'}] if refused else []
            return self._send(400 if refused else 200, {"errors": problems, "warnings": []})
        if path == "/verify":
            asked = json.loads(body)
            held = self.hub.uploads[asked["oid"]]
            fits = len(held) == asked["size"] and hashlib.sha256(held).hexdigest() == asked["oid"]
            return self._send(200 if fits else 422, {})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._send(200, self._batch(json.loads(body)))
        return self._of_repository(steps, body)

    def _create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.address}/{name}"
        if asked["organization"] != "owner":
            return self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
        if name in self.hub.repositories:
            return self._send(409, {"error": "You already created this model repo", "url": url})
        self.hub.add(name, private=asked.get("visibility") == "private")
        return self._send(200, {"url": url})

    def _of_repository(self, steps, body):
        resolve = len(steps) > 3 and steps[2] == "resolve"
        name = "/".join(steps[:2] if resolve else steps[2:4])
        files = self.hub.repositories.get(name)
        if files is None:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if resolve:
            return self._file(files.get("/".join(steps[4:])))
        what = steps[4] if len(steps) > 4 else "revision"
        if what == "revision":
            info = {"id": name, "sha": COMMIT, "private": name in self.hub.private, "tags": []}
            info["siblings"] = [{"rfilename": path} for path in files]
            info["cardData"] = {"license": self.hub.licences[name]} if name in self.hub.licences else None
            return self._send(200, info)
        if what == "tree":
            if len(steps) > 6:
                return self._send(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
            found = [{"type": "file", "path": path, "size": len(held), "oid": "0" * 40} for path, held in files.items()]
            return self._send(200, found)
        if what == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(self.hub.large) else "regular" for path in asked}
            return self._send(
                200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        assert what == "commit", steps
        self._commit(files, [json.loads(line) for line in body.splitlines()])
        return self._send(200, {"commitUrl": f"{self.hub.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def _batch(self, asked):
        assert "basic" in asked["transfers"]
        actions = {"verify": {"href": f"{self.hub.address}/verify"}}
        return {
            "transfer": "basic",
            "objects": [
                {**one, "actions": {"upload": {"href": f"{self.hub.address}/upload/{one['oid']}"}, **actions}}
                for one in asked["objects"]
            ],
        }

    def _commit(self, files, lines):
        self.hub.commits.append(lines[0]["value"])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]

    def _file(self, content):
        if content is None:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        tag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self._raw(200, content, {"ETag": tag, "X-Repo-Commit": COMMIT})

    def _body(self):
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _send(self, status, value, headers=None):
        self._raw(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _raw(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
