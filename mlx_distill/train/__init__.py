"""One training loop for all stages: the objective is what it minimizes, the batch source what it reads."""

from __future__ import annotations

from mlx_distill.train.batches import BatchSource as BatchSource
from mlx_distill.train.batches import RowBatches as RowBatches
from mlx_distill.train.checkpoint import load_weights as load_weights
from mlx_distill.train.events import Hook as Hook
from mlx_distill.train.loop import TrainResult as TrainResult
from mlx_distill.train.loop import total_steps as total_steps
from mlx_distill.train.loop import train as train
from mlx_distill.train.objective import Objective as Objective
from mlx_distill.train.objective import sft as sft
from mlx_distill.train.profiling import Profile as Profile
from mlx_distill.train.trainable import make_trainable as make_trainable
