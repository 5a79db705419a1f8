"""Channels: which must go together (`trace`), and taking them out (`remove`)."""

from squeeze.rewrite.channels.prepare import Prepared, prepare
from squeeze.rewrite.channels.remove import axes_of, remove
from squeeze.rewrite.channels.trace import Family, Sink, Trace, trace

__all__ = [
    "Family",
    "Prepared",
    "Sink",
    "Trace",
    "axes_of",
    "prepare",
    "remove",
    "trace",
]
