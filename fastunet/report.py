"""The one place that reports on a run: a progress bar, JSON lines, TensorBoard where asked for."""

import json
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .files import replacing


class Report:
    """Tells a person and a machine how a run goes.

    Args:
        log: JSON lines file, appended to; a resumed run first drops the lines past ``step``. None
            for no file: another process writes it.
        steps: where the run ends.
        step: where it starts.
        quiet: show no progress bar, as where there is no terminal.
        tensorboard: folder for TensorBoard events, or None.
    Raises: ModuleNotFoundError, saying what to install, if TensorBoard is asked for and missing.
    """

    def __init__(
        self,
        log: Path | None,
        steps: int,
        *,
        step: int = 0,
        quiet: bool = False,
        tensorboard: Path | None = None,
    ) -> None:
        self.history: list[dict[str, Any]] = []
        if log is not None:
            self.history = [line for line in read_log(log) if line["step"] <= step]
            with replacing(log) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in self.history))
        self._log = None if log is None else log.open("a", buffering=1)
        self._writer = _open_tensorboard(tensorboard, step) if tensorboard else None
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps, completed=step, note="")
        self._first, self._began = step, time.perf_counter()
        self._start = self._began - (self.history[-1]["seconds"] if self.history else 0)

    def __enter__(self) -> "Report":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
        if self._log is not None:
            # each line was flushed; what is left is one that has failed already
            with suppress(OSError):
                self._log.close()
        if self._writer is not None:
            self._writer.close()

    def advance(self, step: int, note: str) -> None:
        """Move the bar to ``step`` and show ``note`` and the steps a second beside it."""
        rate = (step - self._first) / (time.perf_counter() - self._began)
        self._progress.update(self._task, completed=step, note=f"{note}, {rate:.3g} steps/s")

    def line(self, step: int, **values: float) -> None:
        """Record values at ``step``; several calls at one step make one line of history each.

        Raises: OSError, naming the file, if the disk refuses.
        """
        seconds = round(time.perf_counter() - self._start, 3)
        entry = {"step": step, "seconds": seconds, **values}
        self.history.append(entry)
        if self._log is not None:
            try:
                self._log.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise OSError(f"{self._log.name}: cannot be written: {error}") from error
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, rgb: Any) -> None:
        """Show [H, W, 3] uint8 in TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, rgb, step, dataformats="HWC")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON lines log; a last line that was cut short is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def _open_tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ModuleNotFoundError(
            "TensorBoard is not installed: pip install 'fastunet[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder), purge_step=step + 1)
