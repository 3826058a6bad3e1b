"""`python -m megatron_fc.mpi COMMAND ...`: the same commands where MPI starts the processes and SLURM does not.

MPI carries the ranks and the address of the first one to all processes, and is left before training begins: the
training itself talks over NCCL or gloo as ever. `traffic run` alone keeps it, to gather what the ranks have counted.
"""

import os
import secrets
import socket
import sys
from contextlib import suppress

from megatron_fc.cli.main import main
from megatron_fc.errors import UserError


def free_port() -> int:
    """Return a port that nobody listens on, below those that Linux gives outgoing connections (from 32768 on).

    Seconds pass until the first rank listens, and any of these may be taken by then.
    """
    ports = list(range(10_000, 20_000))
    secrets.SystemRandom().shuffle(ports)
    for port in ports:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise UserError("ports 10000 to 19999 are all in use on this node: end what listens on them")


def join(*, stay: bool = False) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from MPI; every process calls it.

    With SHIFT=1 in the environment each rank of a node computes on its neighbour's GPU.

    Args:
        stay: MPI goes on, else it is left.

    Raises:
        UserError: mpi4py is not installed.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(
            f"MPI cannot be used, {error}: pip install 'megatron_fc[mpi]' and have an MPI library"
        ) from None
    world = MPI.COMM_WORLD
    here = world.Split_type(MPI.COMM_TYPE_SHARED)
    address, port = world.bcast((socket.gethostname(), free_port()), root=0)
    device = (here.Get_rank() + int(os.environ.get("SHIFT", "0"))) % here.Get_size()
    ranks = {"RANK": world.Get_rank(), "WORLD_SIZE": world.Get_size(), "LOCAL_RANK": device}
    os.environ.update({name: str(value) for name, value in (ranks | {"MASTER_PORT": port}).items()})
    os.environ.setdefault("MASTER_ADDR", address)
    here.Free()
    if not stay:
        MPI.Finalize()


if __name__ == "__main__":
    try:
        join(stay=sys.argv[1:3] == ["traffic", "run"])
    except UserError as error:
        print(f"megatron-fc: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(main())
