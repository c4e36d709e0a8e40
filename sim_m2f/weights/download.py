"""Files of the web: downloaded once, resumed where they broke off, checked against their hash."""

import hashlib
import re
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from filelock import FileLock
from tqdm import tqdm

from sim_m2f.errors import UserError
from sim_m2f.files import cache_folder

BLOCK = 1 << 20
TIMEOUT = 60.0


def download(address: str) -> Path:
    """The file of an http(s) address in the cache; what an earlier attempt left is gone on with.

    The expected SHA-256 stands behind the address, ``https://.../x.pth#sha256=...``, or its beginning in the
    file's name as torch.hub has it, ``resnet50-19c8e357.pth``.

    Raises:
        UserError: the address cannot be reached or broke off again, the disk is full, or the hash is another.
    """
    path = cache_folder() / "weights" / _cached_name(address)
    url, fragment = urldefrag(address)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                part = path.with_name(f"{path.name}.part")
                _fetch(url, part)
                _check_hash(address, part, _expected_hash(path.name, fragment))
                part.replace(path)
            elif fragment:
                _check_hash(address, path, _expected_hash(path.name, fragment))
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UserError(f"{address}: not downloaded ({reason}); the same command goes on with it") from error
    return path


def _cached_name(address: str) -> Path:
    """Server, path and the beginning of the query's hash; a server may give another file for each query.

    Raises:
        UserError: the address is not that of a file.
    """
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise UserError(f"{address}: not the address of a file ({error})") from error
    file = Path(unquote(parts.path).lstrip("/"))
    if ".." in file.parts or not file.name:
        raise UserError(f"{address}: not the address of a file")
    query = f"_{hashlib.sha256(parts.query.encode()).hexdigest()[:16]}" if parts.query else ""
    return Path(parts.netloc.replace(":", "_") + query) / file


def _expected_hash(name: str, fragment: str) -> str:
    if fragment.startswith("sha256="):
        return fragment.removeprefix("sha256=").lower()
    match = re.search(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.[^.]+$", name)  # a letter, so that it is no date
    return match[1] if match else ""


def _check_hash(address: str, path: Path, expected: str) -> None:
    """Raises UserError, and removes the file, unless its SHA-256 begins with ``expected``."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    if not digest.hexdigest().startswith(expected):
        path.unlink()
        raise UserError(
            f"{address}: its SHA-256 begins with {digest.hexdigest()[:16]}, not with {expected[:16]}; "
            "the file was removed, try again"
        )


def _fetch(url: str, part: Path) -> None:
    """Download into ``part``, behind what it holds if the server's file is still the same."""
    version = part.with_name(f"{part.name}.version")
    request = urllib.request.Request(url, headers={"User-Agent": "sim-m2f"})
    if part.exists() and version.exists() and (known := version.read_text()):
        request.add_header("Range", f"bytes={part.stat().st_size}-")
        request.add_header("If-Range", known)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the range is empty, everything is there
            raise
        version.unlink()
        return
    with response:
        resumed = response.status == 206
        if not resumed:
            version.write_text(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
        _copy(response, part, part.stat().st_size if resumed else 0)
    version.unlink()


def _copy(response: HTTPResponse, part: Path, start: int) -> None:
    length = response.headers.get("Content-Length")
    total = start + int(length) if length else None
    title = unquote(urlsplit(response.url).path).rpartition("/")[2]
    bar = tqdm(desc=title, initial=start, total=total, unit="B", unit_scale=True, disable=None)
    with part.open("ab" if start else "wb") as file, bar:
        while block := response.read(BLOCK):
            file.write(block)
            bar.update(len(block))
    if total is not None and part.stat().st_size < total:
        raise ConnectionError(f"broke off after {part.stat().st_size} of {total} bytes")
