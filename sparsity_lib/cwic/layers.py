"""The granular layers: a linear layer, and the activation of a gated FFN with its one neuron mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsity_lib.cwic.config import CWICConfig
from sparsity_lib.cwic.granular import granular_matmul, stripes, threshold_mask
from sparsity_lib.cwic.statistics import Thresholds
from sparsity_lib.errors import SparsityError


class Ledger:
    """What the layers of one model share: the costs of the last forward, which tokens count, and who watches.

    costs: layer -> weights read by each token, float32 [tokens], with gradients while training.
    """

    def __init__(self) -> None:
        self.costs: dict[str, Tensor] = {}
        #: Tokens that are no padding, [tokens]; None: all.
        self.valid: Tensor | None = None
        #: Called with a layer and what reached its masks, [tokens, width].
        self.recorder: Callable[[nn.Module, Tensor], None] | None = None
        #: Off: layers compute what the dense model would.
        self.enabled = True
        #: Layers whose statistics moved since it was emptied; None: each forward moves them.
        self.moved: set[str] | None = None

    def first(self, name: str) -> bool:
        """Whether a layer is to move its statistics: once a step where blocks are computed twice (activation checkpointing)."""
        if self.moved is None:
            return True
        new = name not in self.moved
        self.moved.add(name)
        return new

    def __deepcopy__(self, memo: dict) -> Ledger:
        return Ledger()  # costs of a forward that is over, and watchers of another model, are no part of a copy


class CWICLinear(nn.Linear):
    """A linear layer whose product is granular. Weight and bias are those of the layer it was made of.

    x [..., in] -> [..., out] in the product's dtype. Thresholds and statistics are in `sparsity`; statistics move in
    training forwards that record gradients, and only there.
    """

    def __init__(self, linear: nn.Linear, name: str, role: str, config: CWICConfig, ledger: Ledger) -> None:
        nn.Module.__init__(self)
        if type(linear) is not nn.Linear:
            raise SparsityError(f"{name} is a {type(linear).__name__}, not a Linear. Fix: start from the plain model.")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.name, self.role, self.config = name, role, config
        self.stripe = config.width(role, self.out_features)
        number = -(-self.out_features // self.stripe)
        self.sparsity = Thresholds(number, self.in_features, config, centred=True, device=linear.weight.device)
        self.__dict__["ledger"] = ledger
        self.training = linear.training

    @property
    def dense_cost(self) -> int:
        """Weights a token reads where nothing is masked."""
        return self.in_features * self.out_features

    def entry_weights(self) -> list[int]:
        """Weights that an entry of each stripe's mask stands for: the stripe's outputs."""
        return [part.stop - part.start for part in stripes(self.out_features, self.stripe)]

    def observe(self, x: Tensor) -> None:
        """Let the running statistics see x [..., in], in training."""
        if self.training and torch.is_grad_enabled() and self.ledger.first(self.name):
            self.sparsity.observe(x.flatten(0, -2), self.ledger.valid)

    def product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y [tokens, out] and the weights read, [tokens], for x [tokens, in]; statistics stay."""
        y, cost = granular_matmul(
            x, self.weight, self.sparsity.theta, *self.sparsity.rule(), width=self.stripe,
            straight_through=self.config.straight_through, kernel=self.config.kernel)
        return (y if self.bias is None else y + self.bias.to(y.dtype)), cost

    def forward(self, x: Tensor) -> Tensor:
        if not self.ledger.enabled:
            return super().forward(x)
        flat = x.flatten(0, -2)
        self.observe(flat)
        if self.ledger.recorder is not None:
            self.ledger.recorder(self, flat)
        y, self.ledger.costs[self.name] = self.product(flat)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stripe={self.stripe}"


class CWICActivation(nn.Module):
    """M * act(z), M = H(|act(z)| - theta sigma): the neurons whose rows of W_up and columns of W_down are read.

    One threshold a neuron. Nothing is centred: a neuron that is left out must count as zero, or its row of W_up would be
    needed after all. What it costs is the up and down matrices' share of the kept neurons.
    """

    def __init__(self, act: nn.Module, name: str, neurons: int, weights_each: int, config: CWICConfig, ledger: Ledger,
                 device=None) -> None:
        super().__init__()
        self.act, self.name, self.role, self.config = act, name, "ffn", config
        self.neurons, self.weights_each = neurons, weights_each
        self.sparsity = Thresholds(1, neurons, config, centred=False, device=device)
        self.__dict__["ledger"] = ledger
        self.training = act.training

    @property
    def dense_cost(self) -> int:
        """Weights of the up and down matrices together."""
        return self.neurons * self.weights_each

    def entry_weights(self) -> list[int]:
        """Weights that a neuron stands for, as the one stripe there is."""
        return [self.weights_each]

    def forward(self, z: Tensor) -> Tensor:
        g = self.act(z)
        if not self.ledger.enabled:
            return g
        flat = g.flatten(0, -2)
        if self.training and torch.is_grad_enabled() and self.ledger.first(self.name):
            self.sparsity.observe(flat, self.ledger.valid)
        if self.ledger.recorder is not None:
            self.ledger.recorder(self, flat)
        _, scale, eps = self.sparsity.rule()
        masked, self.ledger.costs[self.name] = threshold_mask(
            flat, self.sparsity.theta[0], scale, eps, weights_each=self.weights_each,
            straight_through=self.config.straight_through, kernel=self.config.kernel)
        return masked.view_as(g)
