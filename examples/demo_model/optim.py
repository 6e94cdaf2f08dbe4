"""The optimiser for training autoencoder and denoiser: Muon for matrices, AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn


class MixedOptimizer:
    """Muon for matrices and AdamW for other parameters. Learning rates have linear warm-up and linear decay to 0."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        total_steps: int,
        muon_lr: float = 0.01,
        adam_lr: float = 2e-3,
        adam_only: Sequence[str] = (),
        warmup_steps: int = 40,
        decay_share: float = 0.6,
    ) -> None:
        """AdamW also trains the matrices whose names contain a text in `adam_only`.

        The learning rates decay during the last `decay_share` of all steps.
        """
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in named_parameters:
            is_matrix = parameter.ndim == 2 and min(parameter.shape) > 1
            (matrices if is_matrix and not any(part in name for part in adam_only) else others).append(parameter)
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, momentum=0.95, ns_steps=3),
            torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._base = [muon_lr, adam_lr]
        self._total, self._warmup, self._decay_share = total_steps, warmup_steps, decay_share

    def rate(self, step: int) -> float:
        """Returns the factor (0 to 1) by which the learning rates are multiplied at `step`."""
        decay = (self._total - step) / max(1.0, self._decay_share * self._total)
        return max(0.0, min(1.0, (step + 1) / self._warmup, decay))

    def step(self, step: int) -> None:
        """Update the parameters with the learning rates of `step`, then clear the gradients."""
        for optimizer, base in zip(self._optimizers, self._base, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * self.rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)
