"""The bytes that one rank sends for one collective, by the ring algorithm: shared by the model and the counter.

NCCL and gloo send what the ring algorithm sends whenever messages are large, which is where bytes cost time; trees
send as much in all, unevenly over the ranks.
"""


def ring_all_gather_bytes(whole_bytes: int, ranks: int) -> int:
    """Bytes that a rank sends to its next one: of the gathered whole, all parts but the next rank's own.

    All parts are of one size here. Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms", 2009.
    """
    return whole_bytes * (ranks - 1) // ranks


def ring_reduce_scatter_bytes(whole_bytes: int, ranks: int) -> int:
    """Bytes that a rank sends to its next one: of the whole before reduction, all parts but the one that it keeps."""
    return whole_bytes * (ranks - 1) // ranks


def ring_all_reduce_bytes(whole_bytes: int, ranks: int) -> int:
    """Bytes that a rank sends to its next one: a reduce-scatter, then an all-gather."""
    return 2 * whole_bytes * (ranks - 1) // ranks
