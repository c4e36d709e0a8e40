"""Weights that change during a run."""


def resolve_steps(steps: float, max_iter: int) -> float:
    """A number of steps; below 1 it is a fraction of the run's ``max_iter`` steps."""
    return steps * max_iter if steps < 1 else steps


def ramp_up(step: float, steps: float) -> float:
    """0 at step 0, growing linearly to 1 at ``steps``."""
    return min(step / steps, 1.0) if steps > 0 else 1.0


def started(step: int, start: float, warmup: float) -> float:
    """0 before step ``start``, then growing linearly to 1 over ``warmup`` steps."""
    return 0.0 if step < start else ramp_up(step - start, warmup)


def fade_out(step: int, steps: float) -> float:
    """1 at step 0, falling linearly to 0 at ``steps``."""
    return 1 - ramp_up(step, steps)
