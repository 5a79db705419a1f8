"""onnxruntime sessions, as `squeeze.session` makes them."""

from __future__ import annotations

from squeeze.session import Session as Session
from squeeze.session import create as create
