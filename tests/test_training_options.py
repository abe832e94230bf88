"""Each option of the trainer does what it says, and a resumed run stays the uninterrupted one."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastunet.train as train_module
from fastunet import load_model
from fastunet.checkpoint import load_checkpoint, load_trained
from fastunet.data import Section
from fastunet.learner import Learner
from fastunet.profiling import PHASES, TRACE
from fastunet.report import read_log
from fastunet.sampling import RareClasses, class_weights, fold, sample_tiles
from fastunet.schedules import learning_rate
from fastunet.train import BEST, LAST, LOG, Config, Outcome, fit, train_step, validate

from .sections import section, small_config, small_model


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small wait for their threads, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(folder: Path, config: Config, **options: Any) -> Outcome:
    torch.manual_seed(1)
    options = {"validation": [section(2)], **options}
    return fit(small_model(), [section(0), section(1)], config, folder, quiet=True, **options)


def batch(size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return sample_tiles([section(0)], 60, size, 20, torch.Generator().manual_seed(0))


def learner_of(**options: Any) -> Learner:
    torch.manual_seed(0)
    return Learner(small_model(dropout=0.0), small_config(batch=4, **options))


def step(learner: Learner) -> torch.Tensor:
    return train_step(learner, *batch(), torch.ones(2), learner.config)


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


EVERYTHING = {
    "batch": 2,
    "accumulate": 2,
    "clip_norm": 0.5,
    "ema": 0.7,
    "schedule": "poly",
    "warmup": 3,
    "rare_classes": 0.5,
    "deterministic": True,
    "patience": 9,
}


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_resumed_is_uninterrupted_with_every_option(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(precision=precision, **EVERYTHING)
    run(tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        calls = []

        def step_and_signal(*args: Any) -> torch.Tensor:
            calls.append(1)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(*args)

        patch.setattr(train_module, "train_step", step_and_signal)
        assert run(tmp_path / "cut", config).step == 5
    assert run(tmp_path / "cut", config, resume=True).step == 8
    for name in (LAST, BEST):
        whole, cut = (load_file(tmp_path / kind / name) for kind in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        assert {key.partition(".")[0] for key in whole} == {"model", "trained", "optimizer"}
        assert all(torch.equal(value, cut[key]) for key, value in whole.items())
        states = [load_checkpoint(tmp_path / kind / name)[2] for kind in ("whole", "cut")]
        assert states[0] == states[1]
        assert bool(states[0]["scaler"]) == (precision == "float16")


def test_a_checkpoint_older_than_a_setting_goes_on(tmp_path: Path) -> None:
    run(tmp_path, small_config())
    with safe_open(tmp_path / LAST, "pt") as file:
        metadata = file.metadata()
    state = json.loads(metadata["state"])
    for key in ("stale", "scaler"):
        del state[key]
    for key in ("warmup", "ema", "clip_norm", "rare_classes", "patience", "deterministic"):
        del state["resumes"]["run"][key]
    tensors = load_file(tmp_path / LAST)
    save_file(tensors, tmp_path / LAST, {**metadata, "state": json.dumps(state)})
    assert run(tmp_path, small_config(), resume=True).step == 8
    with pytest.raises(ValueError, match=r"had ema None \(now 0\.9\)"):
        run(tmp_path, small_config(ema=0.9), resume=True)


def test_accumulated_is_the_larger_batch(tmp_path: Path) -> None:
    losses = []
    for parts in (1, 2, 4):
        config = small_config(batch=4, accumulate=parts, steps=6)
        outcome = run(tmp_path / str(parts), config, validation=())
        losses.append([line["loss"] for line in outcome.history])
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert losses[2] == pytest.approx(losses[0], abs=1e-6)
    with pytest.raises(ValueError, match="processes x accumulate, 1 x 3, got 4 tiles"):
        run(tmp_path / "3", small_config(batch=4, accumulate=3))


def test_the_network_gets_its_own_dropout_back(tmp_path: Path) -> None:
    model = small_model()
    fit(model, [section(0)], small_config(steps=1, batch=2, accumulate=2), tmp_path, quiet=True)
    kinds = {type(m) for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert kinds == {torch.nn.Dropout}
    assert model.train()(torch.zeros(1, 1, 60, 60)).shape == (1, 2, 20, 20)


def test_float16_scales_the_loss() -> None:
    gradients = []
    for precision in ("float16", "float32"):
        learner = learner_of(precision=precision, momentum=0.0)
        with torch.no_grad():
            # gradients under the head fall below float16's smallest number
            learner.model.head.weight *= 1e-4
        step(learner)
        # without the scale again
        gradients.append([p.grad for p in learner.model.parameters() if p.grad is not None])
    for half, exact in zip(*gradients, strict=True):
        assert (half - exact).abs().max() < 0.1 * exact.abs().max()


def test_float16_skips_a_step_that_overflows() -> None:
    learner = learner_of(precision="float16")
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = flat(learner.model)
    step(learner)
    assert torch.equal(flat(learner.model), before)
    assert learner.scaler.get_scale() == 2.0**39


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("norm", [0.01, 1e6])
def test_clip_norm(norm: float, precision: str) -> None:
    moved = []
    for clip_norm in (None, norm):
        learner = learner_of(clip_norm=clip_norm, precision=precision, lr=1.0, momentum=0.0)
        for group in learner.optimizer.param_groups:
            group["lr"] = 1.0
        before = flat(learner.model)
        step(learner)
        moved.append(before - flat(learner.model))
    assert moved[0].norm() > 0.1
    torch.testing.assert_close(
        moved[1], moved[0] * min(1, norm / moved[0].norm()), rtol=1e-3, atol=1e-6
    )


def test_ema_is_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[torch.Tensor] = []

    def step_and_keep(learner: Learner, *args: Any) -> torch.Tensor:
        loss = train_step(learner, *args)
        steps.append(flat(learner.model))
        return loss

    monkeypatch.setattr(train_module, "train_step", step_and_keep)
    config = small_config(ema=0.6, lr=1e-2)
    outcome = run(tmp_path, config)
    want = steps[0]
    for weights in steps[1:]:
        want = 0.6 * want + 0.4 * weights
    kept = load_model(tmp_path / LAST)
    torch.testing.assert_close(flat(kept), want)
    assert not torch.allclose(want, steps[-1], atol=1e-4)
    trained = small_model()
    trained.load_state_dict(load_trained(tmp_path / LAST))
    assert torch.equal(flat(trained), steps[-1])
    weight = class_weights([section(0), section(1)], 2, "balanced")
    scores = validate(kept, [section(2)], weight, config)
    assert outcome.history[-1]["val_loss"] == scores["val_loss"]


def test_schedules() -> None:
    def rates(schedule: str, **options: Any) -> list[float]:
        config = small_config(schedule=schedule, steps=100, lr=2.0, **options)
        return [learning_rate(step, config) for step in range(100)]

    assert rates("cosine")[0] == rates("poly")[0] == 2.0
    assert rates("cosine")[50] == pytest.approx(1.0)
    assert rates("poly")[50] == pytest.approx(2.0 * 0.5**0.9)
    assert rates("one-cycle") == rates("cosine", warmup=10)
    for schedule in ("cosine", "poly", "one-cycle", "constant"):
        warm = rates(schedule, warmup=20)
        assert warm[:20] == pytest.approx([2.0 * (i + 1) / 20 for i in range(20)])
        assert warm[20] == 2.0
        assert warm[20:] == sorted(warm[20:], reverse=True)
        assert (warm[-1] < 0.05) == (schedule != "constant")
        assert rates(schedule, warmup=0)[0] == 2.0


def test_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.4, 0.4, 0.3, 0.6, 0.3, 0.1])
    monkeypatch.setattr(
        train_module, "validate", lambda *_: {"val_loss": next(scores), "val_pixel_error": 0.0}
    )
    config = small_config(steps=30, validate_every=2, patience=2)
    outcome = run(tmp_path, config)
    assert (outcome.step, outcome.lost_patience, outcome.stopped_by) == (12, True, None)
    assert load_checkpoint(tmp_path / BEST)[2]["step"] == 8
    again = run(tmp_path, config, resume=True)
    assert (again.step, again.lost_patience) == (12, True)
    with pytest.raises(ValueError, match="patience must have validation sections"):
        run(tmp_path / "none", config, validation=())


def spotted() -> Section:
    """Class 1 in a stripe, class 2 in one pixel, no class 3."""
    classes = np.zeros((40, 50), np.uint8)
    classes[:, 10:14], classes[7, 33] = 1, 2
    return Section("spots", np.zeros((1, 40, 50), np.float32), classes, classes.astype(np.int32))


def test_rare_classes_are_drawn_evenly() -> None:
    nothing = np.zeros((40, 50), np.uint8)
    plain = Section("plain", nothing[None].astype(np.float32), nothing, nothing.astype(np.int32))
    generator = torch.Generator().manual_seed(0)
    rare = RareClasses([plain, spotted(), plain], 4, 1.0)
    rows, columns, shown = set(), set(), 0
    for _ in range(600):
        place = rare.place(8, generator)
        assert place is not None
        found, (i, j) = place
        assert 0 <= i <= 32
        assert 0 <= j <= 42
        if found.name == "spots" and (found.classes[i : i + 8, j : j + 8] == 2).any():
            shown += 1
            rows.add(i)
            columns.add(j)
    # a third, and few of the others by chance
    assert 170 < shown < 240
    assert rows == set(range(8))
    assert columns == set(range(26, 34))
    for probability, share in ((0.25, 0.25), (0.0, 0.0)):
        rare = RareClasses([spotted()], 4, probability)
        drawn = [rare.place(8, generator) is not None for _ in range(800)]
        assert np.mean(drawn) == pytest.approx(share, abs=0.05)


def test_tiles_around_rare_classes_show_them() -> None:
    rare = RareClasses([spotted()], 3, 1.0)
    generator = torch.Generator().manual_seed(0)
    _, labels = sample_tiles([spotted()], 60, 60, 20, generator, rare=rare)
    seen = (labels[:, 0, 20:40, 20:40] == 2).flatten(1).any(1)
    assert 15 < int(seen.sum()) < 60


def test_deterministic_holds_for_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(*args: Any) -> torch.Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return train_step(*args)

    monkeypatch.setattr(train_module, "train_step", watched)
    torch.use_deterministic_algorithms(False)
    for on in (True, False):
        run(tmp_path / str(on), small_config(steps=1, deterministic=on))
        assert not torch.are_deterministic_algorithms_enabled()
    assert seen == [True, False]


def test_profile(tmp_path: Path) -> None:
    config = small_config(steps=6, batch=2, accumulate=2)
    plain = run(tmp_path / "plain", config)
    assert plain.time_ms == {}
    outcome = run(tmp_path / "profiled", config, profile=tmp_path / "trace")
    assert tuple(outcome.time_ms) == PHASES
    assert all(0 < time < 5000 for time in outcome.time_ms.values())
    events = json.loads((tmp_path / "trace" / TRACE).read_text())["traceEvents"]
    blocks = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    # steps 4 to 6, two parts each; tiles are cut a step ahead, and augmented
    assert blocks.count("fastunet.input") == 6
    assert blocks.count("fastunet.backward") == 6
    same = zip(
        load_file(tmp_path / "plain" / LAST).values(),
        load_file(tmp_path / "profiled" / LAST).values(),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in same)


def test_folds_part_the_sections() -> None:
    for count, folds in ((30, 5), (7, 3), (2, 2)):
        held_out = []
        for index in range(folds):
            training, validation = fold(range(count), folds, index)
            assert sorted([*training, *validation]) == list(range(count))
            assert validation == list(range(validation[0], validation[-1] + 1))
            assert len(validation) in (count // folds, -(-count // folds))
            held_out += validation
        assert held_out == list(range(count))
    for folds, index, message in (
        (1, 0, "folds must be from 2 to the 4 sections, got 1"),
        (5, 0, "folds must be from 2 to the 4 sections, got 5"),
        (2, 2, "fold must be from 0 to 1, got 2"),
        (2, -1, "fold must be from 0 to 1, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            fold(range(4), folds, index)


def test_tensorboard_shows_predictions(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, small_config(), tensorboard=True)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0})
    events.Reload()
    pictures = events.Images("segmentation")
    assert [picture.step for picture in pictures] == [3, 6, 8]
    assert (pictures[0].width, pictures[0].height) == (96, 96)
    assert [line["step"] for line in read_log(tmp_path / LOG) if "val_loss" in line] == [3, 6, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate must be >= 1, got 0"),
        ({"clip_norm": 0.0}, "clip_norm must be > 0, got 0.0"),
        ({"ema": 1.0}, "ema must be between 0 and 1, got 1.0"),
        ({"ema": 0.0}, "ema must be between 0 and 1, got 0.0"),
        ({"rare_classes": 1.5}, "rare_classes must be within 0..1, got 1.5"),
        ({"patience": 0}, "patience must be >= 1, got 0"),
        ({"warmup": 8}, "warmup must be from 0 to less than the 8 steps, got 8"),
        ({"warmup": -1}, "warmup must be from 0 to less than the 8 steps, got -1"),
        ({"schedule": "linear"}, "schedule must be one-cycle or constant or cosine or poly, got"),
        ({"precision": "float64"}, "precision must be auto or float32 or bfloat16 or float16, got"),
    ],
)
def test_config_rejects(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**options)
