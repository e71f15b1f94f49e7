"""A hub on this machine, as far as a push and a download need one."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What a hub does to a push and to a download, with one repository, me/small, in memory; it notes what was asked for.

    Attributes:
        branches: the files of each.
        requests: verb and path of each.
        tokens: with those that came with one, the last of them for each path.
        created: what was asked for when the repository was.
    """

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, bytes]] = {"main": {}, "v1": {}}
        self.requests: list[str] = []
        self.tokens: dict[str, str] = {}
        self.created: list[dict[str, Any]] = []
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
                if token := self.headers.get("Authorization"):
                    hub.tokens[path] = token.removeprefix("Bearer ")
                answer = hub.answer(path, body)
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
    def files(self) -> dict[str, bytes]:
        """Those of the main branch."""
        return self.branches["main"]

    def sha(self, branch: str) -> str:
        files = self.branches[branch]
        return hashlib.sha1(b"".join([branch.encode(), *(files[name] for name in sorted(files))])).hexdigest()

    def answer(self, path: str, body: bytes) -> tuple[Any, dict[str, str]] | None:
        repository = "/api/models/me/small"
        if path == "/api/whoami-v2":
            return {"type": "user", "name": "me", "auth": {}}, {}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.url}/me/{self.created[-1]['name']}"}, {}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}, {}
        for branch, files in self.branches.items():
            sha = self.sha(branch)
            if path == f"{repository}/preupload/{branch}":
                modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
                return {"files": modes}, {}
            if path == f"{repository}/commit/{branch}":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return {"commitUrl": f"{self.url}/me/small/commit/{self.sha(branch)}", "commitOid": self.sha(branch)}, {}
            if path == f"{repository}/revision/{branch}" or (path == repository and branch == "main"):
                return {"id": "me/small", "sha": sha, "siblings": [{"rfilename": name} for name in files]}, {}
            if path == f"{repository}/tree/{sha}":
                oids = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
                return [{"type": "file", "path": n, "size": len(files[n]), "oid": oids[n]} for n in oids], {}
            name = path.removeprefix(f"/me/small/resolve/{sha}/")
            if name in files:
                return files[name], {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', "X-Repo-Commit": sha}
        return None
