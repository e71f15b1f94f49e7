"""A hub on this machine, as far as a push and a download need one."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What a hub does to a push and to a download, with one repository, me/small, in memory."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self, content: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.split("?")[0]
                hub.requests.append(f"{self.command} {path}")
                answer = hub.answer(self.command, path, body)
                if answer is None:
                    self.reply({"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}, 404)
                else:
                    self.reply(*answer)

            do_GET = do_HEAD = do_POST = handle_any  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def sha(self) -> str:
        return hashlib.sha1(b"".join(self.files[name] for name in sorted(self.files))).hexdigest()

    def answer(self, verb: str, path: str, body: bytes) -> tuple[Any, dict[str, str]] | None:
        repository = "/api/models/me/small"
        if path == "/api/whoami-v2":
            return {"type": "user", "name": "me", "auth": {}}, {}
        if path == "/api/repos/create":
            return {"url": f"{self.url}/me/{json.loads(body)['name']}"}, {}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}, {}
        if path == f"{repository}/preupload/main":
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return {"files": modes}, {}
        if path == f"{repository}/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"commitUrl": f"{self.url}/me/small/commit/{self.sha}", "commitOid": self.sha}, {}
        if path in (repository, f"{repository}/revision/main"):
            return {"id": "me/small", "sha": self.sha, "siblings": [{"rfilename": name} for name in self.files]}, {}
        if path == f"{repository}/tree/{self.sha}":
            oids = {name: hashlib.sha1(content).hexdigest() for name, content in self.files.items()}
            return [{"type": "file", "path": n, "size": len(self.files[n]), "oid": oids[n]} for n in oids], {}
        name = path.removeprefix(f"/me/small/resolve/{self.sha}/")
        if name in self.files:
            return self.files[name], {"ETag": f'"{hashlib.sha1(self.files[name]).hexdigest()}"', "X-Repo-Commit": self.sha}
        return None
