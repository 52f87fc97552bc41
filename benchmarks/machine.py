"""Where a run was made: what every row says about machine, versions and commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from mos_kernels import __version__

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "peft", "geoopt")


def about(device: torch.device, commit_given: str | None = None) -> dict:
    """machine names the folder of its results; run tells runs apart. commit_given: where there is no git checkout."""
    committed = commit_given or commit()
    found = {"run": time.strftime("%Y-%m-%dT%H:%M:%S"), "commit": committed, "python": platform.python_version()}
    found.update({name: version(name) for name in PACKAGES}, mos_kernels=__version__)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = torch.cuda.get_device_name(device)
        return {
            "machine": name.lower().replace(" ", "-").replace("/", "-"), "gpu": name, "cuda": torch.version.cuda,
            "hip": torch.version.hip, "memory_bytes": properties.total_memory, **found,
        }  # fmt: skip
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"machine": f"cpu-{cores}core", "cpu": processor(), "threads": torch.get_num_threads(), **found}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    named = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return named[0].split(":")[1].strip() if named else platform.processor()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(*paths: str) -> str | None:
    """The commit of this tree, "-dirty" where tracked files (git's `paths`, or all) differ; None outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
    except FileNotFoundError:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *paths)
    return head + ("-dirty" if changed else "") if head else None
