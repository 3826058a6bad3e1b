"""`python -m megatron_fc`, which launchers such as torchrun use."""

from megatron_fc.cli.main import main
from megatron_fc.resilience.exit_codes import end_with

end_with(main)
