"""A flow whose velocity is known exactly: the instrument for tests and for studies of lookahead fidelity.

Data are a mixture of Gaussians, x_0 ~ sum_k w_k N(m_k, s^2 I), and x_sigma = (1 - sigma) x_0 + sigma noise.
Given the component, x_sigma is N((1-sigma) m_k, tau^2 I) with tau^2 = (1-sigma)^2 s^2 + sigma^2, and Gaussian
conditioning gives

    E[noise - x_0 | x, k] = (sigma - (1-sigma) s^2) / tau^2 * (x - (1-sigma) m_k) - m_k.

The marginal velocity is the average of these under the posterior of k. A subset of the components plays the
part of a prompt, so classifier-free guidance is exact as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class GaussianMixtureFlow:
    """Rectified flow onto a mixture of isotropic Gaussians.

    Args:
        means: component centres, [K, D] floating; its dtype and device are those of all parameters.
        std: standard deviation of every component, positive.
        weights: mixture weights, [K], positive; normalised here. Default: equal.

    Raises:
        ValueError: a shape or value is out of range.
    """

    def __init__(self, means: Tensor, std: float, weights: Tensor | Sequence[float] | None = None) -> None:
        if means.ndim != 2 or means.numel() == 0 or not means.is_floating_point():
            raise ValueError(f"means must be floating with shape [K, D], got {means.dtype} {list(means.shape)}")
        if not std > 0:
            raise ValueError(f"std must be positive, got {std}")
        components = means.shape[0]
        weights = torch.as_tensor([1.0] * components if weights is None else weights).to(means)
        if weights.shape != (components,) or not bool((weights > 0).all()):
            raise ValueError(f"weights must be {components} positive values, got {weights.tolist()}")
        self.means = means
        self.std = float(std)
        self.weights = weights / weights.sum()

    def condition(self, components: Sequence[int]) -> GaussianMixtureFlow:
        """The flow onto some of the components: what a prompt does to the data distribution.

        Args:
            components: indices in [0, K), at least one.

        Returns:
            flow with those components, weights renormalised.
        """
        index = torch.as_tensor(list(components), dtype=torch.int64, device=self.means.device)
        return GaussianMixtureFlow(self.means[index], self.std, self.weights[index])

    def log_density(self, latents: Tensor, sigma: float | Tensor) -> Tensor:
        """Log of the marginal density of x_sigma.

        Args:
            latents: points, [B, ...] with D elements per row.
            sigma: noise level in [0, 1], scalar or [B].

        Returns:
            natural log density, [B].
        """
        _, log_joint, _ = self._components(latents, sigma)
        return log_joint.logsumexp(1)

    def velocity(self, latents: Tensor, sigma: float | Tensor) -> Tensor:
        """E[noise - data | x_sigma = latents].

        Args:
            latents: points, [B, ...] with D elements per row.
            sigma: noise level in [0, 1], scalar or [B].

        Returns:
            velocity, shape of `latents`, in the wider of its dtype and the means'.
        """
        offsets, log_joint, sigma = self._components(latents, sigma)
        posterior = log_joint.softmax(1)
        gain = (sigma - (1 - sigma) * self.std**2) / self._variance(sigma)
        velocity = gain * (posterior[:, :, None] * offsets).sum(1) - posterior @ self.means.to(posterior.dtype)
        return velocity.reshape(latents.shape)

    def guided_velocity(
        self, latents: Tensor, sigma: float | Tensor, components: Sequence[int], guidance_scale: float
    ) -> Tensor:
        """Classifier-free guidance: unconditional + guidance_scale * (conditional - unconditional).

        Args:
            latents: points, [B, ...] with D elements per row.
            sigma: noise level in [0, 1], scalar or [B].
            components: the condition, indices in [0, K).
            guidance_scale: 1 gives the conditional velocity, 0 the unconditional one.

        Returns:
            velocity, shape of `latents`.
        """
        unconditional = self.velocity(latents, sigma)
        conditional = self.condition(components).velocity(latents, sigma)
        return unconditional + guidance_scale * (conditional - unconditional)

    def sample_data(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw from the data distribution.

        Args:
            count: number of points.
            generator: source of randomness; default: torch's global one.

        Returns:
            points, [count, D].
        """
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(
            count, self.means.shape[1], dtype=self.means.dtype, device=self.means.device, generator=generator
        )
        return self.means[component] + self.std * noise

    def _variance(self, sigma: Tensor) -> Tensor:
        return (1 - sigma) ** 2 * self.std**2 + sigma**2

    def _components(self, latents: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets x - (1-sigma) m_k [B, K, D], log joint density of x and k [B, K], sigma as a column."""
        dtype = torch.promote_types(latents.dtype, self.means.dtype)
        points = latents.reshape(latents.shape[0], -1).to(dtype)
        dimension = self.means.shape[1]
        if points.shape[1] != dimension:
            raise ValueError(f"latents must have {dimension} elements per row, got shape {list(latents.shape)}")
        sigma = torch.as_tensor(sigma, dtype=dtype, device=latents.device).reshape(-1, 1)
        offsets = points[:, None, :] - (1 - sigma)[:, :, None] * self.means.to(dtype)
        variance = self._variance(sigma)
        log_norm = 0.5 * dimension * (2 * torch.pi * variance).log()
        log_joint = self.weights.to(dtype).log() - offsets.square().sum(2) / (2 * variance) - log_norm
        return offsets, log_joint, sigma
