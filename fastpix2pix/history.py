"""The losses of a run and the balance of its players, as TensorBoard's event files hold them."""

import logging
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

log = logging.getLogger(__name__)

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

    A record that is damaged is left out, and said. TensorBoard's own reader checks every record's CRC in
    Python, which takes several times as long for the hundreds of thousands of points of a run.
    """
    history = History()
    for path in sorted(events.glob("events.out.tfevents.*"), key=lambda path: path.name):
        if not path.is_file():  # opening a pipe would wait for ever
            continue
        damaged = 0
        for record in _records(path):
            try:
                _add_event(history, Event.FromString(record))
            except (DecodeError, ValueError):
                damaged += 1
        if damaged:
            log.warning(f"{path}: {damaged} damaged record{'s are' if damaged > 1 else ' is'} left out")
    return history


def _add_event(history: History, event: Event) -> None:
    """Raises ValueError for what no training writes."""
    for value in event.summary.value:
        if value.HasField("simple_value"):
            if not math.isfinite(value.simple_value) or event.step < 0:
                raise ValueError
            history.add(value.tag, event.step, value.simple_value)
        elif value.tag == HEALTH_TAG:
            (health,) = value.tensor.string_val
            history.health = health.decode("utf-8", "replace")


def _records(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: length (uint64), CRC (4 bytes), the record, CRC (4 bytes).

    A last record that is still being written is left out.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        log.warning(f"{path}: left out, for it can't be read ({error.strerror})")
        return
    start = 12
    while start <= len(content):
        length, crc = struct.unpack_from("<QI", content, start - 12)
        if start + length + 4 > len(content):
            if masked_crc32c(content[start - 12 : start - 4]) != crc:
                log.warning(f"{path}: damaged at byte {start - 12}; the rest of it is left out")
            return
        yield content[start : start + length]
        start += length + 16
