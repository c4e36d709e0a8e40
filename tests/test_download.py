"""Downloads against a server on this machine: resumed where they broke off, checked, cached."""

import contextlib
import hashlib
import http.server
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
import types

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from other_networks import assert_same_weights, small_network
from safetensors.torch import save, save_file

from sim_m2f.errors import UserError
from sim_m2f.segmenter import from_pretrained
from sim_m2f.weights import download as downloads
from sim_m2f.weights import sources, weight_files
from sim_m2f.weights.checkpoint import load_checkpoint
from sim_m2f.weights.download import download
from sim_m2f.weights.weight_files import read_weight_file

CONTENT = save({"weight": torch.arange(2500.0)})  # 10,072 bytes or so
OTHER = save({"weight": -torch.arange(2500.0)})
BROKEN_AT = 5000


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` with ranges; each of the ``faults`` answers one request in its place."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.ranges, self.etag = {}, [], [], '"v1"'

    def address(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.ranges.append(self.headers.get("Range"))
        self.close_connection = True
        content = self.server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
        elif self.server.faults:
            self.server.faults.pop(0)(self, content)
        elif wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.answer(206, content[start:], rest_of(content, start))
        else:
            self.answer(200, content)

    def answer(self, status: int, body: bytes, headers: dict[str, str | None] | None = None) -> None:
        """Headers of None are left out."""
        usual = {"ETag": self.server.etag, "Content-Length": str(len(body))}
        self.send_response(status)
        for name, value in (usual | (headers or {})).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing on the terminal."""


def rest_of(content: bytes, start: int) -> dict[str, str]:
    return {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}


def breaks_off(handler: Handler, content: bytes) -> None:
    handler.answer(200, content[:BROKEN_AT], {"Content-Length": str(len(content))})


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("SIM_M2F_CACHE", str(tmp_path / "cache"))
    server = Server()
    server.files["weights.bin"] = CONTENT
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def cached(folder) -> list[str]:
    """What lies in the cache below ``folder`` besides locks and parts."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if path.suffix not in (".lock", ".part", ".known", ".version")]


def refused(address: str) -> str:
    """The one line with which a download is refused."""
    with pytest.raises(UserError) as raised:
        download(address)
    line = str(raised.value)
    assert line.startswith(address)
    assert "\n" not in line
    return line


def test_a_file_is_downloaded_once(server):
    server.files["zoo/weights.bin"] = CONTENT
    path = download(server.address("zoo/weights.bin"))
    assert path.read_bytes() == CONTENT
    assert download(server.address("zoo/weights.bin")) == path
    assert len(server.ranges) == 1
    assert sorted(file.name for file in path.parent.iterdir()) == ["weights.bin", "weights.bin.lock"]


def test_a_cache_that_is_read_only_gives_what_it_has(server, monkeypatch):
    path = download(server.address("weights.bin"))

    def refuse(name):
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(downloads, "FileLock", refuse)
    assert download(server.address("weights.bin")) == path


def test_a_broken_download_is_gone_on_with(server, tmp_path):
    server.faults = [breaks_off]
    assert "not downloaded (IncompleteRead(5000 bytes read" in refused(server.address("weights.bin"))
    assert not cached(tmp_path)
    assert download(server.address("weights.bin")).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=5000-"]


def test_a_server_that_is_down_for_a_while_costs_nothing(server):
    server.faults = [breaks_off, lambda handler, content: handler.send_error(503)]
    refused(server.address("weights.bin"))
    assert "(503 Service Unavailable)" in refused(server.address("weights.bin"))
    assert download(server.address("weights.bin")).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=5000-", "bytes=5000-"]


@pytest.mark.parametrize("etag", [None, 'W/"v1"'])
def test_without_a_strong_etag_nothing_is_resumed(server, etag):
    """The file may have changed in between, and nothing would say so."""
    server.etag, server.faults = etag, [breaks_off]
    refused(server.address("weights.bin"))
    server.files["weights.bin"] = OTHER
    assert download(server.address("weights.bin")).read_bytes() == OTHER
    assert server.ranges == [None, None]


RESUMED_WRONGLY = {
    "from the beginning": lambda handler, content: handler.answer(206, content, rest_of(content, 0)),
    "from elsewhere": lambda handler, content: handler.answer(206, content[4000:], rest_of(content, 4000)),
    "without a range": lambda handler, content: handler.answer(206, content[4000:]),
    "with too much": lambda handler, content: handler.answer(206, content[4000:], rest_of(content, 5000)),
    "with too little": lambda handler, content: handler.answer(206, content[6000:], rest_of(content, 5000)),
    "of a longer file": lambda handler, content: handler.answer(
        206, (content + b"x")[5000:], rest_of(content + b"x", 5000)
    ),
    "of another version": lambda handler, content: handler.answer(
        206, OTHER[5000:], {**rest_of(content, 5000), "ETag": '"v2"'}
    ),
    "by 416": lambda handler, content: handler.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"}),
    "by the whole file": lambda handler, content: handler.answer(200, content),
}


@pytest.mark.parametrize("fault", RESUMED_WRONGLY)
def test_what_is_resumed_wrongly_is_begun_anew(server, fault):
    server.faults = [breaks_off, RESUMED_WRONGLY[fault]]
    refused(server.address("weights.bin"))
    assert download(server.address("weights.bin")).read_bytes() == CONTENT


def test_a_rest_that_breaks_off_is_gone_on_with(server):
    def breaks_off_again(handler, content):
        length = {"Content-Length": str(len(content) - BROKEN_AT)}
        handler.answer(206, content[BROKEN_AT:6000], {**rest_of(content, BROKEN_AT), **length})

    server.faults = [breaks_off, breaks_off_again]
    refused(server.address("weights.bin"))
    refused(server.address("weights.bin"))
    assert download(server.address("weights.bin")).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=5000-", "bytes=6000-"]


def test_a_file_that_changed_meanwhile_is_begun_anew(server):
    server.faults = [breaks_off]
    refused(server.address("weights.bin"))
    server.files["weights.bin"], server.etag = OTHER, '"v2"'
    assert download(server.address("weights.bin")).read_bytes() == OTHER


def chunked(handler: Handler, content: bytes, complete: bool = True) -> None:
    body = b"%x\r\n%s\r\n" % (len(content), content) + (b"0\r\n\r\n" if complete else b"")
    handler.answer(200, body, {"Content-Length": None, "Transfer-Encoding": "chunked"})


def without_length(handler: Handler, content: bytes) -> None:
    handler.answer(200, content, {"Content-Length": None, "Connection": "close"})


# What a server answers, and a part of the line that says so.
NEVER_CACHED = {
    "a web page": (lambda handler, _: handler.answer(200, b"<!DOCTYPE html>\n<p>Sign in"), "is a web page"),
    "text": (lambda handler, _: handler.answer(200, b"var x = {};"), "is no file of weights"),
    "an empty body": (lambda handler, _: handler.answer(200, b""), "is empty"),
    "204": (lambda handler, _: handler.answer(204, b"", {"Content-Length": None}), "(204 No Content)"),
    "a part unasked": (
        lambda handler, content: handler.answer(206, content[:BROKEN_AT], rest_of(content, 0)),
        "(206 Partial Content)",
    ),
    "416 unasked": (lambda handler, content: handler.answer(416, content), "(416 "),
    "an error with a body": (lambda handler, content: handler.answer(500, content), "(500 "),
    "a truncated body": (breaks_off, "IncompleteRead"),
    "truncated chunks": (lambda handler, content: chunked(handler, content, False), "IncompleteRead"),
    "a body of unknown length": (without_length, "does not say how long it is; add #sha256="),
}


@pytest.mark.parametrize("fault", NEVER_CACHED)
def test_what_is_no_whole_file_of_weights_is_never_cached(server, tmp_path, fault):
    answer, said = NEVER_CACHED[fault]
    server.faults = [answer]
    assert said in refused(server.address("weights.bin"))
    assert not cached(tmp_path)
    assert download(server.address("weights.bin")).read_bytes() == CONTENT


def test_chunks_and_a_body_whose_hash_is_known_may_have_no_length(server):
    server.files["other.bin"] = OTHER
    server.faults = [chunked, without_length]
    assert download(server.address("weights.bin")).read_bytes() == CONTENT
    known = f"other.bin#sha256={hashlib.sha256(OTHER).hexdigest()}"
    assert download(server.address(known)).read_bytes() == OTHER


def test_files_of_every_kind_of_weights_are_accepted(server, tmp_path):
    torch.save({"weight": torch.ones(3)}, tmp_path / "zip.pth")
    torch.save({"weight": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps({"weight": np.ones(3)}))
    for name in ("zip.pth", "old.pth", "arrays.pkl"):
        server.files[name] = (tmp_path / name).read_bytes()
        assert download(server.address(name)).read_bytes() == server.files[name]


def test_a_server_that_drips_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "STALL", 0.5)

    def drips(handler, content):
        handler.answer(200, b"", {"Content-Length": str(len(content))})
        for byte in content[:200]:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.05)

    server.faults = [drips]
    begun = time.monotonic()
    assert "bytes came in" in refused(server.address("weights.bin"))
    assert time.monotonic() - begun < 5
    assert not cached(tmp_path)


def test_a_file_that_no_memory_and_no_disk_can_hold_is_refused_before_it_comes(server, tmp_path):
    def announces(size):
        return lambda handler, content: handler.answer(200, content, {"Content-Length": str(size)})

    server.faults = [announces(10**15), announces(shutil.disk_usage(tmp_path).free + 10**9)]
    assert "has 1,000,000.0 GB, more than this machine's memory (" in refused(server.address("weights.bin"))
    second = refused(server.address("weights.bin"))
    assert "no space left: " in second or "more than this machine's memory" in second
    assert not list(tmp_path.rglob("*.part"))
    assert download(server.address("weights.bin")).read_bytes() == CONTENT


def test_an_endless_file_leaves_nothing(server, tmp_path, monkeypatch):
    memory = types.SimpleNamespace(total=5 << 20)
    monkeypatch.setattr(weight_files.psutil, "virtual_memory", lambda: memory)

    def endless(handler, content):
        handler.answer(200, b"", {"Content-Length": None, "Transfer-Encoding": "chunked"})
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))

    server.faults = [endless]
    assert "more than this machine's memory (0.0 GB)" in refused(server.address("weights.bin"))
    assert not list(tmp_path.rglob("*.part"))


def test_a_file_larger_than_the_memory_is_not_read(tmp_path):
    path = tmp_path / "large.safetensors"
    path.write_bytes(CONTENT)
    os.truncate(path, 10**13)
    with pytest.raises(UserError, match=r"has 10,000.0 GB, more than this machine's memory \("):
        read_weight_file(path)


def test_shards_that_are_together_larger_than_the_memory_are_not_read(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(CONTENT)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    memory = types.SimpleNamespace(total=int(1.5 * len(CONTENT)))
    monkeypatch.setattr(weight_files.psutil, "virtual_memory", lambda: memory)
    assert read_weight_file(tmp_path / "one.safetensors")
    with pytest.raises(UserError, match="more than this machine's memory"):
        read_weight_file(index)


def test_weights_for_which_memory_does_not_suffice_are_told_so(tmp_path, monkeypatch):
    torch.save({"weight": torch.ones(3)}, tmp_path / "model.pth")

    def load(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(UserError, match="needs more memory than is free"):
        read_weight_file(tmp_path / "model.pth")


def test_a_part_of_an_older_file_does_not_take_the_place_of_the_new_one(server, tmp_path, monkeypatch):
    server.faults = [breaks_off]
    refused(server.address("weights.bin"))
    (part,) = tmp_path.rglob("*.part")
    server.etag = '"v2"'

    def room_without_the_part(_):
        return types.SimpleNamespace(free=0 if part.exists() else len(CONTENT))

    monkeypatch.setattr(downloads.shutil, "disk_usage", room_without_the_part)
    assert download(server.address("weights.bin")).read_bytes() == CONTENT


def test_hashes(server, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    good, bad = f"good-{digest[:8]}.pth", "bad-abcdef12.pth"
    server.files.update({good: CONTENT, bad: CONTENT, "plain.pth": CONTENT})
    assert download(server.address(good)).read_bytes() == CONTENT
    assert download(f"{server.address('plain.pth')}#sha256={digest.upper()}").read_bytes() == CONTENT
    assert "SHA-256" in refused(server.address(bad))
    assert "SHA-256" in refused(f"{server.address('weights.bin')}#sha256={'0' * 64}")
    assert sorted(cached(tmp_path)) == [good, "plain.pth"]


@pytest.mark.parametrize(
    "fragment", ["", "sha256=", "sha256=xyz", "md5=d41d8cd98f00b204e9800998ecf8427e", "x"]
)
def test_a_hash_that_cannot_be_checked_is_refused(server, fragment):
    assert "#sha256=DIGITS" in refused(f"{server.address('weights.bin')}#{fragment}")
    assert not server.ranges


def test_a_cached_file_is_checked_against_a_hash_that_is_given_later(server, tmp_path):
    download(server.address("weights.bin"))
    assert "SHA-256" in refused(f"{server.address('weights.bin')}#sha256={'0' * 64}")
    assert not cached(tmp_path)


DOWNLOAD = "import sys; from sim_m2f.weights.download import download; print(download(sys.argv[1]))"


@pytest.mark.slow
def test_two_processes_at_once_download_once(server):
    def slowly(handler, content):
        handler.answer(200, content[:BROKEN_AT], {"Content-Length": str(len(content))})
        time.sleep(0.5)
        handler.wfile.write(content[BROKEN_AT:])

    server.faults = [slowly]
    command = [sys.executable, "-c", DOWNLOAD, server.address("weights.bin")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate()[0].strip() for process in processes}
    assert len(server.ranges) == len(paths) == 1
    with open(paths.pop(), "rb") as file:
        assert file.read() == CONTENT


def test_every_query_has_a_file_of_its_own(server):
    server.files |= {"get?id=A": CONTENT, "get?id=B": OTHER}
    first, second = (download(server.address(f"get?id={name}")) for name in "AB")
    assert (first.read_bytes(), second.read_bytes()) == (CONTENT, OTHER)
    assert download(server.address("get?id=A")) == first
    assert len(server.ranges) == 2


def test_the_cache_may_lie_above_the_working_directory(server, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("SIM_M2F_CACHE", "../cache")
    assert download(server.address("weights.bin")).resolve().is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize(
    "address",
    [
        "https://[abc/x.pth",
        "https://host",
        "https://host/../x.pth",
        "https://host/%2e%2e/x.pth",
        "https://host/a%00b",
    ],
)
def test_what_is_no_address_of_a_file_is_refused_in_one_line(server, address):
    assert "not the address of a file" in refused(address)


def test_a_missing_file_and_a_server_that_is_not_there(server):
    assert "not downloaded (404 Not Found)" in refused(server.address("none.pth"))
    assert re.search(r"not downloaded \(.*refused\)", refused("http://127.0.0.1:9/weights.pth"))


def test_weights_from_an_address_and_from_detectron2s_zoo(server, monkeypatch, tmp_path):
    _, source = small_network("ResNet-18", seed=1)
    _, network = small_network("ResNet-18", seed=2)
    torch.save({"model": source.state_dict()}, tmp_path / "model.pth")
    server.files["zoo/model.pth"] = (tmp_path / "model.pth").read_bytes()
    load_checkpoint(network, server.address("zoo/model.pth"), complete=True)
    assert_same_weights(network, source)
    monkeypatch.setattr(sources, "DETECTRON2_ADDRESS", server.address(""))
    assert not load_checkpoint(network, "detectron2://zoo/model.pth").unfilled
    assert len(server.ranges) == 1


@pytest.mark.slow
def test_weights_from_the_hub(tmp_path, monkeypatch):
    """A repository in huggingface_hub's cache, as it lies there after a download."""
    _, source = small_network("ResNet-18", seed=1)
    _, network = small_network("ResNet-18", seed=2)
    repository = tmp_path / "models--somebody--stars"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("a" * 40)
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    save_file(source.state_dict(), snapshot / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    load_checkpoint(network, "hf://somebody/stars", complete=True)
    assert_same_weights(network, source)
    with pytest.raises(UserError, match=r"hf://somebody/nothing: cannot be had"):
        load_checkpoint(network, "hf://somebody/nothing")
    with pytest.raises(UserError, match="owner/name"):
        load_checkpoint(network, "hf://nothing")


@pytest.mark.parametrize("files", [["model_0000009.pth", "last_checkpoint", "rng.pth"], ["network.pkl"]])
def test_the_folder_of_a_run_from_the_hub(tmp_path, monkeypatch, files):
    """Of a repository, the Hub gives what the patterns ask for."""
    repository = tmp_path / "repository"
    repository.mkdir()
    cfg, source = small_network("ResNet-18", seed=1)
    (repository / "config.yaml").write_text(cfg.dump())
    for name in files:
        torch.save({"model": source.state_dict()}, repository / name)
    if len(files) > 1:
        (repository / "last_checkpoint").write_text("model_0000009.pth")

    def snapshot_download(name, revision, allow_patterns):
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        for file in filter_repo_objects(os.listdir(repository), allow_patterns=allow_patterns):
            shutil.copy(repository / file, tmp_path / "snapshot" / file)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same_weights(from_pretrained("somebody/stars", device="cpu").network, source)


def test_a_failure_of_the_hub_without_a_word_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"hf://somebody/stars: cannot be had .*\(TimeoutError\)"):
        sources.hub_folder("hf://somebody/stars")
