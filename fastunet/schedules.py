"""Learning rates over a run."""

from math import cos, pi

from .config import Config

POLY_POWER = 0.9


def learning_rate(step: int, config: Config) -> float:
    """The rate for the step after ``step`` steps.

    It rises evenly over the warm-up of r steps; then, with t = (step - r) / (steps - r),

        constant             lr
        cosine, one-cycle    lr (1 + cos(pi t)) / 2
        poly                 lr (1 - t)^0.9

    "one-cycle" is "cosine" with a warm-up of a tenth of the run where none is given.

    Args:
        step: steps done, from 0.
        config: ``schedule``, ``lr``, ``warmup`` and ``steps``.
    Source: Loshchilov and Hutter 2017 (cosine); Chen et al. 2017 (poly, DeepLab).
    """
    rise = warmup_steps(config)
    if step < rise:
        return config.lr * (step + 1) / rise
    if config.schedule == "constant":
        return config.lr
    done = (step - rise) / max(1, config.steps - rise)
    if config.schedule == "poly":
        return config.lr * (1 - done) ** POLY_POWER
    return config.lr * 0.5 * (1 + cos(pi * done))


def warmup_steps(config: Config) -> int:
    """The steps over which the rate rises."""
    if config.warmup is not None:
        return config.warmup
    return max(1, config.steps // 10) if config.schedule == "one-cycle" else 0
