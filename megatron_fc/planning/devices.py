"""GPUs by their data sheets: dense peaks, memory, links."""

from dataclasses import dataclass

from megatron_fc.errors import UserError
from megatron_fc.planning.shape import Products


@dataclass(frozen=True)
class Device:
    """One GPU and the machine that it usually comes in.

    Attributes:
        name: as people say it.
        family: of GPUs that reach like shares of their peaks; names constants in `calibration`.
        bf16_tflops, fp8_tflops, fp4_tflops: dense peaks, 1e12 FLOP/s; data sheets print twice as much, with sparsity,
            where they do not say dense. None: the GPU cannot.
        exponentials: 1e12 per second, of the special function units: 16 per clock and multiprocessor, 32 of Blackwell
            Ultra; a softmax waits for them where heads are narrow.
        hbm_gib: memory. Data sheets write GB for what CUDA reports, within two per cent, in GiB.
        hbm_gb_per_second: of that memory, 1e9 bytes per second.
        nvlink_gb_per_second: that one GPU sends; data sheets add what it receives and print twice as much.
        nvlink_domain: GPUs that NVLink joins.
        network_gb_per_second: that one GPU sends to other domains, by the adapters of the usual machine.
        gpus_per_node: of the usual machine.
        capability: CUDA's compute capability.
        source: data sheets.
    """

    name: str
    family: str
    bf16_tflops: float
    fp8_tflops: float | None
    fp4_tflops: float | None
    exponentials: float
    hbm_gib: float
    hbm_gb_per_second: float
    nvlink_gb_per_second: float
    nvlink_domain: int
    network_gb_per_second: float
    gpus_per_node: int
    capability: tuple[int, int]
    source: str

    @property
    def hbm_bytes(self) -> float:
        return self.hbm_gib * 2**30

    def tflops(self, products: Products) -> float:
        """Dense peak of matrix products.

        Raises:
            UserError: a precision that the GPU does not have.
        """
        peak = {"half": self.bf16_tflops, "fp8": self.fp8_tflops, "fp4": self.fp4_tflops}[products]
        if peak is None:
            name = products.upper()
            raise UserError(f"{products}_format is set and {self.name} has no {name}: drop it, or choose another GPU")
        return peak


# One adapter of 200 Gb/s per GPU in DGX A100, of 800 Gb/s with B300 and GB300, of 400 Gb/s in the others.
DEVICES = {
    "a100": Device(
        "A100 80GB SXM", "hopper", 312, None, None, 2.4, 80, 2039, 300, 8, 25, 8, (8, 0),
        "NVIDIA A100 Tensor Core GPU data sheet; DGX A100 data sheet",
    ),
    "h100": Device(
        "H100 SXM", "hopper", 989.5, 1979, None, 3.9, 80, 3350, 450, 8, 50, 8, (9, 0),
        "NVIDIA H100 Tensor Core GPU data sheet; DGX H100 data sheet",
    ),
    "h200": Device(
        "H200 SXM", "hopper", 989.5, 1979, None, 3.9, 141, 4800, 450, 8, 50, 8, (9, 0),
        "NVIDIA H200 Tensor Core GPU data sheet; DGX H200 data sheet",
    ),
    "b200": Device(
        "B200", "blackwell", 2250, 4500, 9000, 4.4, 180, 8000, 900, 8, 50, 8, (10, 0),
        "NVIDIA Blackwell architecture technical brief (HGX B200); DGX B200 data sheet",
    ),
    "gb200": Device(
        "GB200 NVL72", "blackwell", 2500, 5000, 10000, 4.7, 186, 8000, 900, 72, 50, 4, (10, 0),
        "NVIDIA GB200 NVL72 data sheet",
    ),
    "b300": Device(
        "B300", "blackwell ultra", 2250, 4500, 13500, 8.8, 268, 8000, 900, 8, 100, 8, (10, 3),
        "NVIDIA Blackwell Ultra data sheet (HGX B300); DGX B300 data sheet",
    ),
    "gb300": Device(
        "GB300 NVL72", "blackwell ultra", 2500, 5000, 15000, 9.4, 277, 8000, 900, 72, 100, 4, (10, 3),
        "NVIDIA GB300 NVL72 data sheet",
    ),
}  # fmt: skip


def device(name: str) -> Device:
    """Look a GPU up.

    Raises:
        UserError: it is not in the table; lists those that are.
    """
    try:
        return DEVICES[name.lower()]
    except KeyError:
        raise UserError(f"gpu={name} is not known: choose one of {', '.join(DEVICES)}") from None
