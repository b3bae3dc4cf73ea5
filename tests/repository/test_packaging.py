"""Imported packages, content of the wheel and of the lock, and folders of tests that cannot hide a package."""

from __future__ import annotations

import importlib
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support.environment.checkout import PACKAGES, ROOT, repository_files


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_are_imported_from_this_checkout(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / name / "__init__.py"


def test_wheel_contains_all_files_of_the_packages_only(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {str(path.relative_to(ROOT)) for name in PACKAGES for path in repository_files(f"{name}/*")}
    assert {name for name in names if ".dist-info/" not in name} == files


def test_distribution_is_marked_as_private() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "Private :: Do Not Upload" in project["classifiers"]


def test_every_folder_of_tests_is_a_package() -> None:
    """pytest then puts the checkout on the path, and no `tests/unit/brokers` hides the package of that name."""
    folders = {path.parent for path in repository_files("tests/*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_lock_has_names_and_versions_only() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    names = [pin.partition("==")[0] for pin in pins]
    assert names == sorted(set(names))
    for pin in pins:
        name, equals, version = pin.partition("==")
        assert equals, pin
        assert name.replace("-", "").isalnum(), pin
        assert version.replace(".", "").isalnum(), pin


def test_minimum_of_every_dependency_is_the_locked_version() -> None:
    """The tests run with the locked versions only, so an older minimum would be a claim that nothing tests."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = settings["project"]
    lines = [*settings["build-system"]["requires"], *project["dependencies"]]
    lines += [line for extra in project["optional-dependencies"].values() for line in extra]
    pins = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
    for line in lines:
        requirement = Requirement(line)
        assert requirement.name in pins, f"{requirement.name} is not in requirements.lock: make lock"
        (bound,) = requirement.specifier
        assert bound.operator in {">=", "=="}, line
        locked = pins[requirement.name]
        assert Version(bound.version) == Version(locked), f"pyproject.toml: {line}: the tested version is {locked}"
