"""llama.cpp compiled for the device: which runtime a target gets, how it is made, and the proof that a file is for it."""

from edgeft.runtimes.elf import Elf, check_elf, read_elf
from edgeft.runtimes.isa import Isa
from edgeft.runtimes.needs import Needs, read_needs
from edgeft.runtimes.runtime import Runtime, available, for_device

__all__ = ["Elf", "Isa", "Needs", "Runtime", "available", "check_elf", "for_device", "read_elf", "read_needs"]
