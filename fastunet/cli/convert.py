"""``fastunet convert``: other people's checkpoints into fastunet's."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .common import AsJson, app, print_result


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Weights: .pth of torch.save, or .safetensors.")],
    output: Annotated[Path, typer.Argument(help="Checkpoint to write, .safetensors.")],
    padding: Annotated[
        Literal["valid", "same"] | None,
        typer.Option(help="Where the weights do not tell; by default that of the original's."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint of the weights of another PyTorch U-Net, without running code in them."""
    from ..checkpoint import CheckpointError, read_weights, save_checkpoint
    from ..unet import UNet

    if output.suffix.lower() != ".safetensors":
        raise ValueError(f"convert: the output must end in .safetensors, got {output}")
    options: dict[str, Any] = {} if padding is None else {"padding": padding}
    state = read_weights(source)
    try:
        model = UNet.from_state_dict(state, **options)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    save_checkpoint(output, model)
    config = model.config
    del config["dropout"], config["odd"]
    print_result({**config, "output": str(output)}, as_json)
