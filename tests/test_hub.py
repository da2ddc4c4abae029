"""What a hub can answer: a loopback server plays it for the real libraries, and each answer is one line."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

import common
import hub
import sample
from helpers import TINY, here
from tools import evaluate

TINY_FILES = {
    str(path.relative_to(TINY)): path
    for path in TINY.rglob("*")
    if path.is_file() and "adapters" not in path.parts
}


class Hub(BaseHTTPRequestHandler):
    """A hub whose repositories are named after what is wrong with them; it counts its requests."""

    asked = []
    release = threading.Event()  # lets the slow repository's answers go

    def answer(self, status, content=b"{}", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        self.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        is_list = parts[:2] == ["api", "models"]
        name = parts[3] if is_list else parts[1]
        file = "/".join(parts[4:])
        if name == "slow":
            self.release.wait(20)
        if name == "broken":
            self.answer(500)
        elif name == "gated" and not is_list:
            self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        elif name == "locked":
            self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        elif name in ("missing", "slow"):
            self.answer(404, X_Error_Code="RepoNotFound")
        elif name == "moved":
            self.answer(307, Location=self.path.replace("owner/moved", "owner/tiny"))
        elif is_list:
            files = {"empty": [], "wrong": ["model_index.json"]}.get(name, list(TINY_FILES))
            if "tree" in parts:
                content = [{"type": "file", "path": f, "size": 1, "oid": "b"} for f in files]
            else:
                listed = [{"rfilename": f} for f in files]
                content = {"id": f"owner/{name}", "siblings": listed, "sha": "a" * 40}
            self.answer(200, json.dumps(content).encode())
        else:
            content = b"<html>" if name == "wrong" else self.content_of(file)
            if content is None:
                self.answer(404, X_Error_Code="EntryNotFound")
            else:
                self.answer(
                    200,
                    content,
                    X_Repo_Commit="a" * 40,
                    ETag=f'"{hashlib.md5(content).hexdigest()}"',
                )

    def do_HEAD(self):
        self.do_GET()

    def content_of(self, file):
        return TINY_FILES[file].read_bytes() if file in TINY_FILES else None

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """One that does not speak of clients that gave up, into the stderr that the tests read."""

    def handle_error(self, request, client_address):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A running hub that the libraries of this process ask; its cache is empty."""
    httpd = Server(("127.0.0.1", 0), Hub)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(Hub, "asked", [])
    Hub.release.clear()
    url = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    monkeypatch.setattr(hub, "PATIENCE", 1)
    monkeypatch.chdir(tmp_path)
    yield SimpleNamespace(url=url, asked=Hub.asked)
    Hub.release.set()
    httpd.shutdown()


ON_CPU = ["--preset", "tiny", "--device", "cpu"]
# What is asked of the hub: a base, adapters, a reward.
USES = {
    "base": (sample, ["x", *ON_CPU, "--pretrained", "{repo}", "--cold_start", "", "--rtdmd", ""]),
    "adapters": (sample, ["x", *ON_CPU, "--cold_start", "{repo}"]),
    "reward": (evaluate, ["x", *ON_CPU, "--rewards", "pickscore"]),
}
ANSWERS = [
    ("gated", "accept the licence on huggingface.co/owner/gated, then hf auth login"),
    ("locked", "accept the licence on huggingface.co/owner/locked, then hf auth login"),
    ("missing", "no such repository on the hub"),
    ("broken", "the hub cannot be asked"),
    ("slow", "the hub cannot be asked"),
    ("wrong", ""),
    ("empty", ""),
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name, words", ANSWERS, ids=[name for name, _ in ANSWERS])
def test_every_answer_of_the_hub_is_one_line(use, name, words, server, monkeypatch, tmp_path):
    if use == "adapters" and name == "gated":
        # its list is open, and holds no adapter
        words = "holds"
    program, flags = USES[use]
    repo = f"owner/{name}"
    if use == "reward":
        loader, differentiable, _ = evaluate.build_for.__globals__["REWARDS"]["pickscore"]
        rewards = evaluate.build_for.__globals__["REWARDS"]
        monkeypatch.setitem(rewards, "pickscore", (loader, differentiable, repo))
    words_of = [word.format(repo=repo) for word in flags]
    status, out, err = here(program, *words_of, "--out_dir", tmp_path / "out")
    assert status == 2, err
    lines = err.strip().splitlines()
    last = lines[-1]
    assert last.startswith(f"{program.__name__.split('.')[-1]}.py: error: ")
    assert words in last
    assert all(line.startswith("note: ") for line in lines[:-1]), err
    assert not list((tmp_path / "out").glob("*"))
    # no retry storm: no file is asked for again and again
    most = max(server.asked.count(path) for path in server.asked)
    assert most <= 3, server.asked


def test_a_repository_that_has_moved_is_followed(server, tmp_path):
    flags = ["a red circle", *ON_CPU, "--pretrained", "owner/moved", "--out_dir", tmp_path / "out"]
    status, _, err = here(sample, *flags, "--cold_start", "", "--rtdmd", "", "--steps", 1)
    assert status == 0, err
    assert (tmp_path / "out/00000.png").exists()


def test_the_cache_serves_when_the_hub_is_gone(server, tmp_path, monkeypatch):
    flags = ["a red circle", *ON_CPU, "--pretrained", "owner/tiny", "--steps", 1]
    flags += ["--cold_start", "", "--rtdmd", ""]
    status, _, err = here(sample, *flags, "--out_dir", tmp_path / "one")
    assert status == 0, err
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    status, _, err = here(sample, *flags, "--out_dir", tmp_path / "two")
    assert status == 0, err
    assert "the hub cannot be asked" in err
    assert constants.HF_HUB_OFFLINE
    one, two = (tmp_path / name / "00000.png" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


# ---- other messages ------------------------------------------------------------------------------
def raised(error, cause=None):
    """The exception as a library raises it from another one."""
    try:
        try:
            raise cause or ValueError("inner")
        except Exception as inner:
            raise error from inner
    except Exception as e:
        return e


@pytest.mark.parametrize(
    "error, words",
    [
        (raised(OSError("x"), OSError(28, "No space left on device")), "the disk is full"),
        (raised(torch.cuda.OutOfMemoryError("CUDA out of memory")), "no room on the GPU"),
        (raised(OSError("x"), errors.LocalEntryNotFoundError("y")), "no whole copy of owner/name"),
    ],
)
def test_the_error_that_another_came_from_decides(error, words):
    assert words in hub.in_words(error, "owner/name")


def test_a_long_message_ends_at_a_word():
    text = hub.in_words(ValueError("word " * 100), "owner/name")
    assert len(text) <= common.LONGEST + 4
    assert text.endswith("word ...")


def test_only_a_base_without_other_weights_is_taken_as_fp16():
    half = ["transformer/diffusion_pytorch_model.fp16.safetensors", "vae/config.json"]
    assert hub.variant_of(half) == "fp16"
    assert hub.variant_of([*half, "transformer/diffusion_pytorch_model.safetensors"]) is None
    assert hub.variant_of(None) is None


def test_a_base_in_fp16_alone_is_drawn_with(tmp_path):
    base = tmp_path / "half"
    for name, path in TINY_FILES.items():
        folder, _, file = name.rpartition("/")
        if file.endswith(".safetensors") and folder in ("transformer", "vae", "text_encoder"):
            file = file.replace(".safetensors", ".fp16.safetensors")
        (base / folder).mkdir(parents=True, exist_ok=True)
        (base / folder / file).write_bytes(path.read_bytes())
    flags = ["a circle", *ON_CPU, "--cold_start", "", "--rtdmd", "", "--steps", 1]
    for folder, out in ((base, "one"), (TINY, "two")):
        status, _, err = here(sample, *flags, "--pretrained", folder, "--out_dir", tmp_path / out)
        assert status == 0, err
    one, two = (tmp_path / name / "00000.png" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
