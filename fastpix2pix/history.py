"""The losses of a run and the balance of its players, as TensorBoard's event files hold them."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event

HEALTH_TAG = "gan_health/text_summary"  # TensorBoard's name for the text "gan_health"


@dataclass
class History:
    """What TensorBoard's event files say: per tag the steps (increasing) and values, and the last health."""

    steps: dict[str, list[int]] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)
    health: str = ""

    def add(self, tag: str, step: int, value: float) -> None:
        """Append a point; a step reached for the second time, in a continued run, replaces what followed."""
        steps, values = self.steps.setdefault(tag, []), self.values.setdefault(tag, [])
        while steps and steps[-1] >= step:
            steps.pop()
            values.pop()
        steps.append(step)
        values.append(value)

    def last(self, tag: str) -> float | None:
        return self.values[tag][-1] if tag in self.values else None


def read_history(events: Path) -> History:
    """Scalars and GAN health of all event files in ``events``, oldest file first.

    TensorBoard's own reader checks every record's CRC in Python, which takes several times as long for the
    hundreds of thousands of points of a run.
    """
    history = History()
    for path in sorted(events.glob("events.out.tfevents.*"), key=lambda path: path.name):
        for record in _records(path):
            event = Event.FromString(record)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    history.add(value.tag, event.step, value.simple_value)
                elif value.tag == HEALTH_TAG:
                    history.health = value.tensor.string_val[0].decode("utf-8", "replace")
    return history


def _records(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: length (uint64), CRC (4 bytes), the record, CRC (4 bytes).

    A last record that is still being written is left out.
    """
    content = path.read_bytes()
    start = 12
    while start <= len(content):
        (length,) = struct.unpack_from("<Q", content, start - 12)
        if start + length + 4 > len(content):
            return
        yield content[start : start + length]
        start += length + 16
