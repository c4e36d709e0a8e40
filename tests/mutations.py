"""Sound files, changed at random: bytes, and values of JSON and YAML."""

import copy
import json
from random import Random
from typing import Any

import yaml

ODD = (
    *(None, True, -1, 0, 1.5, 2**31, 10**30, 1e300, -0.0, float("nan"), float("inf")),
    *("", "x", "nan", "-1", "\ud800", "a\nb", "\0", "../x", "/etc/passwd", "é" * 300),
    *([], [[]], [1, 2], {}, {"a": {}}, [None] * 5, [[[[[1]]]]]),
)
TOKENS = (
    b"",
    b"-",
    b"nan",
    b"1e999",
    b"99999999999",
    b"-7",
    b"&x;",
    b"<",
    b'"',
    b",",
    b"\n",
    b"\xff",
    b"\0",
    b"{}",
)


def mutated_bytes(content: bytes, random: Random) -> bytes:
    """Bytes turned, taken out, doubled, put in, or the end cut off; one to three times."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 3)):
        start = random.randint(0, len(changed))
        end = min(start + random.choice((1, 2, 8, 64)), len(changed))
        kind = random.randint(0, 4)
        if kind == 0 and start < len(changed):
            changed[start] ^= 1 << random.randint(0, 7)
        elif kind == 1:
            del changed[start:end]
        elif kind == 2:
            changed[start:start] = changed[start:end]
        elif kind == 3:
            changed[start:end] = random.choice(TOKENS)
        else:
            del changed[max(start, len(changed) // 2) :]
    return bytes(changed)


def mutated_value(content: Any, random: Random) -> Any:
    """A value somewhere in it replaced by an odd one, taken out, or doubled; one to three times."""
    root = {"": copy.deepcopy(content)}
    for _ in range(random.randint(1, 3)):
        parent, key = root, ""
        while isinstance(parent[key], (dict, list)) and parent[key] and random.randint(0, 5):
            parent = parent[key]
            key = random.choice(sorted(parent) if isinstance(parent, dict) else range(len(parent)))
        if random.randint(0, 3) or parent is root:
            parent[key] = copy.deepcopy(random.choice(ODD))
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            del parent[key]
    return root[""]


def mutated_json(content: bytes, random: Random) -> bytes:
    return json.dumps(mutated_value(json.loads(content), random)).encode()


def mutated_yaml(content: bytes, random: Random) -> bytes:
    return yaml.safe_dump(mutated_value(yaml.safe_load(content), random)).encode()


# By name: the file, how it is changed, the command that reads it.
FILES = {
    "COCO JSON, values": ("boxes.json", mutated_json, "check"),
    "COCO JSON, bytes": ("boxes.json", mutated_bytes, "convert --format yolo,labelme,cvat,png"),
    "configuration, values": ("base.yaml", mutated_yaml, "export --config-file config.yaml"),
    "configuration, bytes": ("base.yaml", mutated_bytes, "export --config-file config.yaml"),
    "PNG": ("images/1.png", mutated_bytes, "check"),
    "JPEG": ("images/2.jpg", mutated_bytes, "check"),
    "checkpoint": (
        "run/model_final.pth",
        mutated_bytes,
        "trained",
    ),
    "weights of a model folder": ("model/model.safetensors", mutated_bytes, "export"),
    "detections of a run": (
        "run/inference/coco_instances_results.json",
        mutated_json,
        "report --min-score 0",
    ),
    "class names of a model folder": ("model/classes.json", mutated_json, "export"),
    "VOC XML": ("voc/1.xml", mutated_bytes, "voc"),
    "CVAT XML": ("cvat.xml", mutated_bytes, "cvat"),
    "LabelMe": ("labelme/1.json", mutated_json, "labelme"),
    "Label Studio": ("tasks.json", mutated_json, "labelstudio"),
    "YOLO": ("yolo/1.txt", mutated_bytes, "yolo"),
    "CSV": ("boxes.csv", mutated_bytes, "csv"),
}
