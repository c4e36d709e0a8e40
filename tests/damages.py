"""Ways to break a file of a sound folder."""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

Damage = Callable[[Path], object]


def nothing(folder: Path) -> None:
    """The folder is sound; the command line is not."""


def put(name: str, content: str | bytes | Callable[[Path], bytes]) -> Damage:
    """The file holds something else; written anew, since files of the sound folder are shared."""

    def damage(folder: Path) -> None:
        path = folder / name
        new = content(path) if callable(content) else content
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(new.encode("utf-8", "surrogatepass") if isinstance(new, str) else new)

    return damage


def cut(name: str, share: float) -> Damage:
    """The file ends too early."""
    return put(name, lambda path: path.read_bytes()[: int(path.stat().st_size * share)])


def swap(name: str, old: str, new: str) -> Damage:
    """A text in the file is another one."""

    def swapped(path: Path) -> bytes:
        content = path.read_bytes()
        assert old.encode() in content, (name, old)
        return content.replace(old.encode(), new.encode(), 1)

    return put(name, swapped)


def edit(name: str, change: Callable[[Any], object]) -> Damage:
    """A JSON file, changed."""

    def changed(path: Path) -> bytes:
        content = json.loads(path.read_bytes())
        change(content)
        return json.dumps(content).encode()

    return put(name, changed)


def field(key: str, value: Any, part: str = "annotations", number: int = 1) -> Damage:
    """A field of a record in boxes.json."""
    return edit("boxes.json", lambda content: content[part][number].__setitem__(key, value))


def assign(name: str, place: str, value: Any) -> Damage:
    """A value in a JSON file; its place is keys and numbers, with spaces between."""

    def change(content: Any) -> None:
        *parents, last = (int(word) if word.isdigit() else word for word in place.split())
        for key in parents:
            content = content[key]
        content[last] = value

    return edit(name, change)


def copy(name: str, new_name: str, old: str, new: str) -> Damage:
    """Another file, in which a text is another one."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_text()
        assert old in content, (name, old)
        (folder / new_name).write_text(content.replace(old, new))

    return damage


def without(key: str, part: str = "annotations") -> Damage:
    return edit("boxes.json", lambda content: content[part][1].pop(key))


def again(part: str) -> Damage:
    """A record stands twice."""
    return edit("boxes.json", lambda content: content[part].append(content[part][0]))


def gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def instead(name: str, make: Callable[[Path], object]) -> Damage:
    """Something that is no file in the place of one."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def link(name: str, target: str) -> Damage:
    return instead(name, lambda path: path.symlink_to(target))


def image(name: str, mode: str, suffix: str, share: float = 1.0) -> Damage:
    """An image of another mode or format under a name, cut short."""

    def content(_: Path) -> bytes:
        file = io.BytesIO()
        Image.new(mode, (64, 48)).save(file, suffix)
        return file.getvalue()[: int(len(file.getvalue()) * share)]

    return put(name, content)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG that claims a size, whatever it holds."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(bytes(4000)))


def tensors(name: str, content: Any, **options: Any) -> Damage:
    """A file of torch."""

    def stored(_: Path) -> bytes:
        file = io.BytesIO()
        torch.save(content, file, **options)
        return file.getvalue()

    return put(name, stored)


def state(name: str, change: Callable[[Any], object]) -> Damage:
    """A checkpoint, changed."""

    def stored(path: Path) -> bytes:
        content, file = torch.load(path, weights_only=True), io.BytesIO()
        change(content)
        torch.save(content, file)
        return file.getvalue()

    return put(name, stored)


def packed(path: Path) -> bytes:
    """A torch file whose weights are a hundred megabytes of zeros, compressed to some hundred kilobytes."""
    plain, file = io.BytesIO(), io.BytesIO()
    torch.save({"model": {"weight": torch.zeros(25_000_000)}}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return file.getvalue()


class Payload:
    """Unpickled carelessly, it leaves a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("payload_ran"),)


def many(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def laughs(root: str) -> str:
    """Entities of entities, ten thousand million characters in all."""
    entities = "".join(f'<!ENTITY a{n} "{10 * f"&a{n - 1};"}">' for n in range(1, 10))
    return f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a0 "0123456789">{entities}]><{root}>&a9;</{root}>'
