"""Recipes: one `ml_collections.ConfigDict` per training run, turned into frozen dataclasses at the door.

The dataclasses of `keys.py` hold every key and its default, once. A file in `configs/` sets what differs (`recipes.py`
holds what such files share), the command line the rest (`--config.optimizer.learning_rate=2e-4`). Nothing further in
sees a ConfigDict.
"""

from if_jax.config.keys import (
    ConditioningConfig,
    DataConfig,
    DistillConfig,
    GuardConfig,
    HostsConfig,
    LoraConfig,
    MeshConfig,
    NewWordsConfig,
    OptimizerConfig,
    PosthocEmaConfig,
    Recipe,
    SampleConfig,
    ValidationConfig,
)
from if_jax.config.parse import check_override, differences, for_compiling, recipe_to_dict, resumable, to_recipe
