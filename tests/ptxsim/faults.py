"""What the simulator raises."""

from __future__ import annotations


class Fault(Exception):
    """The kernel did something that is wrong, or undefined, on a device."""


class Unsupported(Exception):
    """The program has something that the simulator does not know. Nothing is ever guessed."""
