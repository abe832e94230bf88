"""The benchmarks: what they count and what they refuse."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import record, run
from benchmarks.cases import OURS, Case, Contender, Inputs, Setting, bind, each
from benchmarks.checks import Judge, RefusedError, watch
from benchmarks.figure import arrows
from benchmarks.measure import time_cases
from benchmarks.ops import bench_weight_map
from benchmarks.timing import (
    Clock,
)
from fastunet import UNet, ops
from fastunet.ops import _amx
from fastunet.ops.conv_relu import few_channels, onednn, winograd_rule

CPU = torch.device("cpu")


@pytest.mark.parametrize(("size", "widths"), [(572, (64, 128, 256, 512, 1024)), (60, (3, 5, 7))])
def test_arrows_are_the_network(size: int, widths: tuple[int, ...]) -> None:
    with torch.device("meta"):
        network = UNet(widths=widths, ops=ops.eager)
        image = torch.empty(1, 1, size, size)
    with FlopCounterMode(display=False) as counter:
        logits = network(image)
    *_, head = found = list(arrows(size, widths))
    assert head.size == logits.shape[2]
    assert sum(arrow.flops for arrow in found) == counter.get_total_flops()
    copies = [arrow for arrow in found if arrow.kind == "copy"]
    assert all(arrow.skip_size >= arrow.size for arrow in copies)
    assert len(copies) == len(widths) - 1


def test_conv_relu_bytes() -> None:
    # 1 x 1 -> 64 at 188: the image, 9 taps and a bias a channel, 64 images of 186
    case = run.BENCHES["conv_relu"].cases(Setting(CPU, (torch.float32,), sizes=(188,)))[0]
    assert case.moved_bytes == 4 * (188**2 + 64 * 9 + 64 + 64 * 186**2)
    assert case.flops == 2 * 9 * 64 * 186**2


@pytest.mark.parametrize("name", run.BENCHES)
@pytest.mark.parametrize("quick", [True, False])
def test_case_names_are_unique(name: str, quick: bool) -> None:
    setting = Setting(CPU, (torch.float32, torch.bfloat16), quick=quick)
    cases = run.BENCHES[name].cases(setting)
    keys = {(case.name, case.dtype) for case in cases}
    assert len(keys) == len(cases) > 0
    assert {case.operator for case in cases} == {name}
    assert all(case.moved_bytes or case.flops for case in cases)


@pytest.mark.parametrize("name", run.BENCHES)
def test_contenders_agree(name: str, device: torch.device) -> None:
    size = 64 if name == "weight_map" else 188
    # on a GPU float32 without TF32, as in these tests, is the library's
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for case in run.BENCHES[name].cases(Setting(device, (dtype,), sizes=(size,), quick=True)):
        if case.flops < 3e9:
            judge = Judge(case, Clock(device))
            for contender in case.contenders:
                if not contender.skip:
                    judge.admit(contender)


def _case(ours: Callable[..., Any], leaves: Sequence[str] = ("x",)) -> Case:
    """Doubling of 8 numbers, in plain PyTorch and by ``ours``."""

    def contender(name: str, function: Callable[..., Any], *, trusted: bool = False) -> Contender:
        return Contender(name, each(lambda given: bind(function, given, leaves)), trusted=trusted)

    def twice(x: Tensor) -> Tensor:
        return x + x

    def inputs() -> Inputs:
        return {"x": torch.linspace(-1, 1, 8)}

    def exact(given: Inputs) -> tuple[Tensor, ...]:
        return bind(twice, {"x": given["x"].double()}, leaves)()

    contenders = (contender("eager", twice, trusted=True), contender(OURS, ours))
    return Case("double", "8", torch.float32, inputs, exact, contenders, moved_bytes=64)


def _console() -> tuple[Console, StringIO]:
    text = StringIO()
    return Console(file=text, width=200), text


def _run_only(monkeypatch: pytest.MonkeyPatch, case: Case, console: Console, **options: Any) -> int:
    class Bench:
        @staticmethod
        def cases(setting: Setting) -> list[Case]:
            return [case]

    monkeypatch.setitem(run.BENCHES, case.operator, Bench)
    return run.run([case.operator], device="cpu", quick=True, console=console, **options)


def _rows(case: Case) -> list[record.Row]:
    setting = run.choose("cpu", quick=True)
    ((_, timings),) = time_cases([case], setting, record.environment(CPU))
    return [timing.row for timing in timings]


@pytest.fixture
def probe() -> Any:
    """An operator ``fastunet::probe`` that doubles, with only its reference registered."""
    with torch.library._scoped_library("fastunet", "FRAGMENT") as library:
        library.define("probe(Tensor x) -> Tensor")
        library.impl("probe", probe_reference, "CompositeExplicitAutograd")
        yield library


def probe_reference(x: Tensor) -> Tensor:
    return x + x


def _probe(x: Tensor) -> Tensor:
    return torch.ops.fastunet.probe(x)


def test_watch_names_who_served(probe: torch.library.Library) -> None:
    x = torch.ones(3)
    assert watch(lambda: (_probe(x),))[1] == {"probe": "reference"}
    probe.impl("probe", lambda x: x * 2, "CPU")
    outputs, served = watch(lambda: (_probe(x),))
    assert served == {"probe": "cpp"}
    assert torch.equal(outputs[0], torch.full((3,), 2.0))


def test_watch_sees_backward() -> None:
    inputs = {"x": torch.randn(1, 2, 8, 8), "weight": torch.randn(3, 2, 3, 3)}
    served = watch(bind(ops.conv_relu, inputs, ("x", "weight"), "channels_last"))[1]
    assert {name: served[name] for name in ("conv_relu", "conv_relu_bwd")} == {
        "conv_relu": "onednn",
        "conv_relu_bwd": "onednn",
    }


def test_watch_sees_what_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        import_module("fastunet.ops.conv_relu.op"), "waits_for_python", lambda *_: True
    )
    inputs = {"x": torch.randn(1, 2, 8, 8), "weight": torch.randn(3, 2, 3, 3)}
    plain = ops.eager.conv_relu
    served = watch(bind(ops.conv_relu, inputs, ("x", "weight"), "channels_last"))[1]
    assert served == {"conv_relu": "pytorch"}
    assert ops.eager.conv_relu is plain


def test_silent_fallback_is_refused(probe: torch.library.Library) -> None:
    case = _case(_probe, leaves=())
    assert Judge(case, Clock(CPU)).admit(case.contenders[1]).backend == "reference"
    probe.impl("probe", lambda x: probe_reference(x), "CPU")
    with pytest.raises(RefusedError, match="probe: a cpu kernel is there, but the reference ran"):
        Judge(case, Clock(CPU)).admit(case.contenders[1])


def test_bypassed_operator_is_refused() -> None:
    case = _case(lambda x: x + x)
    with pytest.raises(RefusedError, match="none of fastunet's operators ran"):
        Judge(case, Clock(CPU)).admit(case.contenders[1])


@pytest.mark.skipif(bool(_amx.why_not_here()), reason="this processor has no AMX")
def test_forced_fallback_from_amx_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, case = run.BENCHES["conv_relu"].cases(
        Setting(CPU, (torch.bfloat16,), sizes=(188,), quick=True)
    )
    ours = next(contender for contender in case.contenders if contender.name == OURS)
    assert Judge(case, Clock(CPU)).admit(ours).backend == "amx"
    monkeypatch.setattr(_amx, "unsupported", lambda *given: "forced")
    with pytest.raises(RefusedError, match="this processor's AMX takes the call, but"):
        Judge(case, Clock(CPU)).admit(ours)


@pytest.mark.skipif(bool(winograd_rule.why_not_here()), reason="there is no extension")
def test_forced_fallback_from_winograd_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, case, *_ = run.BENCHES["conv_relu"].cases(
        Setting(CPU, (torch.float32,), sizes=(188,), quick=True)
    )
    ours = next(contender for contender in case.contenders if contender.name == OURS)
    assert Judge(case, Clock(CPU)).admit(ours).backend == "winograd"
    forced = SimpleNamespace(unsupported=lambda *given: "forced")
    monkeypatch.setattr(onednn, "winograd_rule", forced)
    with pytest.raises(RefusedError, match="Winograd's algorithm takes the call, but onednn ran"):
        Judge(case, Clock(CPU)).admit(ours)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: _probe(x) + 1e-5, "result 0 is off by 1e-05"),
        (lambda x: _probe(x) * float("nan"), "result 0 is off by nan"),
        (lambda x: _probe(x)[:-1], r"shapes \[\[7\]\], should have \[\[8\]\]"),
    ],
)
def test_wrong_kernel_is_refused(
    probe: torch.library.Library, wrong: Callable[[Tensor], Tensor], message: str
) -> None:
    case = _case(wrong, leaves=())
    with pytest.raises(RefusedError, match=message):
        Judge(case, Clock(CPU)).admit(case.contenders[1])


def test_refused_row_has_no_time(
    probe: torch.library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = _case(lambda x: _probe(x) + 1e-3, leaves=())
    console, text = _console()
    assert _run_only(monkeypatch, wrong, console) == 1
    assert "fastunet refused: result 0 is off by 0.001" in text.getvalue()
    rows = _rows(wrong)
    assert [(row.status, row.ms is None) for row in rows] == [("timed", False), ("refused", True)]


def test_rivals_need_only_half_of_the_digits(probe: torch.library.Library) -> None:
    case = _case(_probe, leaves=())
    judge = Judge(case, Clock(CPU))

    def off_by(error: float | Tensor) -> Contender:
        return Contender("rival", each(lambda given: lambda: (2 * given["x"] + error,)))

    judge.admit(off_by(1e-5))
    # one of many that is off
    one = torch.eye(1, 8)[0] * 1e-3
    with pytest.raises(RefusedError, match=r"result 0 is off by 0\.001, allowed 0\.00069"):
        judge.admit(off_by(one))
    with pytest.raises(RefusedError, match=r"result 0 is off by 0\.01, allowed 0\.00069"):
        judge.admit(off_by(1e-2))
    # of gradients, as where a ReLU's input rounds to the other side of zero
    judge = Judge(replace(case, name="8, forward + backward", flops=8), Clock(CPU))
    judge.admit(off_by(one))
    with pytest.raises(RefusedError, match=r"is off by 0\.028 as a whole, allowed 0\.0013"):
        judge.admit(off_by(1e-2))


def test_a_gradient_of_zero_is_judged_beside_the_others() -> None:
    def both(given: Inputs) -> tuple[Tensor, ...]:
        return given["x"], torch.zeros_like(given["x"])

    def off_by(error: float) -> Contender:
        return Contender("rival", each(lambda given: lambda: (given["x"], torch.full((8,), error))))

    case = Case(
        "both", "8, forward + backward", torch.float32, lambda: {"x": torch.ones(8)}, both,
        (Contender("eager", each(lambda given: lambda: both(given)), trusted=True),), flops=8,
    )  # fmt: skip
    judge = Judge(case, Clock(CPU))
    judge.admit(off_by(1e-7))
    with pytest.raises(RefusedError, match=r"result 1 is off by 2\.8e-06 as a whole"):
        judge.admit(off_by(1e-6))


@pytest.mark.parametrize("x", [1.0, 1.001])
def test_gradients_may_round_to_the_other_side(x: float) -> None:
    """Where the exact ones do so when inputs change a little, and no further than they go."""

    def sides(given: Inputs) -> tuple[Tensor, ...]:
        return ((given["x"] > 1).to(given["x"]),)

    def rival(result: Tensor) -> Contender:
        return Contender("rival", each(lambda given: lambda: (result,)))

    trusted = Contender("eager", each(lambda given: lambda: sides(given)), trusted=True)
    case = Case(
        "side",
        "8, forward + backward",
        torch.float32,
        lambda: {"x": torch.full((8,), x)},
        sides,
        (trusted,),
        flops=8,
    )
    judge = Judge(case, Clock(CPU))
    (exact,) = sides(case.inputs())
    judge.admit(rival(exact))
    one = (exact - torch.eye(1, 8)[0]).abs()
    if x == 1:
        judge.admit(rival(one))
    else:
        with pytest.raises(RefusedError, match=r"is off by 1 as a whole, allowed 0\.00098"):
            judge.admit(rival(one))
    with pytest.raises(RefusedError, match=r"is off by 2\.8 as a whole"):
        judge.admit(rival(1 - exact))


def test_failing_contender_is_named(probe: torch.library.Library) -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("out of luck\nand of memory")

    case = _case(broken, leaves=())
    *_, row = _rows(case)
    assert (row.status, row.reason) == ("failed", "RuntimeError: out of luck")


def test_missing_rival_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_weight_map, "find_spec", lambda name: None)
    case, *_ = bench_weight_map.cases(Setting(CPU, (torch.float32,), sizes=(32,), quick=True))
    assert record.notes(_rows(case)) == [
        "weight_map: edt, two smallest skipped: edt is not installed (1 x 20 cells, 32x32)",
        "weight_map: cuCIM, two smallest skipped: compared on GPUs only (1 x 20 cells, 32x32)",
    ]


def test_trials_take_the_next_inputs(
    probe: torch.library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def ours(x: Tensor) -> Tensor:
        seen.append(x.data_ptr())
        return _probe(x)

    monkeypatch.setattr(Clock, "copies", lambda self, input_bytes: 3)
    case = _case(ours, leaves=())
    trial = Judge(case, Clock(CPU)).admit(case.contenders[1])
    assert len(set(seen)) == 3
    for _ in range(6):
        trial.call()
    assert seen[3:] == seen[:3] * 2


def test_forced_fallback_of_a_real_operator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves is watched under the operator, not asked of it."""
    case = run.BENCHES["conv_relu"].cases(Setting(CPU, (torch.float32,), sizes=(188,)))[0]
    ours = next(contender for contender in case.contenders if contender.name == OURS)
    assert Judge(case, Clock(CPU)).admit(ours).backend != "reference"
    monkeypatch.setattr(onednn, "unsupported", lambda *given: "forced")
    with pytest.raises(RefusedError, match="conv_relu: a cpu kernel is there, but the reference"):
        Judge(case, Clock(CPU)).admit(ours)


def test_wrong_kernel_of_a_real_operator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = run.BENCHES["conv_relu"].cases(Setting(CPU, (torch.float32,), sizes=(188,)))[0]
    convolve: Any = few_channels.conv_relu
    monkeypatch.setattr(few_channels, "conv_relu", lambda *given: convolve(*given) * (1 + 1e-4))
    *_, row = (row for row in _rows(case) if row.contender == OURS)
    assert (row.status, row.ms) == ("refused", None)
    assert row.reason.startswith("result 0 is off by")


def test_a_contender_must_pass_every_visit(
    probe: torch.library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def later_wrong(x: Tensor) -> Tensor:
        calls.append(1)
        return _probe(x) + (len(calls) > 100)

    rows = _rows(_case(later_wrong, leaves=()))
    assert [row.status for row in rows] == ["timed", "refused"]
