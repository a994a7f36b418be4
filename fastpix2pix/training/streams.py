"""A second stream of the GPU, for work that runs beside the backward pass and that nothing in it waits for.

Adam and the fused weight gradients keep the memory busy with thousands of programs; the layers between which
they become possible have 2 to 64. On a second stream the first fill what the second leave idle. A captured
step has both streams in its graph. On a CPU the same code runs in order.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class SideStream:
    """Work forked off the current stream of ``device``, in order among itself, until it is joined again.

    What is forked starts after everything that the current stream had been given by then, and ends before
    anything that it is given after ``join``. So a weight may be written there once its last reader has been
    enqueued, and read again after the join.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._kept: list[Tensor] = []
        self._forked = False

    def fork(self, work: Callable[[], None], uses: Iterable[Tensor]) -> None:
        """Call ``work``, which enqueues operations, on the side stream.

        uses: every tensor it reads or writes that may be freed before ``join``. They are kept until then: the
        allocator would give their memory to the current stream's next operation, which does not wait for this
        one. What ``work`` allocates belongs to the side stream and needs no such care.
        """
        if self._stream is None:
            work()
            return
        self._kept += uses
        self._forked = True
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            work()

    def join(self) -> None:
        """Let the current stream wait for all that was forked since the last time."""
        # In a capture, a stream that nothing was forked to is no part of it and can't be waited for.
        if self._forked:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self.abandon()

    def abandon(self) -> None:
        """Forget what was forked, by a step that does not get to its end."""
        self._kept.clear()
        self._forked = False
