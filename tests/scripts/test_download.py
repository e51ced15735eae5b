"""scripts/download.py against a stand-in for the hub on loopback, through huggingface_hub's real client."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "download.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
TEXTS = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.model": bytes(range(256)),
    "tokenizer_config.json": b'{"bos": "\xc3\xa9"}',
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE.txt": b"licence",
    "README.md": b"# readme",
}
SHARDED = {
    **TEXTS,
    "model.safetensors.index.json": INDEX.encode(),
    "model-00001-of-00002.safetensors": os.urandom(100_000),
    "model-00002-of-00002.safetensors": os.urandom(50_000),
}
COPIES = {
    "pytorch_model.bin": b"bin",
    "pytorch_model-00001-of-00002.bin": b"bin",
    "consolidated.safetensors": b"copy",
    "consolidated.00.pth": b"pth",
    "original/consolidated.00.pth": b"pth",
    "original/params.json": b"{}",
    "original/tokenizer.model": b"other",
    "model.gguf": b"gguf",
    "onnx/model.onnx": b"onnx",
    "flax_model.msgpack": b"flax",
    "modeling_evil.py": b"raise SystemExit",
    ".gitattributes": b"",
    "readme_files/figure.png": b"png",
    "LICENSES/third_party/LICENSE.txt": b"theirs",
    "notices/config.json": b"{}",
}


class Hub(ThreadingHTTPServer):
    """Serves {repo: {name: bytes}}: model information, the file tree, and resolve URLs with the hub's headers."""

    daemon_threads = True

    def __init__(self, repos):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = repos
        self.gated = {}  # repo -> the token that opens it
        self.cut = {}  # file name -> bytes after which its connection is dropped
        self.broken = set()  # files that answer 500
        self.fetched = []  # (file name, Range header) of each GET of a file
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, unquote(urlsplit(self.path).path).strip("/").split("/")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        api = path[:2] == ["api", "models"]
        repo, rest = "/".join(path[2:4] if api else path[:2]), path[4:] if api else path[2:]
        if token == "wrong":
            return self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        if repo not in hub.repos:  # the real hub says 401 to strangers, so as not to tell private from missing
            return self.answer(404 if token else 401, X_Error_Code="RepoNotFound", X_Error_Message="Not found")
        files = hub.repos[repo]
        if rest[1:2] and rest[1] not in ("main", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        if api and rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": n, "size": len(b), "oid": oid(b)} for n, b in files.items()]
            return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        if api:
            siblings = [{"rfilename": n, "size": len(b), "blobId": oid(b)} for n, b in files.items()]
            body = {"_id": "1", "id": repo, "modelId": repo, "sha": COMMIT, "private": False, "siblings": siblings}
            return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
        if hub.gated.get(repo, token) != token:
            status, text = (403 if token else 401), f"Access to model {repo} is restricted"
            return self.answer(status, X_Error_Code="GatedRepo", X_Error_Message=text)
        name = "/".join(rest[2:])
        if name not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        if name in hub.broken and self.command == "GET":
            return self.answer(500)
        self.file(name, files[name])

    def file(self, name, body):
        headers = {"ETag": f'"{oid(body)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if self.command == "GET":
            self.server.fetched.append((name, wanted))
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        cut = self.server.cut.pop(name, None) if self.command == "GET" else None
        if cut is None:
            return self.answer(206 if start else 200, body[start:], **headers)
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.wfile.flush()
        self.close_connection = True


def oid(body):
    return hashlib.sha1(body).hexdigest()


@pytest.fixture(scope="module")
def hub():
    server = Hub({})
    yield server
    server.shutdown()


@pytest.fixture(autouse=True)
def reset(hub):
    hub.repos = {"org/sharded": {**SHARDED, **COPIES}}
    hub.gated, hub.cut, hub.broken, hub.fetched = {}, {}, set(), []


# huggingface_hub reads HF_ENDPOINT when it is imported, so the script runs in another process. Importing torch takes it
# seconds: one process runs most of the commands of this file, one after the other.
WORKER = """
import contextlib, io, json, os, runpy, sys, traceback
os._exit = sys.exit  # the script ends its process without the interpreter's shutdown; this one goes on
for line in sys.stdin:
    script, cwd, args, token = json.loads(line)
    os.chdir(cwd)
    os.environ["HF_TOKEN"] = token
    sys.argv, code = [script, *args], 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 1
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


def environment(endpoint, home, **more):
    keep = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    return {**keep, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **more}


def download_alone(cwd, *args, endpoint, **more):
    env = environment(endpoint, cwd / "hf_home", **more)
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def download(hub, tmp_path_factory):
    """download(cwd, *args, token="") runs the script there; returns what subprocess.run does."""
    env = environment(hub.url, tmp_path_factory.mktemp("hf_home"))
    pipe = subprocess.PIPE
    worker = subprocess.Popen([sys.executable, "-c", WORKER], env=env, stdin=pipe, stdout=pipe, text=True)

    def command(cwd, *args, token=""):
        worker.stdin.write(json.dumps([str(SCRIPT), str(cwd), args, token]) + "\n")
        worker.stdin.flush()
        return subprocess.CompletedProcess(args, *json.loads(worker.stdout.readline()))

    yield command
    worker.stdin.close()
    worker.wait(timeout=240)


def landed(folder):
    files = (p for p in folder.rglob("*") if p.is_file() and ".cache" not in p.relative_to(folder).parts)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def refused(result, *words):
    """One line on stderr with all of `words`, exit code 2, nothing on stdout."""
    assert result.returncode == 2, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert all(word in line for word in words), result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
    return line


def test_sharded_safetensors_without_copies(hub, tmp_path):
    """Catches weights fetched twice or in the wrong format (consolidated, original/), subfolders fetched because their
    names begin like a wanted file's, and any changed byte."""
    result = download_alone(tmp_path, "org/sharded", endpoint=hub.url)
    assert result.returncode == 0, result.stderr
    assert landed(tmp_path / "checkpoints/org/sharded") == SHARDED
    assert "inference/generate.py --checkpoint_path checkpoints/org/sharded" in result.stdout
    assert COMMIT[:12] in result.stdout


@pytest.mark.parametrize(
    "weights, copies, revision",
    [
        ({"model.safetensors": b"single"}, {"pytorch_model.bin": b"bin", "model.safetensors.index.json": b"x"}, "main"),
        ({"pytorch_model.bin": b"only"}, {"tf_model.h5": b"h5", "pytorch_model.pth": b"x"}, COMMIT),
        (
            {
                "pytorch_model.bin.index.json": INDEX.replace("safetensors", "bin").encode(),
                "model-00001-of-00002.bin": b"1",
                "model-00002-of-00002.bin": b"2",
            },
            {"training_args.bin": b"x", "optimizer.bin": b"x"},
            "main",
        ),
    ],
)
def test_other_formats(hub, download, tmp_path, weights, copies, revision):
    """Catches a missing .bin fallback, .bin files that are no weights, shards where transformers reads the single file,
    and an ignored --output_dir or --revision."""
    hub.repos["org/other"] = {**TEXTS, **weights, **copies}
    result = download(tmp_path, "org/other", "--output_dir", "there", "--revision", revision)
    assert result.returncode == 0, result.stderr
    assert landed(tmp_path / "there") == {**TEXTS, **weights}


def test_resume(hub, download, tmp_path):
    """Catches a download that starts over: files that arrived before a failure are kept, the others completed; and a
    file that has left the repository called one that never was in it."""
    large = "model-00001-of-00002.safetensors"
    hub.broken = {large}
    folder = tmp_path / "checkpoints/org/sharded"
    refused(download(tmp_path, "org/sharded"), "500")
    assert large not in landed(folder)
    first = {name for name, _ in hub.fetched}
    (folder / ".cache/huggingface/download/killed.incomplete").write_bytes(b"half")

    hub.broken, hub.fetched = set(), []
    hub.cut = {large: 60_000}
    result = download(tmp_path, "org/sharded")
    assert result.returncode == 0, result.stderr
    assert landed(folder) == SHARDED
    again = [name for name, _ in hub.fetched]
    assert large in again and set(again) & (first - {large}) == set() and len(first) > 3
    assert not list(folder.rglob("*.incomplete"))

    hub.fetched = []
    assert download(tmp_path, "org/sharded").returncode == 0
    assert hub.fetched == []
    del hub.repos["org/sharded"]["LICENSE.txt"]
    refused(download(tmp_path, "org/sharded"), "holds LICENSE.txt, which is not in this revision of the repository")


def test_gated_and_token(hub, download, tmp_path):
    """Catches an access error that does not say how to get access, and a token that is not passed on."""
    hub.gated = {"org/sharded": "hf_good"}
    refused(download(tmp_path, "org/sharded"), "org/sharded", "gated", "/settings/tokens", "HF_TOKEN")
    refused(download(tmp_path, "org/sharded", token="hf_poor"), "gated", "/settings/tokens")
    refused(download(tmp_path, "org/sharded", "--token", "wrong"), "401", "token", "/settings/tokens")
    assert not landed(tmp_path / "checkpoints")
    result = download(tmp_path, "org/sharded", token="hf_good")
    assert result.returncode == 0 and "hf_good" not in result.stdout + result.stderr
    assert landed(tmp_path / "checkpoints/org/sharded") == SHARDED


def test_a_resumed_download_that_is_refused_is_not_called_complete(hub, download, tmp_path):
    """Catches snapshot_download's habit of only warning when a folder exists and the hub refuses the files."""
    folder = tmp_path / "checkpoints/org/sharded"
    assert download(tmp_path, "org/sharded").returncode == 0
    (folder / "tokenizer.model").write_bytes(b"cut")
    refused(download(tmp_path, "org/sharded"), "tokenizer.model", "incomplete")


@pytest.mark.parametrize(
    "args, files, words",
    [
        (["org/missing"], None, ["no repository org/missing"]),
        (["sharded"], None, ["'sharded'", "ORG/NAME"]),
        (["https://huggingface.co/org/sharded"], None, ["ORG/NAME"]),
        (["org/sharded", "--revision", "v9"], None, ["org/sharded", "'v9'"]),
        (
            ["org/bad"],
            {"config.json": b"{}", "model.gguf": b"", "original/model.safetensors": b""},
            ["org/bad", ".gguf"],
        ),
        (["org/bad"], {"model.safetensors": b""}, ["org/bad", "no config.json"]),
        (["org/bad"], {"config.json": b"{}", "model.safetensors.index.json": INDEX.encode()}, ["model-00001-of-00002"]),
        *(
            (["org/bad"], {"config.json": b"{}", "model.safetensors.index.json": index}, ["index.json is broken"])
            for index in (
                b"{",
                b"\xff",
                b"[]",
                b'{"weight_map": ["a"]}',
                b'{"weight_map": {}}',
                b'{"weight_map": {"a": 1}}',
            )
        ),
    ],
)
def test_bad_input(hub, download, tmp_path, args, files, words):
    """Catches tracebacks, and messages that do not name the culprit."""
    hub.repos["org/bad"] = files or {}
    refused(download(tmp_path, *args), *words)


def test_no_network(tmp_path):
    """Catches a traceback or a long wait when the hub cannot be reached, and when the user has switched it off."""
    refused(download_alone(tmp_path, "org/sharded", endpoint="http://127.0.0.1:9"), "cannot reach http://127.0.0.1:9")
    refused(
        download_alone(tmp_path, "org/sharded", endpoint="http://127.0.0.1:9", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE"
    )
    assert not (tmp_path / "checkpoints").exists()


def test_occupied_folder(hub, download, tmp_path):
    """Catches overwriting a folder that is not this repository's, whose files would be mixed with the new ones."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("my own")
    words = ("mine already holds config.json, which did not come from this repository",)
    refused(download(tmp_path, "org/sharded", "--output_dir", "mine"), *words)
    (tmp_path / "file").write_text("x")
    refused(download(tmp_path, "org/sharded", "--output_dir", "file"), "file")
    assert landed(mine) == {"config.json": b"my own"}
