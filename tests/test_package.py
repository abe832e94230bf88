"""``import fastunet`` is light, and the public names are there and documented."""

import inspect
import os
import subprocess
import sys

import fastunet


def test_import_needs_torch_and_numpy_alone() -> None:
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in {"scipy", "skimage", "tifffile", "PIL", "imagecodecs", "safetensors", "typer",
                   "rich", "matplotlib", "zarr", "tensorboard"} or name == "fastunet._C":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
# it is looked for, and imported by nobody
sys.modules["triton"] = None
import fastunet, torch
y = fastunet.UNet(widths=(2, 4))(torch.zeros(1, 1, 20, 20))
y.sum().backward()
fastunet.weight_map(torch.zeros(4, 4, dtype=torch.int32))
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=120)


def test_import_takes_no_time_beyond_torch() -> None:
    script = """
import time, numpy, torch
start = time.perf_counter()
import fastunet
print(time.perf_counter() - start)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120
    )
    # 0.03 s on an idle machine, torch alone is 1 to 3 s
    assert float(result.stdout) < 0.5


def test_public_names_have_docstrings() -> None:
    for name in fastunet.__all__:
        value = getattr(fastunet, name)
        assert inspect.getdoc(value), name
        if inspect.isfunction(value):
            assert "Args:" in (value.__doc__ or ""), name
            assert "Returns:" in (value.__doc__ or ""), name
            assert "Raises:" in (value.__doc__ or ""), name
    assert not hasattr(fastunet, "no_such_name")


def test_console_script_sets_how_threads_wait_before_torch_reads_it() -> None:
    script = """
import os, sys
import fastunet_command
assert "torch" not in sys.modules
sys.argv = ["fastunet", "doctor", "--json"]
try:
    fastunet_command.main()
except SystemExit as ended:
    assert not ended.code
assert os.environ["GOMP_SPINCOUNT"] == "10000"
"""
    waits = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {k: v for k, v in os.environ.items() if k not in waits}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=environment)
