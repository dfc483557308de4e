"""Why a job's process has died, from what it printed last: the errors of a Mac's GPU in plain words.

macOS ends the work of a program on the GPU that keeps the display waiting. MLX then raises an error or, where
it happens in Metal's own thread, aborts the process, and only the last lines of its log say why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TAIL_BYTES = 64 << 10
_CODE = "kIOGPUCommandBufferCallbackError"
_RESUME = "resume it: mlx-distill jobs resume {job}; it goes on from its last checkpoint"
_DISPLAY = (
    _RESUME + ". To keep it from happening again let the display sleep while it trains, or work over SSH; or "
    "submit with --relax-gpu-timeout, which helps on some Macs"
)
# What Metal calls the error, or its code -> our code, message, fix.
_ERRORS = (
    (
        ("Impacting Interactivity", f"{_CODE}ImpactingInteractivity"),
        "gpu_watchdog",
        "macOS stopped the work of the GPU, because it kept the display waiting "
        "(Impacting Interactivity, ml-explore/mlx#3267)",
        _DISPLAY,
    ),
    (
        ("Caused GPU Timeout Error", f"{_CODE}Timeout", f"{_CODE}Hang", "Caused GPU Hang Error"),
        "gpu_watchdog",
        "macOS stopped the work of the GPU, because one piece of it took too long (GPU timeout)",
        _DISPLAY + "; a smaller batch_size or max_length makes the pieces shorter",
    ),
    (
        ("for causing prior/excessive GPU errors", f"{_CODE}SubmissionsIgnored"),
        "gpu_watchdog",
        "macOS refused further work of this process on the GPU after earlier errors (Submissions Ignored)",
        _DISPLAY,
    ),
    (
        ("Insufficient Memory", f"{_CODE}OutOfMemory"),
        "out_of_memory",
        "the GPU ran out of memory (Insufficient Memory)",
        "close other programs, or lower batch_size or max_length, then resume it",
    ),
)


def explain_gpu_error(text: str, job_id: str) -> dict[str, Any] | None:
    """Code, message and fix of a job where a text has an error of Metal that we know, else None.

    >>> explain_gpu_error("[METAL] Command buffer execution failed: Impacting Interactivity", "job-1")["code"]
    'gpu_watchdog'
    >>> explain_gpu_error("rows.jsonl:3: Insufficient Memory in a song's text", "job-1") is None
    True
    """
    lines = [line for line in text.splitlines() if "METAL" in line or "Metal" in line or _CODE in line]
    for line in reversed(lines):
        for signs, code, message, fix in _ERRORS:
            if any(sign in line for sign in signs):
                return {"code": code, "message": message, "fix": fix.format(job=job_id)}
    return None


def explain_death(log: Path, job_id: str) -> dict[str, Any]:
    """Code, message and fix of a job whose process has ended without a word."""
    known = explain_gpu_error(read_tail(log, _TAIL_BYTES), job_id)
    return known or {
        "code": "orphaned",
        "message": "its process has ended without a word: it was killed, or the machine was switched off",
        "fix": _RESUME.format(job=job_id),
    }


def read_tail(path: Path, size: int) -> str:
    """The last bytes of a text file, from the beginning of a line where there is one; "" without the file."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - size))
            data = file.read()
    except FileNotFoundError:
        return ""
    if end > size and b"\n" in data:
        data = data.partition(b"\n")[2]
    return data.decode(errors="replace")
