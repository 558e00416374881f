"""The discriminator as it learns beside the decoder: its own AdamW, the same on every rank.

It is small, so every rank has all of it. Gradients are summed over the ranks, so the copies stay equal.

Shape legend: B clips, T frames, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from svd_ds.model.discriminator import Discriminator, hinge_loss
from svd_ds.parallel.collectives import all_reduce_sum

BETAS = (0.5, 0.9)
"""Of the discriminators of Stable Diffusion's own autoencoders (CompVis/latent-diffusion autoencoder.py)."""
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class DiscriminatorTrainer:
    """A discriminator, its optimiser, and how many clips its gradients hold."""

    def __init__(self, width: int, lr: float, seed: int, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = Discriminator(width).to(device)
        self.parameters = dict(self.network.named_parameters())
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=lr, betas=BETAS)
        self.clips = torch.zeros((), device=device)
        self.discard_gradients()

    def generator_loss(self, made_BTCHW: Tensor) -> Tensor:
        """The decoder's loss a clip, (B,): low where its frames pass for real ones. Trains nothing here."""
        fixed = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return -functional_call(self.network, fixed, (made_BTCHW,)).mean(dim=1)

    def accumulate_discriminator_grads(self, real_BTCHW: Tensor, made_BTCHW: Tensor) -> Tensor:
        """Add the gradients of a micro-batch; returns the discriminator's loss a clip, (B,)."""
        loss_B = hinge_loss(self.network(real_BTCHW), self.network(made_BTCHW.detach()))
        loss_B.sum().backward()
        self.clips += len(loss_B)
        return loss_B.detach()

    def step(self) -> None:
        """Take the step of the mean over every clip on every rank, if there are any. All ranks call it."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        all_reduce_sum([*gradients, self.clips])
        if self.clips > 0:
            torch._foreach_div_(gradients, self.clips)
            # As the engine does: a batch whose gradient is not finite changes nothing.
            if torch.stack([gradient.norm() for gradient in gradients]).isfinite().all():
                self.optimizer.step()
        self.discard_gradients()

    def discard_gradients(self) -> None:
        """Drop the gradients since the last step."""
        # Zeros, and not None: every rank has the same gradients to sum, whatever clips it had.
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.clips.zero_()

    def state(self) -> dict[str, Tensor]:
        """Weights and moments by name, as `load_state` takes them."""
        state = {f"weights.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{moment}.{name}"] = value
        return {name: value.cpu().contiguous() for name, value in state.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"weights.{name}"])
            moments = {m: state[f"{m}.{name}"] for m in MOMENTS if f"{m}.{name}" in state}
            if moments:
                # The count of steps lives on the CPU, wherever the moments do.
                self.optimizer.state[parameter] = {
                    m: value.clone() if m == "step" else value.to(parameter.device, copy=True)
                    for m, value in moments.items()
                }
