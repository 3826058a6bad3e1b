"""The table of GPUs, as far as its numbers must agree with one another."""

from megatron_fc.planning.devices import DEVICES


def test_fp8_doubles_the_peak_of_bf16() -> None:
    for device in DEVICES.values():
        assert device.fp8_tflops == (2 * device.bf16_tflops if device.capability >= (8, 9) else None)


def test_gpus_of_one_die_compute_alike() -> None:
    h100, h200 = DEVICES["h100"], DEVICES["h200"]
    assert (h100.bf16_tflops, h100.nvlink_gb_per_second) == (h200.bf16_tflops, h200.nvlink_gb_per_second)
    assert h100.hbm_gib < h200.hbm_gib
