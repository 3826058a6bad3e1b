"""Analysis of trained connections, and of how runs compare while they train.

Doors: `coefficients.analyze_coefficients`, `similarity.analyze_similarity`, `gradients.analyze_gradients`,
`losses.analyze_losses`, `page.write_page`.

* `source`: the run or checkpoint, and the recipe of its model
* `sub_layers`: the sub-layers of a model, connected or plain
* `observed`: what sub-layers see of validation data, on all ranks of any layout
* `coefficients`, `similarity`, `gradients`, `losses`: the measures, as JSON's values
* `figures`, `page`: PNGs, and one HTML page of all that a folder holds
"""

import megatron_fc.megatron  # noqa: F401  refuses a megatron-core that is missing or too old
