"""Weights that change during a run."""

from sim_m2f.config import CfgNode


def resolve_steps(steps: float, max_iter: int) -> float:
    """A number of steps; below 1 it is a fraction of the run's ``max_iter`` steps."""
    return steps * max_iter if steps < 1 else steps


def ramp_up(step: float, steps: float) -> float:
    """0 at step 0, growing linearly to 1 at ``steps``."""
    return min(step / steps, 1.0) if steps > 0 else 1.0


def fade_out(step: float, steps: float) -> float:
    """1 at step 0, falling linearly to 0 at ``steps``."""
    return 1 - ramp_up(step, steps)


def term_weight(keys: CfgNode, step: int, max_iter: int) -> float:
    """Weight of a loss at a step, from the keys of its group.

    WEIGHT from step START on, growing to it over WARMUP steps; or, falling from it to 0, over STEPS steps.
    """
    if "STEPS" in keys:
        return keys.WEIGHT * fade_out(step, resolve_steps(keys.STEPS, max_iter))
    start = resolve_steps(keys.START, max_iter)
    ramp = 0.0 if step < start else ramp_up(step - start, resolve_steps(keys.WARMUP, max_iter))
    return keys.WEIGHT * ramp
