"""What is labelled so far, image by image on disk: a run that stopped goes on, and memory holds no masks."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sim_m2f.errors import UserError


class Journal:
    """A file with a line of JSON per image; its first line says of what.

    Args:
        path: where it lies; its folder is created.
        identity: of network and options; lines of another one are dropped, with a note.
        digests: of each image's own record and boxes, by its id; its line counts only with the same one.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path, identity: str, digests: Mapping[int, str] | None = None) -> None:
        self.path, self.digests = path, digests or {}
        self.places: dict[int, int] = {}  # image id -> offset of its line
        self.last: tuple[int | None, dict[str, Any]] = (None, {})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            end = self._read(identity)
            os.truncate(path, end)
            if not end:
                self._append({"of": identity})
        except OSError as error:
            raise self._fault(error) from error

    def _read(self, identity: str) -> int:
        """Note the finished lines; returns the offset behind them, 0 where they are of something else."""
        end = 0
        with self.path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:  # a killed process left it unfinished
                    break
                if not line.endswith(b"\n"):
                    break
                if not end and record != {"of": identity}:
                    fault = "what it holds was made by another network or with other options"
                    print(f"note: {self.path}: {fault}, and is made anew", file=sys.stderr)
                    break
                if end and record.get("digest") == self.digests.get(record["image"]):
                    self.places[record["image"]] = end
                end += len(line)
        return end

    def __contains__(self, image: int) -> bool:
        return image in self.places

    def __len__(self) -> int:
        return len(self.places)

    def add(self, image: int, labels: dict[int, Any]) -> None:
        """Note an image's labels by annotation id.

        Raises:
            UserError: the disk is full; what was noted before stays, and more can be noted when it is not.
        """
        try:
            digest = {"digest": self.digests[image]} if self.digests else {}
            self.places[image] = self._append({"image": image, **digest, "labels": labels})
        except OSError as error:
            raise self._fault(error) from error

    def labels(self, image: int) -> dict[str, Any]:
        """An image's labels by annotation id as text; the last image's are kept for its next annotation."""
        if self.last[0] != image:
            with self.path.open("rb") as file:
                file.seek(self.places[image])
                self.last = image, json.loads(file.readline())["labels"]
        return self.last[1]

    def remove(self) -> None:
        self.path.unlink()

    def _append(self, record: dict[str, Any]) -> int:
        """Returns the offset of the new line; where it cannot be written whole, no part of it stays."""
        place = self.path.stat().st_size
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
        except OSError:
            os.truncate(self.path, place)
            raise
        return place

    def _fault(self, error: OSError) -> UserError:
        advice = "free space or choose another folder"
        return UserError(f"{self.path}: cannot be written ({error.strerror or error}); {advice}")
