"""DP-SGD in PyTorch, in every form that is worth trying; `FORMS` has them by name.

All compute the same: per image, the gradient of the mean loss over its noise draws, clipped; the sum over
images; noise; Adam. They differ in how they come by the images' gradients. The draws of an image are rows of
a batch that follow each other.
"""

from collections.abc import Callable

import numpy as np
from opacus.grad_sample import GradSampleModule, register_grad_sampler, register_norm_sampler
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
import torch
from torch import nn
from torch.nn import functional

from scripts.compare import pytorch_port as port

# Opacus divides by the norm plus this; the forms without it do the same.
_SMALL = 1e-6


class PrivateStep:
    """One DP-SGD step; forms differ in `_add`.

    Args:
        network: of `pytorch_port`; it is trained.
        draws: noise draws of an image.
        clip_norm: C.
        noise_multiplier: σ; noise has standard deviation σ C.
        expected_batch_size: q N, the divisor of the noisy sum.
        learning_rate: of Adam.
        kind: of denoiser.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        draws: int,
        clip_norm: float,
        noise_multiplier: float,
        expected_batch_size: float,
        learning_rate: float,
        kind: str = 'edm',
    ):
        self.network, self.draws, self.kind = network, draws, kind
        self.clip_norm, self.noise_multiplier = clip_norm, noise_multiplier
        self.expected_batch_size = expected_batch_size
        self.adam = torch.optim.Adam(network.parameters(), lr=learning_rate)
        self.norms = []  # of the last batch, a tensor for each part of it
        self._prepare()

    def step(self, rows: tuple, images_at_once: int, finish: bool = True) -> torch.Tensor:
        """Add the clipped gradients of all images; then noise and Adam.

        Args:
            rows: arguments of `pytorch_port.losses`.
            images_at_once: whose gradients exist at once.
            finish: False to leave noise and Adam to a later call.

        Returns:
            the images' mean loss, ().
        """
        parts = list(zip(*(array.split(images_at_once * self.draws) for array in rows)))
        self.norms, total = [], 0.0
        for number, part in enumerate(parts, start=1):
            total = total + self._add(part, finish and number == len(parts)).detach().sum()
        return total / (len(rows[0]) // self.draws)

    def clipped_sum(self) -> dict[str, np.ndarray]:
        """What steps without `finish` have added up, by the network's names."""
        names = [name for name, _ in self.network.named_parameters()]
        return {name: total.cpu().numpy() for name, total in zip(names, self._sums(), strict=True)}

    def _losses(self, rows: tuple) -> torch.Tensor:
        """The images' losses, (images,)."""
        return port.losses(self.module, *rows, kind=self.kind).reshape(-1, self.draws).mean(1)

    def _prepare(self) -> None:
        raise NotImplementedError

    def _add(self, rows: tuple, is_last: bool) -> torch.Tensor:
        """Add an image's or several images' clipped gradients; after the last, noise and Adam."""
        raise NotImplementedError

    def _sums(self) -> list[torch.Tensor]:
        raise NotImplementedError


class _OwnNoise(PrivateStep):
    """Forms without Opacus: they sum, add noise and call Adam themselves."""

    def _prepare(self) -> None:
        self.module = self.network
        self._total = None

    def _accumulate(self, gradients: list[torch.Tensor]) -> None:
        if self._total is None:
            self._total = [gradient.clone() for gradient in gradients]
        else:
            torch._foreach_add_(self._total, gradients)

    def _sums(self) -> list[torch.Tensor]:
        return self._total

    @torch.no_grad()
    def _finish(self) -> None:
        std = self.noise_multiplier * self.clip_norm
        for parameter, total in zip(self.network.parameters(), self._total, strict=True):
            parameter.grad = (total + std * torch.randn_like(total)) / self.expected_batch_size
        self.adam.step()
        self._total = None


class Loop(_OwnNoise):
    """One image after the other: its draws are a batch, and its gradient an ordinary one."""

    def _add(self, rows: tuple, is_last: bool) -> torch.Tensor:
        found = []
        for row in zip(*(array.split(self.draws) for array in rows)):
            self.network.zero_grad(set_to_none=True)
            loss = self._losses(row)
            loss.backward()
            parameters = list(self.network.parameters())
            # PyTorch's own clipping: the factor is min(1, C / (norm + 1e-6)).
            self.norms.append(nn.utils.clip_grad_norm_(parameters, self.clip_norm)[None])
            self._accumulate([parameter.grad for parameter in parameters])
            found.append(loss.detach())
        if is_last:
            self._finish()
        return torch.cat(found)


class CompiledLoop(Loop):
    """The same, with the network compiled."""

    def _prepare(self) -> None:
        super()._prepare()
        self.module = torch.compile(self.network, dynamic=False)


class Functorch(_OwnNoise):
    """`torch.func`: vmap over images of the gradient of an image's loss."""

    def _prepare(self) -> None:
        super()._prepare()
        self._gradients = self._make()

    def _make(self) -> Callable:
        def loss(parameters, *row):
            network = lambda *inputs: torch.func.functional_call(self.network, parameters, inputs)
            value = port.losses(network, *row, kind=self.kind).mean()
            return value, value

        return torch.func.vmap(torch.func.grad(loss, has_aux=True), in_dims=(None, 0, 0, 0, 0))

    def _add(self, rows: tuple, is_last: bool) -> torch.Tensor:
        rows = [array.reshape(-1, self.draws, *array.shape[1:]) for array in rows]
        parameters = {name: value.detach() for name, value in self.network.named_parameters()}
        gradients, values = self._gradients(parameters, *rows)
        gradients = [gradients[name] for name in parameters]
        squares = [gradient.flatten(1).square().sum(1) for gradient in gradients]
        norms = torch.stack(squares).sum(0).sqrt()
        factors = (self.clip_norm / (norms + _SMALL)).clamp(max=1)
        self.norms.append(norms)
        self._accumulate([torch.tensordot(factors, gradient, 1) for gradient in gradients])
        if is_last:
            self._finish()
        return values


class CompiledFunctorch(Functorch):
    """The same, compiled as a whole."""

    def _make(self) -> Callable:
        for module in self.network.modules():
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Upsample):  # which the compiler (2.13) does not know under vmap
                    setattr(module, name, _Double())
        return torch.compile(super()._make(), dynamic=False)


class _Double(nn.Module):
    """Every pixel twice in both directions, as `nn.Upsample` does it."""

    def forward(self, x):
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


class Hooks(PrivateStep):
    """Opacus's hooks, with layers that add up an image's draws where they compute its gradient."""

    are_draws_summed = True

    def _prepare(self) -> None:
        self.module = GradSampleModule(self.network, loss_reduction='sum')
        self._set_draws()
        self._optimizer = DPOptimizer(
            self.adam,
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.clip_norm,
            expected_batch_size=self.expected_batch_size,
        )

    def _set_draws(self) -> None:
        for layer in self.network.modules():
            layer.draws = self.draws if self.are_draws_summed else 1

    def _tell_batch_size(self, rows: tuple) -> None:
        """Opacus makes room for as many gradients as this; by itself, for one of each row."""
        if self.are_draws_summed:
            for layer in self.network.modules():
                layer.max_batch_len = len(rows[0]) // self.draws

    def _add(self, rows: tuple, is_last: bool) -> torch.Tensor:
        self._tell_batch_size(rows)
        values = self._losses(rows)
        values.sum().backward()
        if not self.are_draws_summed:
            for parameter in self.network.parameters():
                of_row = parameter.grad_sample
                parameter.grad_sample = of_row.reshape(-1, self.draws, *of_row.shape[1:]).sum(1)
        self._optimizer.signal_skip_step(do_skip=not is_last)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return values

    def gradients(self, rows: tuple) -> list[torch.Tensor]:
        """The images' gradients, (images, ...) of each parameter, without a step."""
        self._tell_batch_size(rows)
        self._losses(rows).sum().backward()
        found = [parameter.grad_sample for parameter in self.network.parameters()]
        self._optimizer.zero_grad()
        return found

    def _sums(self) -> list[torch.Tensor]:
        return [parameter.summed_grad for parameter in self.network.parameters()]


class HooksOfRows(Hooks):
    """Opacus's hooks as they come: a gradient for every noised image, averaged over an image's draws.

    Most code on noise draws with Opacus is written so.
    """

    are_draws_summed = False


class Ghost(Hooks):
    """Opacus's ghost and fast gradient clipping: norms in one backward pass, the clipped sum in a second."""

    def _prepare(self) -> None:
        self.module = GradSampleModuleFastGradientClipping(
            self.network, loss_reduction='sum', max_grad_norm=self.clip_norm, use_ghost_clipping=True
        )
        self._set_draws()
        self._optimizer = DPOptimizerFastGradientClipping(
            self.adam,
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.clip_norm,
            expected_batch_size=self.expected_batch_size,
        )

    def _add(self, rows: tuple, is_last: bool) -> torch.Tensor:
        self._tell_batch_size(rows)
        values = self._losses(rows)
        DPTensorFastGradientClipping(self.module, self._optimizer, values, loss_reduction='sum').backward()
        self.norms.append(self.module.per_sample_gradient_norms)
        self._optimizer.signal_skip_step(do_skip=not is_last)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return values


FORMS = {
    'Opacus, hooks as they come': HooksOfRows,
    'Opacus, hooks that sum draws': Hooks,
    'Opacus, ghost clipping': Ghost,
    'torch.func': Functorch,
    'torch.func, compiled': CompiledFunctorch,
    'loop over images': Loop,
    'loop over images, compiled': CompiledLoop,
}


def _register(layer_type: type, function: Callable) -> None:
    """Let a layer's gradients be those of images where `layer.draws` is above 1, and Opacus's elsewhere.

    Opacus's `unfold2d` (1.6) reads channels-last activations through strides of contiguous ones: the
    gradients are wrong, and no error says so. Hence `contiguous`.
    """
    shipped = GradSampleModule.GRAD_SAMPLERS[layer_type]

    def of_images(layer, activations, backprops):
        draws = getattr(layer, 'draws', 1)
        if draws == 1:
            return shipped(layer, [activations[0].contiguous()], backprops)
        inputs = activations[0]
        inputs = inputs.to(backprops.dtype) if inputs.is_floating_point() else inputs
        return function(layer, inputs, backprops, lambda array: array.reshape(-1, draws, *array.shape[1:]))

    register_grad_sampler(layer_type)(of_images)


def _convolution(layer, inputs, outputs, by_image):
    patches = functional.unfold(inputs.contiguous(), layer.kernel_size, padding=layer.padding)
    outputs = by_image(outputs.flatten(2))
    weight = torch.einsum('ndop,ndip->noi', outputs, by_image(patches))
    return {
        layer.weight: weight.reshape(-1, *layer.weight.shape),
        layer.bias: outputs.sum((1, 3)),
    }


def _linear(layer, inputs, outputs, by_image):
    inputs, outputs = by_image(inputs), by_image(outputs)
    return {
        layer.weight: torch.einsum('n...o,n...i->noi', outputs, inputs),
        layer.bias: outputs.flatten(1, -2).sum(1),
    }


def _group_norm(layer, inputs, outputs, by_image):
    normal = functional.group_norm(inputs, layer.num_groups, eps=layer.eps)
    return {
        layer.weight: by_image((normal * outputs).sum((2, 3))).sum(1),
        layer.bias: by_image(outputs.sum((2, 3))).sum(1),
    }


def _embedding(layer, inputs, outputs, by_image):
    rows = functional.one_hot(by_image(inputs), layer.num_embeddings).to(outputs.dtype)
    return {layer.weight: torch.einsum('ndc,ndw->ncw', rows, by_image(outputs))}


_register(nn.Conv2d, _convolution)
_register(nn.Linear, _linear)
_register(nn.GroupNorm, _group_norm)
_register(nn.Embedding, _embedding)


def _register_norm(layer_type: type) -> None:
    """Let a layer's draws be one more axis of the inputs, as pixels are: norms are then those of images."""
    shipped = GradSampleModuleFastGradientClipping.NORM_SAMPLERS[layer_type]

    def of_images(layer, activations, backprops):
        draws = getattr(layer, 'draws', 1)
        inputs = activations[0]
        if draws > 1:
            inputs = inputs.reshape(-1, draws * (inputs[0].numel() // _last(inputs)), *_end(inputs))
            backprops = backprops.reshape(len(inputs), -1, backprops.shape[-1])
        return shipped(layer, [inputs], backprops)

    register_norm_sampler(layer_type)(of_images)


def _last(inputs: torch.Tensor) -> int:
    return inputs.shape[-1] if inputs.is_floating_point() else 1


def _end(inputs: torch.Tensor) -> tuple:
    return inputs.shape[-1:] if inputs.is_floating_point() else ()


_register_norm(nn.Linear)
_register_norm(nn.Embedding)
