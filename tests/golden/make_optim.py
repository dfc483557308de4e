"""Trajectories of the reference optimizers, for tests/optim.

    git clone https://github.com/jiaweizzhao/GaLore /tmp/GaLore     (Apache-2.0; commit 2cc66f8)
    python tests/golden/make_optim.py /tmp/GaLore

Needs the parity extra (torch, transformers, peft). galore_torch is loaded file by file, because its package
imports bitsandbytes and tensorly. The model is a small network of a tall matrix, a wide matrix and a vector.
At each refresh the basis of the reference is saved, because its signs depend on LAPACK.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

STEPS, RANK, GAP = 20, 4, 8
PROJECTIONS = ("std", "reverse_std", "left", "right", "full")


def load_reference(folder: Path) -> tuple[Any, Any]:
    """AdamW and GaLoreProjector of galore_torch, without the other imports of its package."""
    package = types.ModuleType("galore_torch")
    package.__path__ = [str(folder / "galore_torch")]
    sys.modules["galore_torch"] = package
    tensor = types.ModuleType("galore_torch.galore_projector_tensor")
    tensor.GaLoreProjectorTensor = None
    sys.modules[tensor.__name__] = tensor
    modules = []
    for name in ("galore_projector", "adamw"):
        spec = importlib.util.spec_from_file_location(
            f"galore_torch.{name}", folder / "galore_torch" / f"{name}.py"
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        modules.append(module)
    return modules[1].AdamW, modules[0].GaLoreProjector


def network(start: dict[str, np.ndarray]) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}


def loss_of(p: dict[str, torch.nn.Parameter], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    hidden = torch.tanh(x @ p["up.weight"].T) * p["norm.weight"]
    return ((hidden @ p["down.weight"].T - y) ** 2).mean()


def run(
    p: dict[str, torch.nn.Parameter], optimizer: Any, x: np.ndarray, y: np.ndarray, bases: Any
) -> dict[str, np.ndarray]:
    losses, out = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(p, torch.tensor(x[step]), torch.tensor(y[step]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        out |= bases(step)
    out["losses"] = np.array(losses)
    return out | {name: value.detach().numpy().copy() for name, value in p.items()}


def train_adapters(
    method: str, start: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray
) -> dict[str, np.ndarray]:
    """Train PEFT's LoRA or DoRA on both matrices, or LoRA on one and the other in full (``whole``)."""
    from peft import LoraConfig, get_peft_model

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 12, bias=False), torch.nn.Linear(12, 6, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.tanh(self.up(x)))

    net = Net()
    net.load_state_dict({name: torch.tensor(start[name]) for name in ("up.weight", "down.weight")})
    targets, whole = (["up"], ["down"]) if method == "whole" else (["up", "down"], None)
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        lora_dropout=0.0,
        target_modules=targets,
        modules_to_save=whole,
        use_dora=method == "dora",
    )
    model = get_peft_model(net, config)
    random = np.random.default_rng(1)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    out = {}
    for name, p in trainable.items():
        if "lora_A" in name:
            p.data = torch.tensor(random.normal(size=tuple(p.shape)).astype(np.float32) / 3)
            out[f"{_short(name)}.start"] = p.data.numpy().copy()
    optimizer = torch.optim.AdamW(trainable.values(), lr=0.02, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = ((model(torch.tensor(x[step])) - torch.tensor(y[step])) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    out |= {_short(name): p.detach().numpy().copy() for name, p in trainable.items()}
    return out | {"losses": np.array(losses)}


def _short(name: str) -> str:
    """PEFT's name of a parameter without its prefixes."""
    parts = name.split(".")
    weight = next((part for part in parts if part.startswith("lora_")), "weight")
    return f"{'up' if 'up' in parts else 'down'}.{weight}"


def main(folder: Path) -> None:
    AdamW, _ = load_reference(folder)
    random = np.random.default_rng(0)
    start = {
        "up.weight": (random.normal(size=(12, 8)) / 3),
        "down.weight": (random.normal(size=(6, 12)) / 3),
        "norm.weight": np.ones(12),
    }
    start = {name: value.astype(np.float32) for name, value in start.items()}
    x = random.normal(size=(STEPS, 16, 8)).astype(np.float32)
    y = np.tanh(x @ random.normal(size=(8, 6))).astype(np.float32)
    tensors = {"x": x, "y": y} | {f"start.{name}": value for name, value in start.items()}
    for projection in PROJECTIONS:
        p = network(start)
        matrices = [p["up.weight"], p["down.weight"]]
        galore = {
            "params": matrices,
            "rank": RANK,
            "update_proj_gap": GAP,
            "scale": 0.25,
            "proj_type": projection,
        }
        optimizer = AdamW(
            [{"params": [p["norm.weight"]]}, galore], lr=0.02, weight_decay=0.01, no_deprecation_warning=True
        )

        def bases(step: int, p: Any = p, optimizer: Any = optimizer) -> dict[str, np.ndarray]:
            if step % GAP:
                return {}
            out = {}
            for name in ("up.weight", "down.weight"):
                basis = optimizer.state[p[name]]["projector"].ortho_matrix
                for number, matrix in enumerate(basis if isinstance(basis, list) else [basis]):
                    out[f"basis.{step}.{name}.{number}"] = matrix.numpy().copy()
            return out

        tensors |= {f"{projection}.{key}": value for key, value in run(p, optimizer, x, y, bases).items()}
    p = network(start)
    optimizer = torch.optim.AdamW(p.values(), lr=0.02, weight_decay=0.01)
    tensors |= {f"adamw.{key}": value for key, value in run(p, optimizer, x, y, lambda step: {}).items()}
    for method in ("lora", "dora", "whole"):
        tensors |= {f"{method}.{key}": value for key, value in train_adapters(method, start, x, y).items()}
    path = Path(__file__).with_name("optim_trajectories.safetensors")
    save_file({name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
