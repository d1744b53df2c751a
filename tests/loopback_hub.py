"""A Hub on this machine: the routes that a push and a pull of huggingface_hub ask for, over one folder.

Every file is "regular", so that contents come with the commit, in base64.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories as folders; a commit's name is the hash of all that a repository holds."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: list[str] = []

    def files(self, repo: str) -> dict[str, bytes]:
        root = self.folder / repo
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repr(self.files(repo)).encode()).hexdigest()

    def write(self, repo: str, lines: list[dict]) -> None:
        for line in lines:
            if line["key"] == "file":
                path = self.folder / repo / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, content, status: int = 200, **headers) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"POST {path}")
        origin = f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
            (self.hub.folder / repo).mkdir(parents=True, exist_ok=True)
            self.answer({"url": f"{origin}/{repo}", "name": repo, "id": repo})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self.answer({"files": [{**file, "shouldIgnore": False} for file in files]})
        elif "/commit/" in path:
            repo = path.removeprefix("/api/models/").split("/commit/")[0]
            self.hub.write(repo, [json.loads(line) for line in body.splitlines()])
            commit = self.hub.commit(repo)
            self.answer(
                {"commitUrl": f"{origin}/{repo}/commit/{commit}", "commitOid": commit, "success": True}
            )
        else:
            self.answer({"error": f"no route {path}"}, 404)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            self.answer({"name": "user", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        elif path.startswith("/api/models/"):
            repo, _, rest = path.removeprefix("/api/models/").partition("/")
            name, _, rest = rest.partition("/")
            self.describe(f"{repo}/{name}", rest)
        elif "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            self.resolve(repo, rest.partition("/")[2])
        else:
            self.answer({"error": f"no route {path}"}, 404)

    do_HEAD = do_GET

    def describe(self, repo: str, rest: str) -> None:
        files = self.hub.files(repo)
        if not files and not (self.hub.folder / repo).is_dir():
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif rest.startswith("tree/"):
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
            self.answer(entries)
        else:
            siblings = [{"rfilename": path} for path in files]
            self.answer({"id": repo, "sha": self.hub.commit(repo), "siblings": siblings, "private": False})

    def resolve(self, repo: str, file: str) -> None:
        data = self.hub.files(repo).get(file)
        if data is None:
            code = "EntryNotFound" if (self.hub.folder / repo).is_dir() else "RepoNotFound"
            self.answer({"error": f"{file} not found"}, 404, X_Error_Code=code)
        else:
            tag = f'"{hashlib.sha1(data).hexdigest()}"'
            self.answer(data, ETag=tag, X_Repo_Commit=self.hub.commit(repo))


@contextmanager
def serve(folder: Path):
    """The Hub, and the environment of a process that is to use it and no other."""
    handler = type("Handler", (Handler,), {"hub": Hub(folder / "repos")})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield (
            handler.hub,
            {
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HUB_OFFLINE": "0",
                "HF_TOKEN": "hf_none",
                "HF_HOME": str(folder / "home"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
            },
        )
    finally:
        server.shutdown()
        server.server_close()
