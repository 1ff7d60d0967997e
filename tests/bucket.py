"""A bucket for tests: a server on loopback that answers as the JSON API of Google's store does.

TensorStore's own client reads and writes it, and `BucketFiles` stands in for gcsfs behind fsspec.
Like the real one it has no rename, append, lock or directory; it refuses what has no object name.

API: https://cloud.google.com/storage/docs/json_api/v1
"""

import contextlib
import http.server
import io
import json
import os
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
import requests
from fsspec.spec import AbstractFileSystem

_URL = "TENSORSTORE_GCS_HTTP_URL"


class Objects:
    """What is in the bucket, by bucket and name, and what was asked of it."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.generation: dict[str, int] = {}
        self.puts: list[str] = []
        self.deletes: list[str] = []
        self.refuses: str | None = None  # a part of names that cannot be put
        self.lock = threading.Lock()
        self._count = 0

    def put(self, name: str, content: bytes) -> None:
        """Puts an object, whole."""
        with self.lock:
            self._count += 1
            self.content[name], self.generation[name] = content, self._count
            self.puts.append(name)

    def delete(self, name: str) -> bool:
        """Deletes an object; whether there was one."""
        with self.lock:
            self.deletes.append(name)
            return self.content.pop(name, None) is not None


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer is one packet
    disable_nagle_algorithm = True
    objects: Objects

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        name, query = self._asked()
        if name.endswith("/"):
            return self._list(name, query)
        with self.objects.lock:
            content = self.objects.content.get(name)
            generation = self.objects.generation.get(name, 0)
        if content is None:
            return self._answer(404)
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        if query.get("alt") != "media":
            return self._answer(200, self._facts(name, content))
        status, sent = 200, content
        headers = {"x-goog-generation": str(generation)}
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            start = int(first) if first else len(content) - int(last)
            end = min(int(last), len(content) - 1) if first and last else len(content) - 1
            status, sent = 206, content[start : end + 1]
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return self._answer(status, sent, headers)

    def do_POST(self) -> None:
        bucket, query = self._asked()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = bucket + query["name"]
        with self.objects.lock:
            generation = self.objects.generation.get(name, 0)
            generation *= name in self.objects.content
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self._answer(412)
        if self.objects.refuses is not None and self.objects.refuses in name:
            return self._answer(403, {"error": {"code": 403, "message": "no"}})
        self.objects.put(name, content)
        return self._answer(200, self._facts(name, content))

    def do_DELETE(self) -> None:
        name, _ = self._asked()
        self._answer(204 if self.objects.delete(name) else 404)

    def _asked(self) -> tuple[str, dict[str, str]]:
        """`bucket/object` (of a list or upload `bucket/`), and the query."""
        url = urllib.parse.urlsplit(self.path)
        parts = url.path.split("/b/", 1)[1].split("/", 2)
        bucket, rest = parts[0], parts[2:]
        name = urllib.parse.unquote(rest[0]) if rest else ""
        return f"{bucket}/{name}", dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))

    def _facts(self, name: str, content: bytes) -> dict[str, Any]:
        bucket, _, key = name.partition("/")
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": key,
            "size": str(len(content)),
            "generation": str(self.objects.generation.get(name, 0)),
            "metageneration": "1",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix = bucket + query.get("prefix", "")
        with self.objects.lock:
            found = {
                name: content
                for name, content in sorted(self.objects.content.items())
                if name.startswith(prefix)
            }
        if start := query.get("startOffset"):
            found = {name: content for name, content in found.items() if name >= bucket + start}
        if end := query.get("endOffset"):
            found = {name: content for name, content in found.items() if name < bucket + end}
        items, prefixes = [], set()
        for name, content in found.items():
            rest = name.removeprefix(prefix)
            if (mark := query.get("delimiter")) and mark in rest:
                prefixes.add(name[: len(prefix) + rest.index(mark) + 1].removeprefix(bucket))
            else:
                items.append(self._facts(name, content))
        self._answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _answer(
        self, status: int, content: bytes | dict[str, Any] = b"", headers: Any = None
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(body)


class BucketFiles(AbstractFileSystem):
    """fsspec's view of the server of this process's environment: whole objects, nothing else."""

    protocol = ("gcs", "gs")
    cachable = False

    def __init__(self, *args: Any, finalize_on_close: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._session = requests.Session()

    def _url(self, path: str, upload: bool = False) -> str:
        bucket, _, name = self._strip_protocol(path).partition("/")
        inside = "" if upload or not name else "/" + urllib.parse.quote(name, safe="")
        return f"{os.environ[_URL]}{'/upload' * upload}/storage/v1/b/{bucket}/o{inside}"

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        bucket, _, name = path.partition("/")
        query = {"prefix": f"{name}/" if name else "", "delimiter": "/"}
        answer = self._session.get(self._url(bucket), params=query).json()
        found = [
            {"name": f"{bucket}/{prefix.rstrip('/')}", "type": "directory", "size": 0}
            for prefix in answer["prefixes"]
        ]
        found += [_file(f"{bucket}/{item['name']}", item) for item in answer["items"]]
        if not found:
            found = [info] if (info := self._object(path)) else []
        if not found:
            raise FileNotFoundError(path)
        return found if detail else [entry["name"] for entry in found]

    def _object(self, path: str) -> dict[str, Any] | None:
        path = self._strip_protocol(path)
        answer = self._session.get(self._url(path)) if "/" in path else None
        return _file(path, answer.json()) if answer is not None and answer.ok else None

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if found := self._object(path):
            return found
        self.ls(path)  # raises
        return {"name": path, "type": "directory", "size": 0}

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        answer = self._session.get(self._url(path), params={"alt": "media"})
        if answer.status_code == 404:
            raise FileNotFoundError(path)
        return answer.content[start:end]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        name = self._strip_protocol(path).partition("/")[2]
        assert name, f"{path} names no object"
        assert not {"", ".", ".."} & set(name.split("/")), f"{path} is no name of ours"
        query = {"name": name, "uploadType": "media"}
        answer = self._session.post(self._url(path, upload=True), params=query, data=value)
        if not answer.ok:
            raise OSError(f"Forbidden: {path}")

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode == "rb":
            return io.BytesIO(self.cat_file(path))
        assert mode == "wb", f"a bucket has no {mode!r}"
        return _Upload(self, path)

    def rm_file(self, path: str) -> None:
        if self._session.delete(self._url(path)).status_code == 404:
            raise FileNotFoundError(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        names = self.find(path) if recursive else [path]
        if not names:
            raise FileNotFoundError(path)
        for name in names:
            self.rm_file(name)

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def rmdir(self, path: str) -> None:
        pass

    def mv(self, *_: Any, **__: Any) -> None:
        raise AssertionError("a bucket has no rename")

    rename = move = mv

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        self.pipe_file(path2, self.cat_file(path1))


class _Upload(io.BytesIO):
    """Becomes an object when it is closed."""

    def __init__(self, files: BucketFiles, path: str) -> None:
        super().__init__()
        self._files, self._path = files, path

    def close(self) -> None:
        if not self.closed:
            self._files.pipe_file(self._path, self.getvalue())
        super().close()

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            super().close()
        self.close()


def _file(name: str, item: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "type": "file", "size": int(item["size"])}


def use() -> None:
    """Makes fsspec, in this process, read `gs://` from the server that the environment names."""
    fsspec.register_implementation("gcs", BucketFiles, clobber=True)
    fsspec.register_implementation("gs", BucketFiles, clobber=True)


@contextlib.contextmanager
def serve() -> Iterator[tuple[str, Objects]]:
    """Serves a new, empty store; gives its address and what is in it."""
    objects = Objects()
    handler = type("Handler", (_Handler,), {"objects": objects})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", objects
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def bucket_here(patch: pytest.MonkeyPatch) -> Iterator[Objects]:
    """A store that this process, and those it starts, find behind `gs://`."""
    with serve() as (url, objects):
        patch.setenv(_URL, url)
        # What is no real token keeps TensorStore from looking for one.
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        use()
        yield objects
