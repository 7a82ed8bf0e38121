"""Parts of a detector that do not train, for good or for the first epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from detection.training.optimisation import check_prefixes, longest_prefix

Freeze = Mapping[str, int | None] | Sequence[str]


class Freezing:
    """Which parameters train in which epoch.

    Live batch normalisation of a part that is frozen keeps its statistics. What the detector's builder has frozen stays
    so. Parameters that are frozen for some epochs are in the optimiser from the start, without a state.

    Args:
        detector: whose parameters they are.
        freeze: prefix of parameter names -> for how many epochs, or None for good; a list of prefixes is for good. The
            longest prefix of a name counts.

    Attributes:
        trainable: names of the parameters that train in some epoch.
        still: batch normalisations that keep their statistics now.

    Raises:
        ValueError: a prefix names nothing, or a number of epochs is negative.
    """

    def __init__(self, detector: nn.Module, freeze: Freeze) -> None:
        self.epochs = dict(freeze) if isinstance(freeze, Mapping) else dict.fromkeys(freeze)
        check_prefixes(detector, self.epochs, "model.freeze")
        for prefix, epochs in self.epochs.items():
            if epochs is not None and epochs < 0:
                raise ValueError(f"model.freeze of {prefix} is {epochs}: give epochs from 0 on, or null for good")
        needs_gradient = {name for name, p in detector.named_parameters() if p.requires_grad}
        self.trainable = {name for name in needs_gradient if self._epochs_of(name) is not None}
        self.still: list[nn.Module] = []
        self.begin(detector, 0)

    def _epochs_of(self, name: str) -> int | None:
        prefix = longest_prefix(name, self.epochs)
        return 0 if prefix is None else self.epochs[prefix]

    def _is_frozen(self, name: str, epoch: int) -> bool:
        epochs = self._epochs_of(name)
        return epochs is None or epoch < epochs

    def begin(self, detector: nn.Module, epoch: int) -> bool:
        """Freeze what is frozen in an epoch, from 0, and nothing else; True where other parameters train now."""
        if not self.epochs:
            return False
        changed = False
        for name, parameter in detector.named_parameters():
            trains = name in self.trainable and not self._is_frozen(name, epoch)
            changed |= trains != parameter.requires_grad
            parameter.requires_grad_(trains)
        before, norms = self.still, [(n, m) for n, m in detector.named_modules() if isinstance(m, _BatchNorm)]
        self.still = [norm for name, norm in norms if self._is_frozen(name, epoch)]
        for norm in before:
            norm.train(detector.training)
        self.hold()
        return changed

    def hold(self) -> None:
        """Keep the statistics of frozen parts, whatever mode the detector has been given."""
        for norm in self.still:
            norm.eval()


def share_anew(trainer: L.Trainer) -> None:
    """Tell DDP that other parameters train than when it was made: it waits for the gradients of those, and no others.

    Raises:
        ValueError: the strategy is neither DDP nor that of one device.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()
    elif not isinstance(strategy, SingleDeviceStrategy):
        raise ValueError(
            f"model.freeze for some epochs goes with one device or ddp, not with {type(strategy).__name__}"
        )
