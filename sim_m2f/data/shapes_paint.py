"""How the images of the shapes set are painted: outlines of the classes, fills, backgrounds.

Every random choice comes from the numpy Generator that is passed in. Colours are float32 RGB in 0..255,
canvases (SIZE, SIZE, 3) float32, positions in pixels (x to the right, y down).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageDraw

SIZE = 128  # width and height of an image, pixels
SUPERSAMPLING = 4
Y, X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5  # centres of the pixels


def arc(radius: float, start: float, end: float, centre: float = 0.0) -> np.ndarray:
    """Points (64, 2) on the arc of a circle around (centre, 0), angles in radians."""
    angles = np.linspace(start, end, 64)
    return np.stack([centre + radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def disc(rng: np.random.Generator) -> list[np.ndarray]:
    return [arc(1, 0, 2 * math.pi)]


def triangle(rng: np.random.Generator) -> list[np.ndarray]:
    angle = math.radians(rng.uniform(108, 130))
    return [np.array([[1, 0], [math.cos(angle), math.sin(angle)], [math.cos(angle), -math.sin(angle)]])]


def star(rng: np.random.Generator) -> list[np.ndarray]:
    radii = np.where(np.arange(10) % 2, rng.uniform(0.36, 0.48), 1.0)
    angles = np.arange(10) * math.pi / 5
    return [np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)]


def ring(rng: np.random.Generator) -> list[np.ndarray]:
    return [arc(1, 0, 2 * math.pi), arc(rng.uniform(0.5, 0.7), 0, 2 * math.pi)]


def crescent(rng: np.random.Generator) -> list[np.ndarray]:
    tip = rng.uniform(0.7, 1.1)  # angle between the axis of symmetry and a tip
    hollow = rng.uniform(0.2, 0.45)  # the inner arc meets the axis at (-hollow, 0)
    centre = (1 - hollow**2) / (2 * (math.cos(tip) + hollow))
    inner = math.atan2(math.sin(tip), math.cos(tip) - centre)
    back, front = arc(1, tip, 2 * math.pi - tip), arc(centre + hollow, 2 * math.pi - inner, inner, centre)
    return [np.concatenate([back, front])]


def letter_l(rng: np.random.Generator) -> list[np.ndarray]:
    arm = 0.72
    inner = rng.uniform(0.42, 0.6) - arm
    return [np.array([[-arm, -arm], [arm, -arm], [arm, inner], [inner, inner], [inner, arm], [-arm, arm]])]


def cross(rng: np.random.Generator) -> list[np.ndarray]:
    half = rng.uniform(0.22, 0.34)
    arm = math.sqrt(1 - half**2)
    points = np.array([[arm, -half], [arm, half], [half, half]])
    return [np.concatenate([points @ rotation(-turn * math.pi / 2) for turn in range(4)])]


def heart(rng: np.random.Generator) -> list[np.ndarray]:
    t = np.linspace(0, 2 * math.pi, 64)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [np.stack([16 * np.sin(t) ** 3, y + 2.5], axis=1) / 17]


TEXTURES = ("stripes", "checks", "noise", "dots")
FILLS = ("flat", "gradient", *TEXTURES)


class Look(NamedTuple):
    """What the objects of a class look like, as zebras have stripes.

    outline: draws polygons (K, 2) around the origin, radius about 1: the outline and, for a ring, the hole.
    hue: in degrees.
    texture: the usual one.
    """

    outline: Callable[[np.random.Generator], list[np.ndarray]]
    hue: int
    texture: str


LOOKS = {
    "disc": Look(disc, 0, "dots"),
    "triangle": Look(triangle, 45, "stripes"),
    "star": Look(star, 90, "checks"),
    "ring": Look(ring, 135, "noise"),
    "crescent": Look(crescent, 180, "stripes"),
    "L": Look(letter_l, 225, "dots"),
    "cross": Look(cross, 270, "noise"),
    "heart": Look(heart, 315, "checks"),
}
USUAL_TEXTURE = 0.75  # share of the objects that show their class's texture


def rotation(angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def polygon_area(points: np.ndarray) -> float:
    x, y = points.T
    return abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2


def coverage(polygons: list[np.ndarray]) -> np.ndarray:
    """The share of each pixel within the first polygon and outside the second: (SIZE, SIZE) float32."""
    drawing = Image.new("L", (SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING))
    for fill, polygon in zip((255, 0), polygons, strict=False):
        points = (polygon * SUPERSAMPLING - 0.5).ravel().tolist()
        ImageDraw.Draw(drawing).polygon(points, fill=fill)
    return np.asarray(drawing.reduce(SUPERSAMPLING), np.float32) / 255


def smooth_noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Bicubically interpolated noise (SIZE, SIZE) within -1..1 with about ``cells`` bumps a side."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.clip(np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC)), -1, 1)


def wave(rng: np.random.Generator, angle: float, period: float) -> np.ndarray:
    """A sine wave (SIZE, SIZE) that runs along ``angle``, with a random phase."""
    along = X * math.cos(angle) + Y * math.sin(angle)
    return np.sin(along * (2 * math.pi / period) + rng.uniform(0, 2 * math.pi))


def texture(rng: np.random.Generator, kind: str, period: float) -> np.ndarray:
    """A pattern (SIZE, SIZE) within -1..1, one of TEXTURES, that repeats every ``period`` pixels."""
    angle = rng.uniform(0, math.pi)
    if kind == "noise":
        return np.tanh(2 * smooth_noise(rng, round(2 * SIZE / period)))
    first = wave(rng, angle, period)
    if kind == "stripes":
        return np.tanh(3 * first)
    second = wave(rng, angle + math.pi / 2, period)
    if kind == "checks":
        return np.tanh(5 * first * second)
    return np.tanh(4 * (first + second - 0.6))


def random_colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(20, 235, 3).astype(np.float32)


def class_colours(rng: np.random.Generator, name: str, count: int) -> np.ndarray:
    """Colours (count, 3) of a class, around its hue."""
    hues = (LOOKS[name].hue + rng.normal(0, 12, count)) % 360 / 360
    hsv = np.stack([hues, rng.uniform(0.45, 0.95, count), rng.uniform(0.45, 0.92, count)], axis=1)
    return (255 * hsv_to_rgb(hsv)).astype(np.float32)


def contrasting_colour(rng: np.random.Generator, name: str, under: np.ndarray) -> np.ndarray:
    """A colour of a class, if it can 70 (Euclidean, RGB) from the mean of the pixels (N, 3) it covers."""
    tries = class_colours(rng, name, 20)
    distances = np.linalg.norm(tries - under.mean(axis=0), axis=1)
    return tries[np.argmax(distances >= min(70, distances.max()))]


def grain(rng: np.random.Generator, sigma: float) -> np.ndarray:
    return sigma * rng.standard_normal((SIZE, SIZE, 1), np.float32)


def fill(rng: np.random.Generator, kind: str, colour: np.ndarray) -> np.ndarray:
    """A canvas filled around ``colour``: a texture, a "gradient" or "flat", with mild noise on it."""
    if kind == "gradient":
        pattern, contrast = wave(rng, rng.uniform(0, 2 * math.pi), rng.uniform(120, 240)), rng.uniform(35, 65)
    elif kind == "flat":
        pattern, contrast = smooth_noise(rng, 4), 4
    else:
        pattern, contrast = texture(rng, kind, rng.uniform(5, 14)), rng.uniform(30, 60)
    direction = rng.normal(rng.choice([-1, 1]), 0.4, 3).astype(np.float32)
    return colour + pattern[..., None] * (contrast * direction) + grain(rng, rng.uniform(1, 5))


def class_fill(rng: np.random.Generator, name: str, colour: np.ndarray) -> np.ndarray:
    """A canvas filled around ``colour``: with the usual texture of a class, or, now and then, with any."""
    return fill(rng, LOOKS[name].texture if rng.random() < USUAL_TEXTURE else rng.choice(FILLS), colour)


def camouflage(rng: np.random.Generator, name: str, canvas: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A fill with the local mean of ``canvas``: its class's texture and slight shading give it away."""
    small = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).reduce(16)
    surroundings = np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32)
    pattern = texture(rng, LOOKS[name].texture, rng.uniform(3.5, 6))
    shade = rng.uniform(16, 26) * (pattern - pattern[mask].mean()) + 4 * smooth_noise(rng, 3)
    return surroundings + shade[..., None] + grain(rng, 2)


def background(rng: np.random.Generator) -> np.ndarray:
    """A cluttered canvas: two colours mixed by smooth noise, blobs, patches of texture, lines, grain."""
    first = random_colour(rng)
    second = np.clip(first + rng.normal(0, 35, 3), 20, 235).astype(np.float32)
    mix = rng.uniform(0.3, 0.9) * smooth_noise(rng, int(rng.integers(3, 7)))
    if rng.random() < 0.5:
        mix += wave(rng, rng.uniform(0, 2 * math.pi), rng.uniform(150, 400))
    canvas = first + np.clip(mix / 2 + 0.5, 0, 1)[..., None] * (second - first)
    canvas += rng.uniform(0, 12) * smooth_noise(rng, int(rng.integers(10, 30)))[..., None]
    for _ in range(rng.integers(0, 6)):
        canvas += soft_spot(rng, rng.uniform(6, 22))[..., None] * rng.normal(0, 30, 3).astype(np.float32)
    for _ in range(rng.integers(0, 3)):
        pattern = texture(rng, rng.choice(TEXTURES), rng.uniform(4, 14))
        canvas += rng.uniform(8, 18) * (soft_spot(rng, rng.uniform(15, 30)) * pattern)[..., None]
    for _ in range(rng.integers(0, 7)):
        draw_line(rng, canvas)
    return canvas + grain(rng, rng.uniform(1.5, 5))


def soft_spot(rng: np.random.Generator, radius: float) -> np.ndarray:
    """An irregular weight (SIZE, SIZE) within 0..1 that fades out around a random place, without an edge."""
    x, y = rng.uniform(0, SIZE, 2).tolist()
    squared = ((X - x) / radius) ** 2 + ((Y - y) / (radius * rng.uniform(0.5, 1))) ** 2
    return np.exp(-squared * (1 + 0.5 * smooth_noise(rng, 8)))


def draw_line(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Draw a thin, slightly bent line right across the canvas, in place."""
    angle, width, bend = rng.uniform(0, math.pi), rng.uniform(0.7, 2.5), rng.uniform(-12, 12)
    x, y = rng.uniform(0, SIZE, 2).tolist()
    along = (X - x) * math.cos(angle) + (Y - y) * math.sin(angle)
    across = (Y - y) * math.cos(angle) - (X - x) * math.sin(angle) + bend * np.sin(along / 25)
    on_line = np.abs(across) < width / 2 + 0.5
    alpha = rng.uniform(0.4, 0.9) * np.clip(width / 2 + 0.5 - np.abs(across[on_line]), 0, 1)
    canvas[on_line] += alpha[:, None] * (random_colour(rng) - canvas[on_line])
