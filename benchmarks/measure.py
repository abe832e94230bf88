"""Cases are visited: their contenders are checked, and those that pass are timed in turns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .cases import Case, Contender, Setting, dtype_name
from .checks import Judge, RefusedError, Trial
from .record import Environment, Row
from .timing import (
    FULL,
    FULL_GPU,
    QUICK,
    Clock,
    Effort,
    Samples,
    interleave,
    interval,
    measure_ceilings,
    speedup,
    summary,
)


@dataclass(frozen=True)
class Outcome:
    """What became of a contender in a visit of its case.

    Args:
        status, reason, backend, error: as in ``Row``.
        samples: [rounds] milliseconds; none if it was not timed.
    """

    contender: Contender
    status: str
    reason: str = ""
    backend: str = ""
    error: float | None = None
    samples: Samples = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class Timing:
    """A row, and the milliseconds of each round that it sums up."""

    row: Row
    samples: Samples


def time_cases(
    cases: Sequence[Case], setting: Setting, where: Environment
) -> list[tuple[Case, list[Timing]]]:
    """Visit every case as often as the effort says, each visit a while after the one before.

    What differs from minute to minute, or with the memory that a contender got, is then part of a
    row's interval. A contender that falls out of one visit is not timed.

    Returns: the cases in their order, with a timing a contender.
    """
    full = FULL_GPU if setting.device.type == "cuda" else FULL
    effort = QUICK if setting.quick else full
    visits: list[list[list[Outcome]]] = [[] for _ in cases]
    for _ in range(effort.visits):
        for case, found in zip(cases, visits, strict=True):
            found.append(visit(case, setting, effort))
    return [
        (
            case,
            _timings(
                case, [_joined(of_one) for of_one in zip(*found, strict=True)], setting, where
            ),
        )
        for case, found in zip(cases, visits, strict=True)
    ]


def visit(case: Case, setting: Setting, effort: Effort) -> list[Outcome]:
    """Check the contenders of ``case`` and time those that pass, in turns."""
    first, *others = case.contenders
    try:
        judge = Judge(case, Clock(setting.device, case.launches_count))
        trials: list[Trial] = [judge.admit(first)]
    except Exception as error:
        return [Outcome(contender, "failed", _brief(error)) for contender in case.contenders]
    outcomes = {}
    for contender in others:
        if contender.skip:
            outcomes[contender.name] = Outcome(contender, "skipped", contender.skip)
            continue
        try:
            trials.append(judge.admit(contender))
        except RefusedError as error:
            outcomes[contender.name] = Outcome(contender, "refused", str(error))
        except Exception as error:
            outcomes[contender.name] = Outcome(contender, "failed", _brief(error))
    samples = interleave(
        [trial.call for trial in trials],
        [Clock(setting.device_of(trial.contender), case.launches_count) for trial in trials],
        effort,
    )
    for trial, times in zip(trials, samples, strict=True):
        outcomes[trial.contender.name] = Outcome(
            trial.contender, "timed", "", trial.backend, max(trial.errors), times
        )
    return [outcomes[contender.name] for contender in case.contenders]


def _joined(outcomes: Sequence[Outcome]) -> Outcome:
    """One contender's visits as one."""
    for outcome in outcomes:
        if outcome.status != "timed":
            return outcome
    last = outcomes[-1]
    samples = np.concatenate([outcome.samples for outcome in outcomes])
    return Outcome(last.contender, "timed", "", last.backend, last.error, samples)


def _timings(
    case: Case, outcomes: list[Outcome], setting: Setting, where: Environment
) -> list[Timing]:
    baseline = outcomes[0].samples
    return [
        Timing(
            Row(
                operator=case.operator,
                case=case.name,
                dtype=dtype_name(case.dtype),
                layout=outcome.contender.layout,
                contender=outcome.contender.name,
                environment=where,
                baseline=case.contenders[0].name,
                status=outcome.status,
                reason=outcome.reason,
                backend=outcome.backend,
                error=outcome.error,
                **_measured(case, outcome.samples, baseline, setting),
            ),
            outcome.samples,
        )
        for outcome in outcomes
    ]


def _measured(case: Case, samples: Samples, baseline: Samples, setting: Setting) -> dict[str, Any]:
    """The numbers of a row, if it was timed."""
    if not len(samples):
        return {}
    # integers are only copied
    dtype = case.dtype if case.dtype.is_floating_point else torch.float32
    ceilings = measure_ceilings(setting.device, dtype)
    ms, p20_ms, p80_ms = summary(samples)
    low_ms, high_ms = interval(samples)
    ratio, low, high = speedup(baseline, samples)
    copy_ms = case.moved_bytes / ceilings.copy_gb_s / 1e6
    matmul_ms = case.flops / ceilings.matmul_tflop_s / 1e9
    return {
        "ms": ms,
        "p20_ms": p20_ms,
        "p80_ms": p80_ms,
        "low_ms": low_ms,
        "high_ms": high_ms,
        "rounds": len(samples),
        "speedup": ratio,
        "speedup_low": low,
        "speedup_high": high,
        "gb_s": case.moved_bytes / ms / 1e6 if case.moved_bytes else None,
        "tflop_s": case.flops / ms / 1e9 if case.flops else None,
        "bound": "bytes" if copy_ms > matmul_ms else "operations",
        "share": max(copy_ms, matmul_ms) / ms,
        "copy_gb_s": ceilings.copy_gb_s,
        "matmul_tflop_s": ceilings.matmul_tflop_s,
    }


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
