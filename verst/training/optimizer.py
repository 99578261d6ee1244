"""AdamW on float32 master parameters, with the schedule, the clip and the decision to skip an update."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from verst.config.schema import TrainConfig
from verst.errors import TrainingDiverged
from verst.observe.metrics import Tally
from verst.training.broken import Findings, attributed, first_broken
from verst.training.distributed import local_part, sum_over_ranks

_CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


def learning_rate(update: int, *, peak: float, schedule: Literal["constant", "linear", "cosine"], warmup: int, total: int) -> float:
    """Rate of one update, counted from 0 over the whole run.

    Rises in `warmup` equal parts to `peak` (the first update already has one part), then stays, or falls to reach 0 after update
    `total` − 1, on a line or on half a cosine (SGDR, arXiv 1608.03983, eq. 5, without restarts).
    """
    if update < warmup:
        return peak * (update + 1) / warmup
    progress = min((update - warmup) / max(total - warmup, 1), 1.0)
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak


class ScheduledOptimizer(ABC):
    """The schedule, and the decision of all ranks together to apply an update or to skip it."""

    def __init__(self, train: TrainConfig, updates_per_step: int, steps: int, *, metrics: str = "update", rate: str = "train.lr") -> None:
        """`metrics` begins the names of its metrics; `rate` is the option that has its learning rate, for a person."""
        self._train = train
        self._metrics = metrics
        self._rate_option = rate
        self._total = steps * updates_per_step
        self._warmup = train.warmup_steps * updates_per_step
        self.update = 0  # updates decided so far, skipped ones included: the place in the schedule
        self.stepped = 0  # updates applied: what Adam's bias correction counts
        self.skipped_in_row = 0

    def follow(self, train: TrainConfig) -> None:
        """Takes learning rate and clip from here on, from a configuration that is the same in all else."""
        self._train = train

    @abstractmethod
    def zero_grad(self) -> None: ...

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """All that this rank updates, by its name in a checkpoint: `model/NAME` (float32 master), `exp_avg/NAME`, `exp_avg_sq/NAME`."""

    @abstractmethod
    def gradient_buffers(self) -> list[torch.Tensor]:
        """Memory of gradients that `zero_grad` keeps."""

    @abstractmethod
    def _measure(self, broken: float) -> tuple[float, float]:
        """The norm of the gradient over all ranks, not finite if the gradient is not, and the sum of `broken` over them. A collective."""

    @abstractmethod
    def _named_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's part of each gradient that was measured, in the model's order."""

    @abstractmethod
    def _apply(self, rate: float, norm: float) -> None:
        """Clips the gradient, whose norm this is, and steps."""

    def step(self, update: str = "an update", *, loss_is_finite: bool = True, broken: Sequence[str] = ()) -> Tally:
        """Clips and applies the gradients, or drops them if their norm or any rank's loss is not finite. A collective.

        `update` is its name in the note about a dropped one, `broken` are samples of this rank that are not finite.
        Raises `TrainingDiverged` once `train.max_skipped_updates` updates in a row were dropped.
        """
        norm, bad_losses = self._measure(0.0 if loss_is_finite else 1.0)
        healthy = math.isfinite(norm) and not bad_losses
        tally = Tally()
        tally.mean(f"{self._metrics}/skipped", 0.0 if healthy else 1.0)
        if healthy:
            rate = self._rate()
            self._apply(rate, norm)
            self.stepped += 1
            tally.mean(f"{self._metrics}/grad_norm", norm)
            tally.mean(f"{self._metrics}/lr", rate)
        cause = "" if healthy else attributed(Findings(broken, first_broken(self._named_gradients())))
        self.zero_grad()
        self.update += 1
        self.skipped_in_row = 0 if healthy else self.skipped_in_row + 1
        if not healthy:
            tally.note(f"{update} is not finite, and is skipped: {cause}")
        if self.skipped_in_row >= self._train.max_skipped_updates:
            raise TrainingDiverged(
                f"{self.skipped_in_row} updates in a row were not finite (last gradient norm {norm}, bad loss on {int(bad_losses)} ranks): "
                f"{cause}. The weights are those before them. Resuming trains the same journaled batches again and ends here too: look at "
                f"them, then start a new run (another run.name) with a lower {self._rate_option}, or without what they show"
            )
        return tally

    def pass_over(self) -> Tally:
        """An update that is not to be made, as one that has no token to learn from: the schedule moves on, weights and moments stay."""
        self.zero_grad()
        self.update += 1
        tally = Tally()
        tally.mean(f"{self._metrics}/skipped", 1.0)
        return tally

    def counters(self) -> dict[str, int]:
        return {"update": self.update, "stepped": self.stepped, "skipped_in_row": self.skipped_in_row}

    def _restore_counters(self, counters: Mapping[str, Any]) -> None:
        self.update, self.stepped, self.skipped_in_row = (int(counters[k]) for k in ("update", "stepped", "skipped_in_row"))

    def _rate(self) -> float:
        train = self._train
        return learning_rate(self.update, peak=train.lr, schedule=train.schedule, warmup=self._warmup, total=self._total)


class MasterAdamW(ScheduledOptimizer):
    """AdamW (arXiv 1711.05101) over this rank's part of each trainable parameter, by Hugging Face name.

    Master parameters are float32. Where the model's own parameters (or their shards) are float32 they are the same memory; where the
    model is bfloat16 they are copies: an update of relative size below 2⁻⁸ would vanish in the model's dtype, and gradients of
    microbatches would be rounded as they are summed. The model's parameters are then the masters, rounded.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], train: TrainConfig, updates_per_step: int, steps: int, **names: str) -> None:
        """`names`: see `ScheduledOptimizer`."""
        super().__init__(train, updates_per_step, steps, **names)
        self.parameters = dict(parameters)
        self.masters = {name: _master(parameter) for name, parameter in parameters.items()}
        self._copied = [n for n, p in parameters.items() if local_part(p).dtype != torch.float32]
        for name in self._copied:
            _accumulate_in(self.masters[name], parameters[name])
        groups = [{"params": [m for n, m in self.masters.items() if _decays(n, parameters[n]) == d], "decays": d} for d in (True, False)]
        for group in groups:
            group["weight_decay"] = train.weight_decay if group["decays"] else 0.0
        on_gpu = any(m.is_cuda for m in self.masters.values())
        self._adamw = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, fused=on_gpu)
        for master in self.masters.values():
            self._adamw.state[master] = {
                "step": torch.zeros((), device=master.device if on_gpu else "cpu"),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, master in self.masters.items():
            state = self._adamw.state[master]
            found |= {f"model/{name}": master, f"exp_avg/{name}": state["exp_avg"], f"exp_avg_sq/{name}": state["exp_avg_sq"]}
        return found

    def gradient_buffers(self) -> list[torch.Tensor]:
        return []

    def zero_grad(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self.masters[name].grad = None

    def _measure(self, broken: float) -> tuple[float, float]:
        self._collect_gradients()
        square, broken = sum_over_ranks([self._square_norm(), broken])
        return math.sqrt(square) if square >= 0 else math.nan, broken

    @torch.no_grad()
    def restored(self, counters: Mapping[str, Any]) -> None:
        """Takes up the counters of a state whose masters and moments were copied in, and gives the model its parameters."""
        self._restore_counters(counters)
        for state in self._adamw.state.values():
            state["step"].fill_(self.stepped)
        self._round_into_model()
        self.zero_grad()

    def _collect_gradients(self) -> None:
        """A parameter that met no token counts as gradient 0, so that all parameters have taken the same number of steps."""
        for name, master in self.masters.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                master.grad = local_part(gradient)
            elif master.grad is None:
                master.grad = torch.zeros_like(master)

    def _named_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, master.grad) for name, master in self.masters.items() if master.grad is not None)

    def _gradients(self) -> list[torch.Tensor]:
        return [m.grad for m in self.masters.values() if m.grad is not None]

    def _square_norm(self) -> float:
        norms = torch.stack(torch._foreach_norm(self._gradients()))  # pyright: ignore[reportPrivateImportUsage]
        return float(norms.double().square().sum())

    @torch.no_grad()
    def _apply(self, rate: float, norm: float) -> None:
        factor = min(1.0, self._train.clip_norm / (norm + _CLIP_EPS))
        if factor < 1.0:
            torch._foreach_mul_(self._gradients(), factor)  # pyright: ignore[reportPrivateImportUsage]
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self._round_into_model()

    @torch.no_grad()
    def _round_into_model(self) -> None:
        if self._copied:
            rounded: list[torch.Tensor] = [self.parameters[n] for n in self._copied]
            masters: list[torch.Tensor] = [self.masters[n] for n in self._copied]
            torch._foreach_copy_(rounded, masters)  # pyright: ignore[reportPrivateImportUsage]


def _master(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(local_part(parameter.detach()).to(torch.float32))


def _accumulate_in(master: nn.Parameter, parameter: nn.Parameter) -> None:
    """Moves each microbatch's gradient to the master's float32 sum as soon as it is complete."""

    def move(parameter: torch.Tensor) -> None:
        if parameter.grad is None:
            return
        if master.grad is None:
            master.grad = parameter.grad.to(torch.float32)
        else:
            master.grad += parameter.grad
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(move)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Matrices decay; norms and biases do not (experts' biases are matrices too)."""
    return parameter.ndim >= 2 and not name.endswith("bias")
