"""Executes GPU machine code (PTX) on the CPU, and says what is wrong with it. See the README beside this file."""

from tests.ptxsim.counting import Counts
from tests.ptxsim.faults import Fault, Unsupported
from tests.ptxsim.machine import Kernel

__all__ = ["Counts", "Fault", "Kernel", "Unsupported"]
