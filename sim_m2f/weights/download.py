"""Files of weights on the web: downloaded once, resumed where they broke off, checked before they are cached.

By requests, and resumed here: huggingface_hub's http_get appends what any 206 brings; pooch, fsspec and
torch.hub do not resume; none of them gives up a transfer that only drips.
"""

import errno
import hashlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
from filelock import FileLock
from tqdm import tqdm
from urllib3.exceptions import HTTPError

from sim_m2f.errors import UserError, first_line
from sim_m2f.files import cache_folder
from sim_m2f.weights.weight_files import HEAD, refuse_size, weights_problem

BLOCK = 1 << 20
SLOWEST, STALL = 1 << 14, 60.0  # bytes that have to arrive within so many seconds
DIGITS = "[0-9a-f]{8,64}"


def download(address: str) -> Path:
    """The file of an http(s) address in the cache; what an earlier attempt left is gone on with.

    The expected SHA-256 stands behind the address, ``https://.../x.pth#sha256=...``, or its beginning in the
    file's name as torch.hub has it, ``resnet50-19c8e357.pth``. Only a whole file that looks like weights and
    has this hash enters the cache.

    Raises:
        UserError: the address cannot be reached or broke off, the disk is full or too small, what came is no
            file of weights, larger than the memory, or of another hash, or the expected hash is none.
    """
    url, has_hash, _ = address.partition("#")
    path = cache_folder() / "weights" / _cached_name(url)
    expected = _expected_hash(address, path.name)
    if path.exists() and not has_hash:  # in a cache that may be read-only, without room for a lock
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                part = path.with_name(f"{path.name}.part")
                _fetch(url, part, hashed=bool(expected))
                _check(address, part, expected)
                part.replace(path)
            elif has_hash:
                _check(address, path, expected)
    except (OSError, HTTPError) as error:
        cause: BaseException = error
        while isinstance(cause, requests.RequestException | HTTPError) and cause.__context__:
            cause = cause.__context__
        reason = getattr(cause, "strerror", None) or first_line(cause)
        raise UserError(f"{address}: not downloaded ({reason}); the same command goes on with it") from error
    return path


def _cached_name(url: str) -> Path:
    """Server, path and the beginning of the query's hash; a server may give another file for each query.

    Raises:
        UserError: the address is not that of a file.
    """
    try:
        parts = urlsplit(url)
        file = Path(unquote(parts.path).lstrip("/"))
        if ".." in file.parts or not file.name or "\0" in str(file):
            raise ValueError("no name of a file, or '..'")
    except ValueError as error:
        raise UserError(f"{url}: not the address of a file ({error})") from error
    query = f"_{hashlib.sha256(parts.query.encode()).hexdigest()[:16]}" if parts.query else ""
    return Path(parts.netloc.replace(":", "_") + query) / file


def _expected_hash(address: str, name: str) -> str:
    """The SHA-256, or its beginning, of an address or else of a file's name; empty where neither has one."""
    _, marked, fragment = address.partition("#")
    if not marked:
        match = re.search(rf"-(?=[0-9]*[a-f])({DIGITS})\.[^.]+$", name)  # a letter, so that it is no date
    elif not (match := re.fullmatch(f"sha256=({DIGITS})", fragment.lower())):
        raise UserError(f"{address}: '#{fragment}' cannot be checked; write #sha256=DIGITS or nothing")
    return match[1] if match else ""


def _check(address: str, path: Path, expected: str) -> None:
    """Raises UserError, and removes the file, unless it looks like weights and has the expected SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        problem = weights_problem(file.read(HEAD))
        file.seek(0)
        while block := file.read(BLOCK):
            digest.update(block)
    if not digest.hexdigest().startswith(expected):
        problem = f"its SHA-256 begins with {digest.hexdigest()[:16]}, not with {expected[:16]}"
    if problem:
        path.unlink()
        raise UserError(f"{address}: {problem}; it was removed, try again or take another address")


def _fetch(url: str, part: Path, hashed: bool) -> None:
    """Download into ``part``, behind what it holds where the server still has the same file."""
    known = part.with_name(f"{part.name}.known")  # length and ETag of the file that the part is of
    held = part.stat().st_size if part.exists() and known.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={held}-"} if held else {})}
    with requests.get(url, headers=headers, stream=True, timeout=STALL) as response:
        has, length = response.headers, response.raw.length_remaining
        etag = has.get("ETag", "")
        if held and response.status_code in (206, 416):
            total, _, tag = known.read_text().partition(" ")
            rest = f"bytes {held}-{int(total) - 1}/{total}", tag, int(total) - held
            if (has.get("Content-Range"), etag, length) != rest:
                known.unlink()
                return _fetch(url, part, hashed)
        elif response.status_code != 200:
            raise ConnectionError(f"{response.status_code} {response.reason}")
        elif length is None and not hashed and has.get("Transfer-Encoding") != "chunked":
            raise ConnectionError("the server does not say how long it is; add #sha256=DIGITS")
        else:
            held = 0
            for old in (known, part):
                old.unlink(missing_ok=True)
        whole = None if length is None else held + length
        refuse_size(url, whole or 0)
        _refuse_full_disk(part.parent, (whole or 0) - held)
        if length and not held and etag.startswith('"'):  # others may stay when the file changes
            known.write_text(f"{length} {etag}")
        bar = tqdm(desc=part.stem, initial=held, total=whole, unit="B", unit_scale=True, disable=None)
        try:
            with part.open("ab" if held else "wb") as file, bar:
                for block in _blocks(response):
                    bar.update(file.write(block))
                    refuse_size(url, file.tell())
        except BaseException:
            if not known.exists():  # nothing can go on with it
                part.unlink(missing_ok=True)
            raise
    known.unlink(missing_ok=True)


def _refuse_full_disk(folder: Path, missing: int) -> None:
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise OSError(errno.ENOSPC, f"no space left: {missing:,} bytes of it are missing, {free:,} are free")


def _blocks(response: requests.Response) -> Iterator[bytes]:
    """The body as it arrives, whole or not without an error.

    Raises:
        OSError: it stalls, or arrives more slowly than any line that is of use.
        HTTPError: it is shorter than was announced.
    """
    received, deadline = 0, time.monotonic() + STALL
    while block := response.raw.read1(BLOCK):
        yield block
        received += len(block)
        if received >= SLOWEST:
            received, deadline = 0, time.monotonic() + STALL
        elif time.monotonic() > deadline:
            raise TimeoutError(f"less than {SLOWEST} bytes came in {STALL:.0f} seconds")
