"""Fine-tune a teacher, distill it into a student with another tokenizer, quantize it, and prove that it is as
good.

The public names are imported when they are first used, so ``import mlx_distill`` is fast:

>>> import mlx_distill as md
>>> md.Message("user", "hello").role
'user'
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_distill.runtime import load_blas

if TYPE_CHECKING:
    from mlx_distill import doctor as doctor
    from mlx_distill import losses as losses
    from mlx_distill import metrics as metrics
    from mlx_distill import optim as optim
    from mlx_distill import progress as progress
    from mlx_distill import registry as registry
    from mlx_distill.comparisons import compare as compare
    from mlx_distill.errors import ConfigError as ConfigError
    from mlx_distill.errors import DataError as DataError
    from mlx_distill.errors import DistillError as DistillError
    from mlx_distill.errors import FileError as FileError
    from mlx_distill.errors import ModelError as ModelError
    from mlx_distill.errors import QualityGateError as QualityGateError
    from mlx_distill.exports import export as export
    from mlx_distill.infer.analyze import Analyzer as Analyzer
    from mlx_distill.infer.analyze import analyze as analyze
    from mlx_distill.infer.classify import classify as classify
    from mlx_distill.inspection import inspect as inspect
    from mlx_distill.models.convert import convert as convert
    from mlx_distill.models.load import load as load
    from mlx_distill.pipeline import run as run
    from mlx_distill.recipe import Recipe as Recipe
    from mlx_distill.recipe import load_recipe as load_recipe
    from mlx_distill.recipe import recipe_names as recipe_names
    from mlx_distill.records import Batch as Batch
    from mlx_distill.records import Classification as Classification
    from mlx_distill.records import Example as Example
    from mlx_distill.records import Message as Message
    from mlx_distill.records import Prediction as Prediction
    from mlx_distill.records import TopK as TopK
    from mlx_distill.tasks.task import Task as Task
    from mlx_distill.tasks.task import load_task as load_task
    from mlx_distill.validation import validate as validate

__version__ = "0.1.0"

# Public name -> module, or module:attribute.
_NAMES = {
    # functions
    "run": "pipeline:run",
    "load": "models.load:load",
    "convert": "models.convert:convert",
    "validate": "validation:validate",
    "analyze": "infer.analyze:analyze",
    "classify": "infer.classify:classify",
    "compare": "comparisons:compare",
    "export": "exports:export",
    "inspect": "inspection:inspect",
    "load_recipe": "recipe:load_recipe",
    "recipe_names": "recipe:recipe_names",
    "load_task": "tasks.task:load_task",
    # modules
    "losses": "losses",
    "optim": "optim",
    "metrics": "metrics",
    "doctor": "doctor",
    "progress": "progress",
    "registry": "registry",
    # classes
    "Analyzer": "infer.analyze:Analyzer",
    "Recipe": "recipe:Recipe",
    "Task": "tasks.task:Task",
    "Message": "records:Message",
    "Example": "records:Example",
    "Batch": "records:Batch",
    "TopK": "records:TopK",
    "Prediction": "records:Prediction",
    "Classification": "records:Classification",
    # errors
    "DistillError": "errors:DistillError",
    "ConfigError": "errors:ConfigError",
    "DataError": "errors:DataError",
    "ModelError": "errors:ModelError",
    "FileError": "errors:FileError",
    "QualityGateError": "errors:QualityGateError",
}

__all__ = [*_NAMES, "__version__"]

# On Linux an OpenBLAS that is loaded before mlx makes float32 matrix products about 30 times faster. It takes
# 70 ms; on a Mac nothing is loaded.
load_blas()


def __getattr__(name: str) -> Any:
    target = _NAMES.get(name)
    if target is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = target.partition(":")
    value: Any = import_module(f"{__name__}.{module}")
    if attribute:
        value = getattr(value, attribute)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
