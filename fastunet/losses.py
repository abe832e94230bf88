"""Losses as modules, over the operators."""

from torch import Tensor, nn

from .ops import weighted_cross_entropy


class WeightedCrossEntropyLoss(nn.Module):
    """``fastunet.weighted_cross_entropy`` as a module; the arguments are that function's.

    Args:
        class_weight: [K] floating point, or None; a buffer that moves with the module.
        ignore_index: class id of pixels that count nowhere.
        label_smoothing: 0..1, share of the target spread evenly over the classes.
        reduction: "none", "sum", "mean" or "weighted_mean".
    Raises: as the function does, when called.
    Source: Ronneberger et al. 2015, equation 1.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        class_weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
        """The loss of logits [B, K, H, W] for target [B, H, W] under pixel_weight [B, H, W]."""
        return weighted_cross_entropy(
            logits,
            target,
            pixel_weight,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )
