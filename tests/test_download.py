"""Downloads against a server on this machine: resumed where they broke off, checked, cached."""

import hashlib
import http.server
import threading

import huggingface_hub
import pytest
import torch
from other_networks import assert_same_weights, small_network
from safetensors.torch import save_file

from sim_m2f.errors import UserError
from sim_m2f.weights import sources
from sim_m2f.weights.checkpoint import load_checkpoint
from sim_m2f.weights.download import download

CONTENT = bytes(range(256)) * 40


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` with ranges, breaks off once after ``breaks_after`` bytes, notes the ranges."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.breaks_after, self.ranges, self.version = {}, None, [], "v1"

    def address(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, name = self.server, self.path.lstrip("/")
        server.ranges.append(self.headers.get("Range"))
        if name not in server.files:
            self.send_error(404)
            return
        content, start = server.files[name], 0
        if self.headers.get("Range") and self.headers.get("If-Range") == f'"{server.version}"':
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{server.version}"')
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop, server.breaks_after = server.breaks_after, None
        self.wfile.write(content[start:stop])

    def log_message(self, *_):
        """Nothing on the terminal."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("SIM_M2F_CACHE", str(tmp_path / "cache"))
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_is_downloaded_once(server):
    server.files["zoo/weights.bin"] = CONTENT
    path = download(server.address("zoo/weights.bin"))
    assert path.read_bytes() == CONTENT
    assert download(server.address("zoo/weights.bin")) == path
    assert len(server.ranges) == 1
    assert sorted(file.name for file in path.parent.iterdir()) == ["weights.bin", "weights.bin.lock"]


def test_a_broken_download_is_gone_on_with(server):
    server.files["weights.bin"] = CONTENT
    server.breaks_after = 5000
    with pytest.raises(UserError, match=r"not downloaded .*5000 of 10240"):
        download(server.address("weights.bin"))
    assert download(server.address("weights.bin")).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=5000-"]


def test_a_file_that_changed_meanwhile_is_begun_anew(server):
    server.files["weights.bin"] = CONTENT
    server.breaks_after = 5000
    with pytest.raises(UserError):
        download(server.address("weights.bin"))
    server.files["weights.bin"], server.version = CONTENT[::-1], "v2"
    assert download(server.address("weights.bin")).read_bytes() == CONTENT[::-1]


def test_hashes(server):
    digest = hashlib.sha256(CONTENT).hexdigest()
    good, bad = f"good-{digest[:8]}.pth", "bad-abcdef12.pth"
    server.files.update({good: CONTENT, bad: CONTENT, "plain.pth": CONTENT})
    assert download(server.address(good)).read_bytes() == CONTENT
    assert download(f"{server.address('plain.pth')}#sha256={digest}").read_bytes() == CONTENT
    for wrong in (server.address(bad), f"{server.address('plain.pth')}#sha256={'0' * 64}"):
        with pytest.raises(UserError, match="SHA-256") as raised:
            download(wrong)
        assert "\n" not in str(raised.value)


def test_every_query_has_a_file_of_its_own(server):
    server.files |= {"get?id=A": CONTENT, "get?id=B": CONTENT[::-1]}
    first, second = (download(server.address(f"get?id={name}")) for name in "AB")
    assert (first.read_bytes(), second.read_bytes()) == (CONTENT, CONTENT[::-1])
    assert download(server.address("get?id=A")) == first
    assert len(server.ranges) == 2


def test_the_cache_may_lie_above_the_working_directory(server, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("SIM_M2F_CACHE", "../cache")
    server.files["weights.bin"] = CONTENT
    assert download(server.address("weights.bin")).resolve().is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize(
    "address", ["https://[abc/x.pth", "https://host", "https://host/../x.pth", "https://host/%2e%2e/x.pth"]
)
def test_what_is_no_address_of_a_file_is_refused_in_one_line(server, address):
    with pytest.raises(UserError, match="not the address of a file") as raised:
        download(address)
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_a_server_that_is_not_there(server):
    with pytest.raises(UserError, match=r"none\.pth: not downloaded \(Not Found\)"):
        download(server.address("none.pth"))
    with pytest.raises(UserError, match="not downloaded"):
        download("http://127.0.0.1:9/weights.pth")


def test_weights_from_an_address_and_from_detectron2s_zoo(server, monkeypatch, tmp_path):
    _, source = small_network("ResNet-18", seed=1)
    _, network = small_network("ResNet-18", seed=2)
    torch.save({"model": source.state_dict()}, tmp_path / "model.pth")
    server.files["zoo/model.pth"] = (tmp_path / "model.pth").read_bytes()
    load_checkpoint(network, server.address("zoo/model.pth"), complete=True)
    assert_same_weights(network, source)
    monkeypatch.setattr(sources, "DETECTRON2_ADDRESS", server.address(""))
    assert load_checkpoint(network, "detectron2://zoo/model.pth").complete
    assert len(server.ranges) == 1


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


def test_a_failure_of_the_hub_without_a_word_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"hf://somebody/stars: cannot be had .*\(TimeoutError\)"):
        sources.hub_folder("hf://somebody/stars")
