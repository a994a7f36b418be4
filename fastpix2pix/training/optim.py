"""Adam that keeps fp32 masters and writes the working weights in the same pass; dynamic loss scaling."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from fastpix2pix.kernels import adam, deep_update
from fastpix2pix.kernels.adam import AdamClock, AdamForm, AdamTensors, Tick
from fastpix2pix.kernels.launch import use_triton
from fastpix2pix.kernels.reference import compute_dtype, join_master, split_master
from fastpix2pix.presets import PRESETS

TUTORIAL = PRESETS["tutorial"].update

_KEPT = ("step", "exp_avg", "exp_avg_sq")  # of a parameter's state, as they are in a state_dict


class LossScale:
    """Dynamic loss scale of fp16 training, kept on the device: the rule of ``torch.amp.GradScaler``.

    One object serves all optimizers of a step. Losses are multiplied by ``scale`` before the backward pass;
    every ``MasterAdam`` made with it divides its gradients by ``scale``, and when one of *its* gradients is
    not finite it leaves all of *its* parameters, moments and its step count as they were. An overflow in
    the discriminator's gradients alone therefore skips the discriminator's update and not the generator's,
    and the other way round; either halves the scale for both in ``update``, which ends the step:
    ``growth_interval`` steps in a row without an overflow double it.

    scale: float32 scalar. growth_tracker: int32 scalar, good steps since the scale last changed. found_inf:
    float32 scalar, non-zero when any optimizer of the step under way met a non-finite gradient.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        initial: float = 2.0**16,
        growth: float = 2.0,
        backoff: float = 0.5,
        growth_interval: int = 2000,
    ):
        self.scale = torch.full((), initial, dtype=torch.float32, device=device)
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        self._rule = (growth, backoff, growth_interval)
        self._flags = [self.found_inf]

    def flag(self) -> Tensor:
        """A ``found_inf`` of an optimizer's own, float32 scalar, which each ``update`` sets to zero."""
        self._flags.append(torch.zeros_like(self.found_inf))
        return self._flags[-1]

    def update(self) -> None:
        """Set the scale for the next step, after every optimizer has taken (or skipped) this one."""
        torch._amp_update_scale_(self.scale, self.growth_tracker, self.found_inf, *self._rule)
        self.forget()

    def forget(self) -> None:
        """Forget what was found to be not finite, also by a step that does not get to its end."""
        torch._foreach_zero_(self._flags)

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "growth_tracker": self.growth_tracker}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy ``state`` into the tensors that captured work already reads."""
        self.scale.copy_(state["scale"])
        self.growth_tracker.copy_(state["growth_tracker"])


class MasterAdam(Optimizer):
    """Adam (Kingma & Ba, 2015) whose state is fp32 whatever the type of the parameters.

    params: an iterable of dense parameters (or of dictionaries, as for any torch optimizer), all on one
    device. float32 and float64 parameters are their own masters. The master of a 16-bit parameter is the
    parameter and an int16 ``remainder`` where Triton's kernels update it (``reference.split_master``);
    elsewhere the state holds a float32 ``master``, and the parameter is the working copy that each update
    rewrites.
    keras_eps: where ``eps`` is added; see ``reference.adam_step`` for both forms. The defaults are those of
    the TensorFlow tutorial (Keras); torch's are ``eps=1e-8, keras_eps=False``.
    loss_scale: for fp16, the ``LossScale`` that multiplied the loss.

    ``step`` updates everything that has a gradient. To update parameters one at a time, as their gradients
    arrive, call ``begin_step`` once and then ``step_parameters`` as often as needed; the results are the same
    bit for bit. With a loss scale no parameter may move before all gradients are known finite: as gradients
    arrive, they can be looked at (``look_at``), and images of which one is a product can be kept for
    ``step_parameters`` (``keep_images``), whose float32 products are finite where they are
    (``kernels.deep_update``).

    The step can be captured in a CUDA graph: all state exists from the start and stays where it is, also
    when a state is loaded, and what changes from step to step is read from tensors. Only
    ``param_groups[i]["lr"]`` is a Python number, for learning-rate schedulers: ``begin_step`` copies it to
    the device when it has changed; before replaying a captured step call ``upload_lr``.

    Raises ValueError for parameters that are not dense, not floating, or spread over devices.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        eps: float = TUTORIAL.adam_eps,
        keras_eps: bool = TUTORIAL.keras_eps,
        *,
        loss_scale: LossScale | None = None,
    ):
        self.loss_scale = loss_scale
        self._clocks: list[AdamClock] = []
        self._uploaded_lr: list[float | None] = []
        self._group_of: dict[Parameter, int] = {}
        self._found_inf = None if loss_scale is None else loss_scale.flag()
        self._looked_at: set[Parameter] = set()
        self._images: dict[Parameter, tuple[Tensor, Tensor]] = {}
        self.updates = 0
        """Calls that updated parameters: whether a step that failed had moved a weight."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "keras_eps": keras_eps})

    # ------------------------------------------------------------------------------------------- state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        parameters = self.param_groups[-1]["params"]
        device = self.param_groups[0]["params"][0].device
        clock = AdamClock.create(device)
        for p in parameters:
            if not p.is_floating_point() or p.device != device or not _same_layout(torch.empty_like(p), p):
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)}, {p.dtype} on {p.device} cannot be optimised: "
                    f"all must be floating, dense and on one device ({device})"
                )
            self._group_of[p] = len(self._clocks)
            dtype = compute_dtype(p.dtype)
            state = self.state[p]
            state["step"] = clock.step
            state["exp_avg"] = torch.zeros_like(p, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype)
            if p.dtype in (torch.bfloat16, torch.float16) and use_triton(p):
                state["remainder"] = torch.zeros_like(p, dtype=torch.int16)
            elif p.dtype != dtype:
                state["master"] = p.detach().to(dtype)
        self._clocks.append(clock)
        self._uploaded_lr.append(None)
        self.upload_lr()

    def parameters(self) -> Iterable[Parameter]:
        """All parameters of all groups."""
        return self._group_of.keys()

    def tensors(self) -> list[Tensor]:
        """Every tensor that a step may write, the parameters themselves excepted."""
        own = [tensor for clock in self._clocks for tensor in clock]
        for state in self.state.values():
            own += [tensor for name, tensor in state.items() if name != "step"]  # the step is a clock's
        return own if self._found_inf is None else [*own, self._found_inf]

    def _master(self, p: Parameter) -> Tensor:
        state = self.state[p]
        if "remainder" in state:
            return join_master(p.detach(), state["remainder"])
        return state.get("master", p.detach())

    def _set_master(self, p: Parameter, value: Tensor) -> None:
        """Copy ``value`` to the master of ``p``, and rounded to ``p``."""
        state = self.state[p]
        if "remainder" in state:
            working, remainder = split_master(value.to(p.device, torch.float32), p.dtype)
            state["remainder"].copy_(remainder)
            p.copy_(working)
            return
        if "master" in state:
            state["master"].copy_(value)
        p.copy_(state.get("master", value))

    def masters(self) -> list[Tensor]:
        """The float32 (or float64) weights, in the order of ``parameters``: copies where they are split."""
        return [self._master(p) for p in self._group_of]

    @torch.no_grad()
    def set_masters(self, values: Iterable[Tensor]) -> None:
        """Copy ``values``, in the order of ``parameters``, to the masters, and rounded to the parameters."""
        for p, value in zip(self._group_of, values, strict=True):
            self._set_master(p, value)

    @torch.no_grad()
    def adopt_parameters(self) -> None:
        """Take the masters from the parameters: call it when something else has written those.

        Needed for 16-bit parameters only, after weights were loaded or initialised behind the optimizer's
        back.
        """
        for p, state in self.state.items():
            if "remainder" in state:
                state["remainder"].zero_()
            if "master" in state:
                state["master"].copy_(p)

    def state_dict(self) -> dict[str, Any]:
        """As any torch optimizer's; each parameter's state has ``step``, ``exp_avg``, ``exp_avg_sq`` and
        ``master``, the last three in float32 (float64 for float64), whatever the type of the parameters.

        The tensors are those of the optimizer, not copies, but for masters that are split.
        """
        packed = super().state_dict()
        for index, p in enumerate(self._group_of):
            kept = {name: self.state[p][name] for name in _KEPT}
            packed["state"][index] = {**kept, "master": self._master(p)}
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a ``state_dict`` into this optimizer's tensors *and parameters*, which are set to the masters.

        The state may come from parameters of another type or device. Raises ValueError when it has other
        groups or shapes, or is that of another kind of optimizer.
        """
        groups, states = state_dict["param_groups"], state_dict["state"]
        if [len(group["params"]) for group in groups] != [
            len(group["params"]) for group in self.param_groups
        ]:
            raise ValueError("the state's parameter groups are not those of this optimizer")
        indices = [index for group in groups for index in group["params"]]
        for index, p in zip(indices, self._group_of, strict=True):
            missing = {*_KEPT, "master"} - states[index].keys()
            if missing:
                raise ValueError(f"the state's parameter {index} has no {', '.join(sorted(missing))}")
            if states[index]["master"].shape != p.shape:
                raise ValueError(
                    f"the state's parameter {index} is {tuple(states[index]['master'].shape)}, "
                    f"this optimizer's is {tuple(p.shape)}"
                )
        for index, p in zip(indices, self._group_of, strict=True):
            for name in _KEPT:
                self.state[p][name].copy_(states[index][name])
            self._set_master(p, states[index]["master"])
        for group, loaded in zip(self.param_groups, groups, strict=True):
            group.update({name: deepcopy(value) for name, value in loaded.items() if name != "params"})
        self.upload_lr()

    # -------------------------------------------------------------------------------------------- step

    def upload_lr(self) -> None:
        """Copy the groups' learning rates to the device where they have changed since the last time."""
        for index, group in enumerate(self.param_groups[: len(self._clocks)]):
            if group["lr"] != self._uploaded_lr[index]:
                lr = self._clocks[index].lr
                if lr.is_cuda and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError("the learning rate would be frozen in the graph: upload_lr first")
                lr.fill_(group["lr"])
                self._uploaded_lr[index] = group["lr"]

    def begin_step(self) -> None:
        """Count a step. With a loss scale, look at gradients and images first: they must be there by now."""
        begin_steps([self])

    def _ticks(self) -> list[Tick]:
        """What begins with a step, once everything is there that it depends on."""
        self.upload_lr()
        if self.loss_scale is not None:
            self._look_for_non_finite()
        return [
            Tick(clock, _form(group), self._found_inf)
            for group, clock in zip(self.param_groups, self._clocks, strict=True)
        ]

    @torch.no_grad()
    def look_at(self, p: Parameter) -> None:
        """With a loss scale: look for infinities and NaNs in the gradient of ``p``, which is complete."""
        adam.mark_non_finite([_flat_grad(p, p.grad)], self._found_inf)
        self._looked_at.add(p)

    def keep_images(self, p: Parameter, small: Tensor, big: Tensor) -> None:
        """With a loss scale: the two images of which a deep layer's gradient is a product, until the step's
        ``step_parameters``. See ``kernels.deep_update``."""
        self._images[p] = small, big

    def _look_for_non_finite(self) -> None:
        """In everything that has not been looked at."""
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for p in self._group_of:
            if p.grad is not None and p not in self._looked_at:
                kinds.setdefault(p.grad.dtype, []).append(_flat_grad(p, p.grad))
        for images in self._images.values():
            for image in images:
                dense = image.contiguous(memory_format=torch.channels_last)
                kinds.setdefault(image.dtype, []).append(_flat(dense))
        for some in kinds.values():
            adam.mark_non_finite(some, self._found_inf)
        self._looked_at.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As any torch optimizer's; what a step had looked at or kept goes with the gradients."""
        super().zero_grad(set_to_none)
        self._looked_at.clear()
        self._images.clear()

    def _by_kind(self, parameters: Iterable[Parameter]) -> dict[tuple[int, torch.dtype], list[Parameter]]:
        """``parameters``, apart by group and type."""
        kinds: dict[tuple[int, torch.dtype], list[Parameter]] = {}
        for p in parameters:
            kinds.setdefault((self._group_of[p], p.dtype), []).append(p)
        return kinds

    @torch.no_grad()
    def step_parameters(self, parameters: Iterable[Parameter]) -> None:
        """Update ``parameters`` from their gradients, within the step that ``begin_step`` began; and those
        whose images were kept."""
        for (index, _), some in self._by_kind(parameters).items():
            self._update(index, some, [p.grad for p in some])
        for p, images in self._images.items():
            self.step_deep_weight(p, *images)
        self._images.clear()

    @torch.no_grad()
    def step_parameter(self, p: Parameter, grad: Tensor) -> None:
        """Update ``p`` from ``grad``, within the step that ``begin_step`` began."""
        self._update(self._group_of[p], [p], [grad])

    @torch.no_grad()
    def step_deep_weight(self, p: Parameter, small: Tensor, big: Tensor) -> None:
        """Update a deep layer's weight from the two images of which its gradient is a product, likewise.
        See ``kernels.deep_update``."""
        self.updates += 1
        index = self._group_of[p]
        deep_update.update(
            small,
            big,
            self._tensors(p),
            self._clocks[index],
            _form(self.param_groups[index]),
            self._grad_scale,
            self._found_inf,
        )

    def _update(self, group: int, parameters: list[Parameter], grads: list[Tensor]) -> None:
        self.updates += 1
        adam.update(
            [self._tensors(p) for p in parameters],
            [_flat_grad(p, grad) for p, grad in zip(parameters, grads, strict=True)],
            self._clocks[group],
            _form(self.param_groups[group]),
            self._grad_scale,
            self._found_inf,
        )

    @property
    def _grad_scale(self) -> Tensor | None:
        return None if self.loss_scale is None else self.loss_scale.scale

    def _tensors(self, p: Parameter) -> AdamTensors:
        """What an update of ``p`` reads and writes beside its gradient."""
        state, weight = self.state[p], _flat(p.detach())
        moments = _flat(state["exp_avg"]), _flat(state["exp_avg_sq"])
        if "remainder" in state:
            return AdamTensors(*moments, None, weight, _flat(state["remainder"]))
        if "master" in state:
            return AdamTensors(*moments, _flat(state["master"]), weight)
        return AdamTensors(*moments, weight)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient. Returns what ``closure`` returns, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.begin_step()
        self.step_parameters([p for p in self._group_of if p.grad is not None])
        return loss


@torch.no_grad()
def begin_steps(optimizers: Sequence[MasterAdam]) -> None:
    """``begin_step`` of each, on one device and with one loss scale, in one launch where it is a GPU."""
    (loss_scale,) = {optimizer.loss_scale for optimizer in optimizers}
    ticks = [tick for optimizer in optimizers for tick in optimizer._ticks()]
    adam.advance(*ticks, seen=None if loss_scale is None else loss_scale.found_inf)


def _form(group: dict[str, Any]) -> AdamForm:
    beta1, beta2 = group["betas"]
    return AdamForm(beta1, beta2, group["eps"], group["keras_eps"])


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether equal positions in memory hold the same element; strides along one element don't matter."""
    return all(m == n for m, n, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size > 1)


def _flat(dense: Tensor) -> Tensor:
    """All elements of a dense tensor as a vector, in the order of memory."""
    return dense.as_strided((dense.numel(),), (1,))


def _flat_grad(p: Parameter, grad: Tensor) -> Tensor:
    """The elements of ``grad`` in the order in which those of ``p`` lie in memory."""
    if not _same_layout(grad, p):
        grad = torch.empty_like(p, dtype=grad.dtype).copy_(grad)
    return _flat(grad)
