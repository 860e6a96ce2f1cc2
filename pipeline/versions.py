"""Versions of what computes a run, and other things that may round differently."""

from __future__ import annotations

import platform
from importlib.metadata import version

from .artifacts import Run
from .observe import say
from .spec import Spec

PACKAGES = ("mirrorscope", "torch", "ray", "pyarrow")


def versions() -> dict[str, str]:
    """Of Python and the packages that decide how numbers are computed and written."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def warn_of_changes(run: Run, spec: Spec) -> None:
    """Say what may round differently from what is committed already."""
    for stage in ("tune", "score"):
        before, after = getattr(run.spec.resources, stage), getattr(spec.resources, stage)
        if (before.cpus, before.gpus > 0) != (after.cpus, after.gpus > 0):
            say(
                f"warning: {run.uri()} was begun with other workers for {stage} (threads or device): last bits may differ"
            )
    now = versions()
    for package, then in run.resolved.versions.items():
        if now.get(package) != then:
            say(
                f"warning: {run.uri()} was begun with {package} {then}, this is {now.get(package)}: last bits may differ"
            )
