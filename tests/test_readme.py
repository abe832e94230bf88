"""The README's example runs as it stands."""

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"


def test_python_examples() -> None:
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(code, names)
    assert names["report"].swapped == ("0",)
    assert torch.isfinite(names["loss"])
    assert names["weights"][0, 121, 80] > 7
    assert names["probabilities"].shape == (2, 600, 800)
