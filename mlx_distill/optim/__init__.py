"""Memory-efficient optimizers, each an ``mlx.optimizers.Optimizer`` that works in any loop, and learning-rate
schedules.
"""

from __future__ import annotations

from mlx_distill.optim.adamw import AdamW as AdamW
from mlx_distill.optim.apollo import APOLLO as APOLLO
from mlx_distill.optim.apollo import APOLLOMini as APOLLOMini
from mlx_distill.optim.base import ProjectedGradient as ProjectedGradient
from mlx_distill.optim.base import by_modules as by_modules
from mlx_distill.optim.base import is_projected as is_projected
from mlx_distill.optim.base import state_bytes as state_bytes
from mlx_distill.optim.factory import make_optimizer as make_optimizer
from mlx_distill.optim.galore import GaLoreAdamW as GaLoreAdamW
from mlx_distill.optim.schedules import SCHEDULES as SCHEDULES
from mlx_distill.optim.schedules import make_schedule as make_schedule
