"""Which steps are not taken: those whose gradient is not finite, and spikes.

With it fp16's loss scale, which such a gradient lowers. All of it stays on the device: a step asks
for no number, so a GPU never waits for the CPU to look at one.
"""

import torch
from torch import Tensor

_MEMORY = 100  # norms that the mean is over, and that a spike must follow
_START = 2.0**16  # as torch.amp.GradScaler, which doubles and halves as we do
_GROWTH = 2000


class Guard:
    """Judges each gradient by its norm.

    Attributes:
        scale: what the loss is to be multiplied by before the backward pass: 1, but for fp16.
    """

    def __init__(self, device: torch.device, *, spike_factor: float, fp16: bool) -> None:
        """Args: spike_factor: times the mean norm that is a spike; 0: none is."""
        self.spike_factor = spike_factor
        self.fp16 = fp16
        self.scale = torch.tensor(_START if fp16 else 1.0, device=device)
        self._mean, self._taken, self._since_scaled = torch.zeros(3, device=device).unbind()

    def judge(self, norm: Tensor) -> Tensor:
        """Whether to skip the step whose unscaled gradient has this norm, a boolean scalar."""
        taken = norm.isfinite()
        if self.spike_factor:
            early = self._taken < _MEMORY
            taken &= early | (norm <= self.spike_factor * self._mean)
        self._taken = self._taken + taken
        share = 1 / self._taken.clamp(1, _MEMORY)
        moved = self._mean + share * (norm.to(self._mean.dtype) - self._mean)
        self._mean = torch.where(taken, moved, self._mean)
        if self.fp16:
            self._rescale(norm.isfinite())
        return ~taken

    def _rescale(self, finite: Tensor) -> None:
        """Halve the scale where the gradient overflowed, double it after 2,000 that did not."""
        self._since_scaled = torch.where(finite, self._since_scaled + 1, 0)
        grow = self._since_scaled >= _GROWTH
        self.scale = torch.where(finite, self.scale, self.scale / 2)
        self.scale = torch.where(grow, self.scale * 2, self.scale)
        self._since_scaled = torch.where(grow, 0, self._since_scaled)

    def state_dict(self) -> dict[str, Tensor]:
        """What judging goes on from."""
        return {
            "scale": self.scale,
            "mean": self._mean,
            "taken": self._taken,
            "since_scaled": self._since_scaled,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        device = self.scale.device
        self._mean, self._taken = state["mean"].to(device), state["taken"].to(device)
        if self.fp16 and state["scale"] != 1:  # else it was no fp16 run before --rebase
            self.scale = state["scale"].to(device)
            self._since_scaled = state["since_scaled"].to(device)
