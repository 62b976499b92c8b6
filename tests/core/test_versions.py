"""These tests check the warning at import of untested releases, and that all files name the same releases."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from modeling_moe.utils import versions


tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BOUNDED = ("accelerate", "peft", "torch", "transformers", "trl")


def bounds() -> dict[str, Requirement]:
    texts = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    return {requirement.name: requirement for requirement in map(Requirement, texts)}


def pinned() -> dict[str, str]:
    lines = (ROOT / "configuration" / "constraints" / "tested.txt").read_text().splitlines()
    pairs = [line.partition(";")[0].strip().split("==") for line in lines if not line.startswith("#")]
    return dict(pairs)


def environments() -> dict[str, list[str]]:
    lines = (ROOT / "configuration" / "constraints" / "matrix.txt").read_text().splitlines()
    return {line.split()[0]: line.split()[2:] for line in lines if not line.startswith("#")}


@pytest.fixture
def installed(monkeypatch):
    """Pretends that given releases are installed and that our metadata demands given ranges."""

    def pretend(**releases: str):
        monkeypatch.setattr(versions, "requires", lambda name: [*PROJECT["dependencies"], "trl<1; extra == 'dev'"])

        def version(name: str) -> str:
            if name == "packaging":
                raise metadata.PackageNotFoundError(name)
            return releases.get(name, pinned().get(name, "1000"))

        monkeypatch.setattr(versions, "version", version)

    return pretend


def test_the_tested_releases_are_silent(installed, capsys):
    installed()
    assert versions.untested() == []
    installed(torch="2.13.0+cpu", transformers="5.17.0")
    assert versions.untested() == []


def test_another_release_is_warned_of_in_one_line(installed, monkeypatch):
    installed(transformers="5.99.1", torch="2.16.0.dev1", peft="0.21.0")
    said = []
    monkeypatch.setattr(versions.logger, "warning", said.append)
    versions.warn_of_untested()
    assert len(said) == 1
    assert "\n" not in said[0]
    assert "transformers 5.99.1 (tested: <5.25,>=5.17)" in said[0]
    assert "torch 2.16.0.dev1" in said[0]
    assert "peft" not in said[0]
    assert "bash scripts/test.sh --matrix NAME==VERSION" in said[0]


def test_a_copy_that_is_not_installed_has_nothing_to_say():
    assert versions.untested("a-name-that-nobody-has-installed") == []


def test_upper_bounds_say_what_was_tested():
    for name in BOUNDED:
        upper = next(Version(spec.version) for spec in bounds()[name].specifier if spec.operator == "<")
        release = Version(pinned()[name])
        assert release < upper, name
        assert upper.release[:2] > release.release[:2], name


def test_the_oldest_environments_are_the_lower_bounds():
    lower = {
        name: next(Version(spec.version) for spec in bounds()[name].specifier if spec.operator == ">=")
        for name in BOUNDED
    }
    # TRL needs Python 3.11
    changes = [*environments()["oldest-python-3.10"], *environments()["trl-oldest"]]
    oldest = [change.split("==") for change in changes if "==" in change]
    assert {name: Version(release).release[:2] for name, release in oldest} == {
        name: version.release[:2] for name, version in lower.items()
    }


def test_environments_name_known_packages():
    for changes in environments().values():
        assert {re.split("==", change)[0] for change in changes} <= set(pinned())
    assert {"tested", "newest", "oldest-python-3.10", "newest-python-3.13", "servers"} <= set(environments())
