"""The one interface for whatever watches a training: progress bars, profiles, and sinks of metrics such as trackio or a CSV file.

A hook is a function of one row, called after every optimizer step on every rank, in the order given. ``md.run(recipe, out,
hooks=[...])`` hands it to every stage that trains, and :func:`~mlx_distill.train.loop.train` to one training. A row holds

==========================  =========================================================================================
``stage``                   which training, such as ``teach`` or ``distill`` (in a run of stages)
``step``, ``steps``         optimizer steps done, and of the whole run
``loss``                    over the step's window, all micro-batches and ranks; each term of it under its own name, and
                            all of them together under ``terms``
``valid_loss``, ...         where the validation rows were looked at after this step: the same over them
``learning_rate``           of this step
``grad_norm``               before clipping
``tokens``                  trained tokens of this step, over all ranks
``tokens_per_second``       of this step
``seconds``                 spent in training so far, over all parts of an interrupted run
``peak_memory_bytes``       since the start of this process's part of the run
``eta_s``                   seconds left, or None where nothing can be said yet
``timing``                  seconds by part of the step (:data:`~mlx_distill.train.stopwatch.PARTS`); what was saved after a step
                            counts in the next
==========================  =========================================================================================

Everything is a plain Python value and every number is finite. All but ``stage``, ``steps``, ``terms``, ``eta_s`` and ``timing`` stands in
``metrics.jsonl`` too, which is always written, so a sink that was missing can be filled later. After an interruption the steps behind the
last checkpoint come again, with the same numbers. What a hook raises ends the run; the last checkpoint stands.

>>> import csv, sys
>>> def to_csv(stream):
...     writer = csv.writer(stream, lineterminator="\\n")
...     return lambda row: writer.writerow([row["step"], row["loss"]])
>>> _ = to_csv(sys.stdout)({"step": 3, "loss": 0.25})
3,0.25
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Hook = Callable[[dict[str, Any]], None]
