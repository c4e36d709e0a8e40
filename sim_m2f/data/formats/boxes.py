"""Upright boxes xyxy, in pixels, around shapes that are none."""

import numpy as np

Corners = tuple[float, float, float, float]


def around_rectangle(corners: Corners, degrees: float, pivot: tuple[float, float]) -> Corners:
    """The box around a rectangle xyxy that is turned clockwise about a point."""
    if not degrees:
        return corners
    x0, y0, x1, y1 = corners
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    points = (np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]) - pivot) @ turn + pivot
    return (*points.min(0).tolist(), *points.max(0).tolist())


def around_ellipse(x: float, y: float, radii: tuple[float, float], degrees: float) -> Corners:
    """The box around an ellipse turned about its centre: sqrt((rx cos)^2 + (ry sin)^2) to left and right."""
    angle, (rx, ry) = np.deg2rad(degrees), radii
    w, h = np.hypot(rx * np.cos(angle), ry * np.sin(angle)), np.hypot(rx * np.sin(angle), ry * np.cos(angle))
    return float(x - w), float(y - h), float(x + w), float(y + h)
