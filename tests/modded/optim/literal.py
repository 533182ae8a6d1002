"""The optimizers' equations once more, in float64, one matrix and one parameter at a time, for one rank.

Written from the published equations and from the record's table, without a look at the code under test.
"""

import math

import torch
from torch import Tensor

POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5
SIX_ROUNDS = [
    (3.923798038567, -6.095026865488, 3.905234618423),
    (3.278126713798, -3.328923386476, 0.989127286973),
    (3.505298394150, -5.137358782410, 1.968325560615),
    (2.815058591845, -3.685181239622, 1.417196497642),
    (2.245503932403, -2.443826979899, 0.963091710461),
    (2.256537145403, -2.166840097229, 0.929501253245),
]
MUON = ("qk_bank", "vo_bank", "mlp_bank")
ADAM = {  # name: (b1, b2, lr_mul, wd_mul)
    "head": (0.5, 0.95, 1, 150),
    "embed": (0.5, 0.95, 1, 150),
    "embed2": (0.75, 0.95, 75, 5),
    "value_embeds": (0.75, 0.95, 75, 5),
    "bigram": (0.75, 0.95, 75, 5),
    "scalars": (0.9, 0.99, 5, 0),
    "smear_gate": (0.9, 0.99, 0.01, 0),
    "ve_gates": (0.9, 0.99, 1, 1),
    "post_lambdas": (0.9, 0.95, 1, 0),
    "residual_lambdas": (0.9, 0.95, 5, 0),
    "mudd_w1": (0.9, 0.99, 0.25, 1),
    "mudd_w2": (0.9, 0.99, 0.25, 1),
    "mudd_b2": (0.9, 0.99, 0.25, 0),
    "gate_w1": (0.9, 0.99, 0.1, 1),
    "gate_w2": (0.9, 0.99, 0.1, 1),
    "gate_b2": (0.9, 0.99, 0.1, 0),
    "gate_scale": (0.9, 0.99, 0.1, 0),
    "static_gates": (0.9, 0.99, 0.1, 0),
}


def orthogonalized(u: Tensor, rounds: list, margin: float) -> Tensor:
    """One matrix (rows, columns)."""
    x = u / (margin * u.norm() + 1e-6)
    for a, b, c in rounds:
        if u.shape[0] <= u.shape[1]:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        else:
            gram = x.T @ x
            x = a * x + x @ (b * gram + c * gram @ gram)
    return x


class Literal:
    """Weights and state of everything; `step` is one update from float64 gradients that were averaged over lanes."""

    def __init__(self, weights: dict[str, Tensor], config) -> None:
        self.config = config
        self.weights = {name: value.detach().double().clone() for name, value in weights.items()}
        self.waiting = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.state: dict[object, dict] = {}

    def step(self, gradients: dict[str, Tensor], plan) -> None:
        for name in self.weights:
            self.waiting[name] += gradients[name].double()
        for name in MUON:
            if name in self.weights:
                self._bank(name, plan)
        if not plan.adam:
            return
        if plan.tied and "embed" in self.weights:
            self.waiting["head"] += self.waiting["embed"]
        for name in ADAM:
            if name in self.weights and not (plan.tied and name == "embed"):
                self._adam(name, plan)
            if name in self.waiting:
                self.waiting[name] = torch.zeros_like(self.weights[name])
        if plan.tied and "embed" in self.weights:
            self.weights["embed"] = self.weights["head"].clone()
        if plan.untie:
            self.state["embed"] = {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in self.state["head"].items()
            }

    def _bank(self, name: str, plan) -> None:
        config, weights, gradient = self.config, self.weights[name], self.waiting[name]
        columns = weights.shape[-1]
        rows = columns if name == "qk_bank" and not config.qk_pairs else weights.shape[-2]
        matrices, gradients = weights.reshape(-1, rows, columns), gradient.reshape(-1, rows, columns)
        for k in range(len(matrices)):
            mult = 1.0
            if name == "mlp_bank":
                mult = math.sqrt(rows / columns) * (1, 2)[k % 2]
            matrices[k] = self._matrix((name, k), matrices[k], gradients[k], mult, plan)
        self.weights[name] = matrices.reshape(weights.shape)
        self.waiting[name] = torch.zeros_like(weights)

    def _matrix(self, key, w: Tensor, g: Tensor, mult: float, plan) -> Tensor:
        config = self.config
        state = self.state.setdefault(key, {"M": torch.zeros_like(w), "S": torch.zeros_like(w), "V": 0.0})
        m = plan.momentum
        rounds, margin = (POLAR_EXPRESS, 1.02) if config.polar_express else (NEWTON_SCHULZ, 1.0)
        if config.two_momenta:
            (fast, share), rounds, margin = plan.two, SIX_ROUNDS, 1.05
            state["M"] = fast * state["M"] + (1 - fast) * g
            state["S"] = 0.98 * state["S"] + 0.02 * g
            mixed = share * state["M"] + (1 - share) * state["S"]
        else:
            mixed = state["M"] = m * state["M"] + (1 - m) * g
        o = orthogonalized(m * mixed + (1 - m) * g, rounds, margin)
        if config.normuon:
            axis = 1 if w.shape[0] >= w.shape[1] else 0
            rho = (o**2).mean(axis, keepdim=True)
            state["V"] = config.normuon_beta2 * state["V"] + (1 - config.normuon_beta2) * rho
            d = state["V"].clamp(min=1e-10) ** -0.5
            o = o * d * o.norm() / max(math.sqrt((w.shape[axis] * rho * d**2).sum()), 1e-10)
        lr = config.muon_lr * plan.lr
        eta = lr * mult
        direction = state["S"] if config.two_momenta else o
        mask = (direction * w >= 0).double() if config.cautious_decay else 1.0
        return w - eta * (config.muon_wd * lr) * w * mask - eta * o

    def _adam(self, name: str, plan) -> None:
        b1, b2, lr_mul, wd_mul = ADAM[name]
        p, g = self.weights[name], self.waiting[name]
        state = self.state.setdefault(name, {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "t": 0})
        state["t"] += 1
        state["m"] = b1 * state["m"] + (1 - b1) * g
        state["v"] = b2 * state["v"] + (1 - b2) * g**2
        lr = self.config.adam_lr * plan.lr * lr_mul
        bias = math.sqrt(1 - b2 ** state["t"]) / (1 - b1 ** state["t"])
        u = state["m"] / (state["v"].sqrt() + 1e-10) * lr * bias
        mask = (u * p > 0).double() if self.config.cautious_decay else 1.0
        u = u + lr**2 * self.config.adam_wd * wd_mul * p * mask
        self.weights[name] = p - u
