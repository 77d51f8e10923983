"""How weights move: Muon for matrices, and the learning rate's course over a run."""

from __future__ import annotations

import torch
from torch import Tensor


class Muon:
    """Momentum whose update is made orthogonal, for matrices (Jordan et al. 2024), with decoupled weight decay."""

    def __init__(self, parameters: list[torch.nn.Parameter], momentum: float = 0.95, decay: float = 0.02) -> None:
        self.momentum, self.decay = momentum, decay
        self.groups: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for p in parameters:
            self.groups.setdefault(p.shape, []).append(p)
        self.state = {shape: torch.zeros((len(ps), *shape), device=ps[0].device) for shape, ps in self.groups.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move every matrix against its gradient."""
        for shape, group in self.groups.items():
            parameters: list[Tensor] = list(group)
            gradient = torch.stack([p.grad for p in group if p.grad is not None]).float()
            state = self.state[shape]
            state.lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(state, self.momentum))
            update *= -rate * max(1.0, shape[0] / shape[1]) ** 0.5
            torch._foreach_mul_(parameters, 1 - rate * self.decay)
            torch._foreach_add_(parameters, list(update.to(parameters[0].dtype).unbind(0)))


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices of a stack (N, rows, columns), by Newton-Schulz in bf16."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    result: Tensor = x.mT if tall else x
    return result


class Optimiser:
    """Muon for the matrices of a model and AdamW for its embedding and norms, at one course of the rate."""

    def __init__(self, model: torch.nn.Module, muon_rate: float, adam_rate: float) -> None:
        named = dict(model.named_parameters())
        matrices = [p for n, p in named.items() if p.dim() == 2 and "embed" not in n]
        self.others = [p for n, p in named.items() if not (p.dim() == 2 and "embed" not in n)]
        self.rates = (muon_rate, adam_rate)
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(
            self.others, lr=adam_rate, betas=(0.9, 0.97), weight_decay=0.0, fused=matrices[0].is_cuda
        )

    def step(self, scale: float) -> None:
        """One update at `scale` times the peak rates; gradients are used up."""
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        self.muon.step(self.rates[0] * scale)
        for group in self.adam.param_groups:
            group["lr"] = self.rates[1] * scale
        self.adam.step()

    def state(self) -> dict[str, object]:
        """What `restore` needs."""
        return {"adam": self.adam.state_dict(), "muon": [(tuple(k), v) for k, v in self.muon.state.items()]}

    def restore(self, state: dict[str, object]) -> None:
        """Go on from what `state` gave."""
        self.adam.load_state_dict(state["adam"])  # type: ignore[arg-type]
        device = self.others[0].device
        self.muon.state = {torch.Size(k): v.to(device) for k, v in state["muon"]}  # type: ignore[attr-defined]


def rate_at(fraction: float, step: int, plateau: float, warm_up: int = 100) -> float:
    """Learning rate as a share of its peak: a warm-up in steps, a plateau, and a line down to nothing."""
    return min(1.0, (step + 1) / warm_up) * min(1.0, max(0.0, (1.0 - fraction) / (1.0 - plateau)))
