"""A hub on the loopback that speaks enough of the hub's API for huggingface_hub, and misbehaves on request."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

SHA = "0123456789abcdef0123456789abcdef01234567"
VALID = "hf_" + "Valid0" * 6
PROXIES = [name for word in ("HTTP", "HTTPS", "ALL") for name in (f"{word}_PROXY", f"{word.lower()}_proxy")]


class Hub:
    """Serves {hub id: folder}. `behaviour` says how a repository misbehaves: one of the words in `Answers`."""

    def __init__(self):
        self.repositories: dict[str, Path] = {}
        self.behaviour: dict[str, str] = {}
        self.revisions = {"main", SHA}
        self.asked: list[str] = []  # the files whose content was sent
        self.requests: list[str] = []
        self.over = threading.Event()  # ends the threads that never answer
        hub = self

        class Answers(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 60

            def answer(self, status, content=b"", cut=None, **headers):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                if cut is None:
                    self.wfile.write(content)
                    return
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                if cut == "stall":
                    hub.over.wait(120)
                self.close_connection = True

            def refuse(self, status, code="", message="", **headers):
                how = {name: value for name, value in dict(X_Error_Code=code, X_Error_Message=message).items() if value}
                self.answer(status, json.dumps({"error": message}).encode(), Content_Type="application/json", **how, **headers)

            def do_GET(self):
                hub.requests.append(f"{self.command} {self.path}")
                path = unquote(self.path.split("?")[0]).strip("/")
                api = path.startswith("api/")
                kind = "datasets" if "datasets/" in path[:15] else "models"
                rest = path.removeprefix("api/").removeprefix(f"{kind}/")
                name = "/".join(rest.split("/")[:2])
                how, token = hub.behaviour.get(name), self.headers.get("Authorization", "").removeprefix("Bearer ")
                if how == "silence":
                    hub.over.wait(120)
                    self.close_connection = True
                    return None
                if how == "rate limit":
                    return self.refuse(429, message="too many", Retry_After="1800")
                if how == "server error":
                    return self.refuse(503, message="over capacity")
                if how == "portal":
                    return self.answer(200, b"<html>log in to the network</html>", Content_Type="text/html")
                if how == "echo":
                    return self.refuse(400, message=f"no good: {self.headers.get('Authorization')}")
                if token and token != VALID:
                    return self.refuse(401, message="Invalid credentials in Authorization header")
                if name not in hub.repositories or (how == "private" and not token):
                    return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
                if how == "forbidden":
                    return self.refuse(403, message="the token lacks a permission")
                return self.of_repository(rest.removeprefix(name).strip("/"), name, how, api)

            def of_repository(self, rest, name, how, api):
                folder = hub.repositories[name]
                files = sorted(p for p in folder.rglob("*") if p.is_file())
                word, _, after = rest.partition("/")
                revision, _, inside = after.partition("/") if word else ("main", "", "")
                if revision not in hub.revisions:
                    return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                size = lambda p: hub.sizes.get(f"{name}/{p.relative_to(folder)}", p.stat().st_size)
                if api:
                    rows = [{"rfilename": str(p.relative_to(folder)), "size": size(p)} for p in files]
                    facts = {"id": name, "sha": SHA, "siblings": rows, "private": False, "tags": [], "downloads": 0, "likes": 0}
                    if word == "tree":
                        facts = [{"type": "file", "path": r["rfilename"], "size": r["size"], "oid": SHA} for r in rows]
                    return self.answer(200, json.dumps(facts).encode(), Content_Type="application/json")
                if how == "gated":
                    return self.refuse(401, "GatedRepo", "Access to this repository is restricted")
                if how == "file error":
                    return self.refuse(503, message="over capacity")
                if not (folder / inside).is_file():
                    return self.refuse(404, "EntryNotFound", "Entry not found")
                content = (folder / inside).read_bytes()
                head = dict(ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=SHA, Accept_Ranges="bytes")
                status, start = 200, self.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
                if start:
                    status, whole = 206, len(content)
                    head["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
                    content = content[int(start) :]
                if self.command == "GET":
                    hub.asked.append(inside)
                cut = how if how in {"stall", "truncated"} and inside.endswith((".safetensors", ".parquet")) else None
                return self.answer(status, content, cut, **head)

            do_HEAD = do_GET

            def log_message(self, *args): ...

        self.sizes: dict[str, int] = {}  # "owner/name/file" -> bytes that the hub claims
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def serving(home, monkeypatch):
    """A hub that huggingface_hub asks in this process, with an empty cache in `home` and no access token."""
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import close_session

    hub = Hub()
    for name in (*PROXIES, "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(home))
    values = {
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.address)
    close_session()
    try:
        yield hub
    finally:
        hub.close()
        close_session()
