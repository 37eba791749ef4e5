"""The device step of the certificate, run where the file will run: on this machine, under emulation, on a board over ssh.

    machine    what the machine says of itself, and whether the file can be run there
    place      where programs are run and files are put: here, or under qemu
    ssh        the same on a board
    program    which llama-perplexity runs there
    step       the step itself: scoring, speed, memory, temperature

What comes out are the tool's logs and numbers; `parity.board` judges the logs.
"""

from edgeft.boards.machine import Machine
from edgeft.boards.place import Here, Place
from edgeft.boards.program import Program, program_for
from edgeft.boards.ssh import Ssh
from edgeft.boards.step import Measured, Shipped, measure

__all__ = ["Here", "Machine", "Measured", "Place", "Program", "Shipped", "Ssh", "measure", "program_for"]
