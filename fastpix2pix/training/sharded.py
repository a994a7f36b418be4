"""Adam of a network that several ranks train: each updates its share of the weights.

A network's weights lie in one flat buffer for each of their types, its gradients in another, and rank r owns
the r-th of ``size`` equal slices. In a step the ranks' gradients are summed slice by slice where the owner is
(reduce-scatter), the owner updates its slice, and all get the new weights (all-gather): together the bytes of
one all-reduce, while Adam's masters, moments and traffic are divided by the number of ranks.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastpix2pix.kernels.reference import compute_dtype
from fastpix2pix.training.distributed import Exchange, Wait
from fastpix2pix.training.optim import MasterAdam

ALIGNMENT = 64
"""Elements at whose multiples every weight and every share begins: 128 bytes in 16 bits, more than cuDNN and
16-byte vectors ask of an address."""


class _Place(NamedTuple):
    """Where a parameter lies: its number in the network, and its first element in the flat buffer."""

    number: int
    parameter: Parameter
    start: int

    def of(self, flat: Tensor) -> Tensor:
        """The parameter's elements in a buffer laid out like the weights, as a view of its shape."""
        return flat.as_strided(self.parameter.shape, self.parameter.stride(), self.start)


class _Flat:
    """The weights of one type in one buffer, of which this rank updates ``share``.

    weights, gradients: flat, in the type of the parameters, zero between them. share: this rank's slice of
    the weights, whose ``grad`` the sum of the ranks' gradients is written to.
    """

    def __init__(self, parameters: list[tuple[int, Parameter]], exchange: Exchange):
        first = parameters[0][1]
        self.places, end = [], 0
        for index, p in parameters:
            self.places.append(_Place(index, p, end))
            end += _rounded_up(p.numel(), ALIGNMENT)
        size = _rounded_up(end, ALIGNMENT * exchange.size)
        self.weights = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros_like(self.weights)
        with torch.no_grad():
            for place in self.places:
                mine = place.of(self.weights).copy_(place.parameter)
                place.parameter.data = mine
        length = size // exchange.size
        self.slice = slice(exchange.rank * length, (exchange.rank + 1) * length)
        self.share = Parameter(self.weights[self.slice])
        self.share.grad = torch.zeros_like(self.share)

    def like(self, dtype: torch.dtype) -> Tensor:
        """A buffer for all ranks' values of ``dtype``, laid out like the weights, zero everywhere."""
        return torch.zeros_like(self.weights, dtype=dtype)


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class ShardedAdam(MasterAdam):
    """``MasterAdam`` by the mean of all ranks' gradients: their weights stay equal bit for bit.

    parameters: of one network, the same in all ranks; they become views of one buffer. exchange: of all
    ranks. ``parameters``, ``masters``, ``state_dict`` and their inverses speak of whole networks and are the
    same for any number of ranks; all ranks call them together. ``param_groups`` holds the shares.

    A step, its exchanges apart from its work on the device, so that only the latter is captured: work
    ``pack``; exchange ``send_gradients``, and wait; with a loss scale work ``look``, exchange ``share_look``;
    work ``begin_step`` and ``step_share``; exchange ``send_weights``, and wait.
    """

    def __init__(self, parameters: Iterable[Parameter], *, exchange: Exchange, **adam: Any):
        self.exchange = exchange
        self._whole = list(parameters)
        kinds: dict[torch.dtype, list[tuple[int, Parameter]]] = {}
        for index, p in enumerate(self._whole):
            kinds.setdefault(p.dtype, []).append((index, p))
        self._flats = [_Flat(some, exchange) for some in kinds.values()]
        super().__init__([flat.share for flat in self._flats], **adam)

    # ------------------------------------------------------------------------------------ whole networks

    def parameters(self) -> Iterable[Parameter]:
        """All parameters of the network."""
        return self._whole

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the network's gradients."""
        for p in self._whole:
            p.grad = None

    def masters(self) -> list[Tensor]:
        """The float32 (or float64) weights of the network, gathered from all ranks."""
        return [state["master"] for state in self._gathered("master")]

    @torch.no_grad()
    def set_masters(self, values: Iterable[Tensor]) -> None:
        """Take rank 0's ``values``, in the order of ``parameters``, as masters and weights of all ranks."""
        values = list(values)
        shares = []
        for flat in self._flats:
            whole = flat.like(compute_dtype(flat.weights.dtype))
            for place in flat.places:
                place.of(whole).copy_(values[place.number])
            self.exchange.take_first(whole)
            shares.append(whole[flat.slice])
        super().set_masters(shares)
        self.gather_weights()

    def gather_weights(self) -> None:
        """Give all ranks the weights of every share."""
        for wait in self.send_weights():
            wait()

    def _gathered(self, *names: str) -> list[dict[str, Tensor]]:
        """The shares' states called ``names``, whole, for each parameter: copies."""
        states = super().state_dict()["state"]
        whole: list[dict[str, Tensor]] = [{} for _ in self._whole]
        for number, flat in enumerate(self._flats):
            for name in names:
                share = states[number][name].detach()
                everything = flat.like(share.dtype)
                self.exchange.gather(everything, share.contiguous())()
                for place in flat.places:
                    whole[place.number][name] = place.of(everything).clone()
        return whole

    def state_dict(self) -> dict[str, Any]:
        """As ``MasterAdam``'s of the whole network, gathered from all ranks: copies."""
        own = super().state_dict()
        whole: list[dict[str, Tensor]] = self._gathered("exp_avg", "exp_avg_sq", "master")
        step = own["state"][0]["step"]
        return {
            "state": {index: {"step": step, **state} for index, state in enumerate(whole)},
            "param_groups": [{**own["param_groups"][0], "params": list(range(len(whole)))}],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's share of a whole network's ``state_dict``, and all ranks' weights.

        Raises ValueError when it has other groups or shapes.
        """
        (group,), states = state_dict["param_groups"], state_dict["state"]
        if len(group["params"]) != len(self._whole):
            raise ValueError("the state's parameters are not those of this optimizer")
        shares = {}
        for number, flat in enumerate(self._flats):
            shares[number] = {"step": states[group["params"][0]]["step"]}
            for name in ("exp_avg", "exp_avg_sq", "master"):
                whole = flat.like(compute_dtype(flat.weights.dtype))
                for place in flat.places:
                    value = states[group["params"][place.number]][name]
                    if value.shape != place.parameter.shape:
                        raise ValueError(
                            f"the state's parameter {place.number} is {tuple(value.shape)}, this optimizer's "
                            f"is {tuple(place.parameter.shape)}"
                        )
                    place.of(whole).copy_(value)
                shares[number][name] = whole[flat.slice]
        own = {**group, "params": list(range(len(self._flats)))}
        super().load_state_dict({"state": shares, "param_groups": [own]})
        self.gather_weights()

    # ----------------------------------------------------------------------------------------- one step

    def buffers(self) -> list[Tensor]:
        """What a step writes before it reads: the gradients on their way."""
        return [tensor for flat in self._flats for tensor in (flat.gradients, flat.share.grad)]

    @torch.no_grad()
    def pack(self) -> None:
        """Put the network's gradients, divided by the number of ranks, into the buffers that are exchanged.

        Divided before they are summed, so that no sum of finite float16 gradients overflows.
        """
        for flat in self._flats:
            for place in flat.places:
                mine = place.of(flat.gradients)
                if place.parameter.grad is None:  # as that of a constant: the bottleneck's, normalised alone
                    mine.zero_()
                else:
                    torch.mul(place.parameter.grad, 1 / self.exchange.size, out=mine)
        self.zero_grad()

    def send_gradients(self) -> list[Wait]:
        """Start to sum each share's gradients at its rank."""
        return [self.exchange.scatter_sum(flat.gradients, flat.share.grad) for flat in self._flats]

    @torch.no_grad()
    def look(self) -> None:
        """With a loss scale: look for infinities and NaNs in the share's gradients."""
        super()._look_for_non_finite()

    def share_look(self) -> None:
        """Let all ranks know of those that one has found: all skip the step, or none does."""
        self.exchange.max_(self._found_inf)

    def _look_for_non_finite(self) -> None:
        """Nothing within ``begin_step``, when ``look`` and ``share_look`` are done."""

    def step_share(self) -> None:
        """Update the share from the gradients that have arrived, within the step of ``begin_step``."""
        self.step_parameters([flat.share for flat in self._flats])

    def send_weights(self) -> list[Wait]:
        """Start to give all ranks the weights of this one's share."""
        return [self.exchange.gather(flat.weights, flat.weights[flat.slice]) for flat in self._flats]


def exchanged_updates(optimizers: list[ShardedAdam]) -> Iterator[Wait]:
    """Update weights from packed gradients: a generator of what is exchanged between the parts of this work.

    One network's gradients travel while the share of the one before is updated, and its weights while the
    share of the next one is. With a loss scale all gradients must be known to be finite first.
    """
    arriving: dict[ShardedAdam, list[Wait]] = {}
    leaving: list[Wait] = []

    def exchange(updated: ShardedAdam | None, needed: list[ShardedAdam]) -> None:
        """Send gradients, or the weights that were ``updated``; wait for what comes next."""
        if updated is None:
            arriving.update({optimizer: optimizer.send_gradients() for optimizer in optimizers})
        else:
            leaving.extend(updated.send_weights())
        for optimizer in needed:
            for wait in arriving.pop(optimizer, ()):
                wait()
        while leaving and not needed:
            leaving.pop()()

    def share_looks() -> None:
        for optimizer in optimizers:
            optimizer.share_look()

    all_at_once = optimizers[0].loss_scale is not None
    yield partial(exchange, None, optimizers if all_at_once else optimizers[:1])
    if all_at_once:
        for optimizer in optimizers:
            optimizer.look()
        yield share_looks
    for optimizer, *following in (optimizers[index : index + 2] for index in range(len(optimizers))):
        optimizer.begin_step()
        optimizer.step_share()
        yield partial(exchange, optimizer, following)
