"""Check this machine: `movekd doctor`.

Input: the storage of a cache. Output: an ``Examination`` of packages, devices, disk and teachers.
The check downloads nothing.
"""

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata

import torch
from packaging.requirements import Requirement

from movekd.analysis.disk_benchmark import DiskRates, measure_disk
from movekd.cache.spec import load_spec, shipped_specs
from movekd.cache.storage import Storage
from movekd.teachers.providers import find_downloaded, published
from movekd.threads import num_cpus

_ROW_BYTES = 600_000
"""About the size of CLIP-L's 576 tokens in int8."""


@dataclass(frozen=True)
class Package:
    """A package that movekd needs.

    Attributes:
        name: name on PyPI.
        version: installed version; None if it is not installed.
        needs: required versions.
        extra: extra of movekd that needs it; empty for the core.
        is_fit: whether the installed version fits, or a package of an extra is missing.
    """

    name: str
    version: str | None
    needs: str
    extra: str
    is_fit: bool


@dataclass(frozen=True)
class Device:
    """A GPU or the CPU."""

    name: str
    what: str
    memory_bytes: int | None
    bfloat16: bool


@dataclass(frozen=True)
class TeacherWeights:
    """The weights of a shipped teacher on this machine.

    Attributes:
        teacher: name of the spec.
        model: the model in its library.
        repo: hub repository of the weights.
        path: the downloaded file; None if it is not here.
    """

    teacher: str
    model: str
    repo: str | None
    path: str | None


@dataclass(frozen=True)
class Examination:
    """Result of `movekd doctor`."""

    python: str
    system: str
    packages: Sequence[Package]
    devices: Sequence[Device]
    cache: str
    free_bytes: int | None
    disk: DiskRates
    teachers: Sequence[TeacherWeights]

    @property
    def problems(self) -> list[str]:
        """One sentence for each package that does not fit."""
        return [
            f"{p.name} {p.version or 'is missing'}; movekd needs {p.needs or 'it'}: "
            f"pip install '{p.name}{p.needs}'"
            for p in self.packages
            if not p.is_fit
        ]


def examine(storage: Storage, *, is_disk_measured: bool = True) -> Examination:
    """Examine this machine; measuring the disk takes 2 seconds and 256 MiB that are then deleted.

    Args:
        storage: place of a cache.
        is_disk_measured: whether to write there.
    """
    no_rates = DiskRates(None, None, "not asked for")
    return Examination(
        python=platform.python_version(),
        system=platform.platform(),
        packages=list(_packages()),
        devices=list(_devices()),
        cache=storage.url,
        free_bytes=storage.free_bytes(),
        disk=measure_disk(storage, _ROW_BYTES) if is_disk_measured else no_rates,
        teachers=[_weights(name) for name in shipped_specs()],
    )


def _packages() -> Iterator[Package]:
    for text in metadata.requires("movekd") or []:
        requirement = Requirement(text)
        extra = ""
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            extra = str(requirement.marker).rpartition("==")[2].strip(" '\"")
            if extra == "dev" or not requirement.marker.evaluate({"extra": extra}):
                continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        fits = fits or (not version and bool(extra))
        yield Package(requirement.name, version, str(requirement.specifier), extra, fits)


def _devices() -> Iterator[Device]:
    for number in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(number)
        yield Device(f"cuda:{number}", of.name, of.total_memory, torch.cuda.is_bf16_supported())
    if torch.backends.mps.is_available():
        yield Device("mps", "Apple GPU", None, True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Device("cpu", f"{platform.machine()}, {num_cpus()} cores", memory, True)


def _weights(name: str) -> TeacherWeights:
    spec = load_spec(name)
    path = find_downloaded(spec)
    return TeacherWeights(name, spec.model, published(spec).repo, str(path) if path else None)
