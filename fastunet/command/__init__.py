"""The ``fastunet`` console script, installed as ``fastunet_command``: outside the package, since
importing anything of ``fastunet`` imports torch, which reads how its threads shall wait.
"""

import os


def spin_briefly() -> None:
    """Let threads soon sleep while they wait for each other; before torch is imported.

    On a machine that does anything else, spinning threads take the core that work needs.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def main() -> None:
    """Run the command line."""
    spin_briefly()
    from fastunet.cli import main as run

    run()
