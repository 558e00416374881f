"""Training of the discriminator next to the decoder, with its own AdamW optimiser.

The discriminator is small and replicated on every rank. Gradients are summed over the ranks, so the replicas
stay equal.

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
"""AdamW's betas for the discriminators of Stable Diffusion's autoencoders (CompVis/latent-diffusion
autoencoder.py)."""
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""Entries of AdamW's state of a parameter."""


class DiscriminatorTrainer:
    """A discriminator with its optimiser, and the number of clips in its gradients."""

    def __init__(self, width: int, lr: float, seed: int, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = Discriminator(width).to(device)
        self.parameters = dict(self.network.named_parameters())
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=lr, betas=BETAS)
        self.clips = torch.zeros((), device=device)
        self.discard_gradients()

    def generator_loss(self, generated: Tensor) -> Tensor:
        """Return the adversarial loss of the decoder for each clip, without gradients of the discriminator.

        Args:
            generated: frames of the decoder, (B, T, 3, H, W) in [-1, 1].

        Returns:
            (B,), the negative mean of the discriminator's logits.
        """
        fixed = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return -functional_call(self.network, fixed, (generated,)).mean(dim=1)

    def accumulate_discriminator_grads(self, real: Tensor, generated: Tensor) -> Tensor:
        """Add the gradients of a micro-batch.

        Args:
            real: real frames, (B, T, 3, H, W) in [-1, 1].
            generated: frames of the decoder, of the same shape.

        Returns:
            The hinge loss of the discriminator for each clip, (B,).
        """
        loss_B = hinge_loss(self.network(real), self.network(generated.detach()))
        loss_B.sum().backward()
        self.clips += len(loss_B)
        return loss_B.detach()

    def reduce_gradients(self) -> Tensor:
        """Average the gradients over all clips of all ranks. All ranks call it.

        Returns:
            bool, a scalar on the device: True if all gradients are finite, and False without clips, whose
            mean is 0 / 0.
        """
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        all_reduce_sum([*gradients, self.clips])
        torch._foreach_div_(gradients, self.clips)
        return torch.stack([gradient.norm() for gradient in gradients]).isfinite().all()

    def step(self, is_finite: bool) -> None:
        """Take an optimiser step, and discard the gradients.

        Args:
            is_finite: result of `reduce_gradients`. Like the engine, a step that is not finite is skipped.
        """
        if is_finite:
            self.optimizer.step()
        self.discard_gradients()

    def discard_gradients(self) -> None:
        """Discard the gradients since the last step."""
        # Zeros, not None: every rank must all-reduce the same gradients, even if it had no clips.
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.clips.zero_()

    def state(self) -> dict[str, Tensor]:
        """Return weights and moments by name, for `load_state`."""
        state = {f"weights.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{moment}.{name}"] = value
        return {name: value.cpu().contiguous() for name, value in state.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the weights and moments that `state` returned."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"weights.{name}"])
            moments = {m: state[f"{m}.{name}"] for m in MOMENTS if f"{m}.{name}" in state}
            if moments:
                # AdamW keeps the number of steps on the CPU, and the moments on the parameter's device.
                self.optimizer.state[parameter] = {
                    m: value.clone() if m == "step" else value.to(parameter.device, copy=True)
                    for m, value in moments.items()
                }
