"""A running mean of the weights (Polyak averaging): it often scores better than the last ones."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from clip_train.sharding import gather_one, local, shard_like


class Ema:
    """mean = decay * mean + (1 - decay) * weights, after every step.

    In the first steps, when the mean still remembers the random start, the decay is
    (1 + step) / (10 + step), as TensorFlow has it. Buffers (a batch norm's statistics) are averaged
    as the weights are; counters among them are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the model's weights."""
        self.decay = decay
        self._model = model
        self._means = {name: t.detach().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = self._model.state_dict()
        names = [name for name, t in now.items() if t.is_floating_point()]
        means, weights = ([local(d[name]) for name in names] for d in (self._means, now))
        get_ema_multi_avg_fn(decay)(means, weights, step)
        for name in now.keys() - set(names):
            self._means[name].copy_(now[name])

    def whole_state(self, *, main: bool = True) -> dict[str, Tensor]:
        """The means under the model's names, as `gather_one`; every process must ask for them."""
        return {name: gather_one(t, main) for name, t in self._means.items()}

    def load_whole_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `whole_state` gave."""
        self._means = {name: shard_like(state[name], t) for name, t in self._means.items()}
