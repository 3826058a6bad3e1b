"""`python -m megatron_fc`, which launchers such as torchrun use."""

import sys

from megatron_fc.cli.main import main

sys.exit(main())
