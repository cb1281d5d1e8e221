"""rlhf_kernels.integrations._patch, on a package made up here."""

import sys
from types import ModuleType

import pytest

from rlhf_kernels.integrations import _patch
from rlhf_kernels.integrations._patch import Patches, check_version

NAME = "rk_made_up_peer"


def old():
    return "old"


def new():
    return "new"


@pytest.fixture
def peer(monkeypatch):
    """A package whose module `user` imported a function of `home` by name."""
    modules = {name: ModuleType(name) for name in (NAME, f"{NAME}.home", f"{NAME}.user", f"{NAME}_other")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    home, user, other = (modules[name] for name in (f"{NAME}.home", f"{NAME}.user", f"{NAME}_other"))
    home.function = user.renamed = other.function = old
    home.Class = type("Class", (), {"method": old})
    home.untouched = len
    monkeypatch.setattr(_patch, "version", lambda package: "1.2.3")
    return home, user, other


def patches(home):
    return Patches(NAME, ("1.2.3",), lambda: [(home, "function", new), (home.Class, "method", new)])


def test_replaces_wherever_the_package_holds_it_and_nowhere_else(peer):
    home, user, other = peer
    made = patches(home)
    assert home.function is old and not made.enabled
    with made.patched():
        assert made.enabled
        assert home.function is user.renamed is home.Class.method is new
        assert other.function is old and home.untouched is len
    assert home.function is user.renamed is home.Class.method is old
    assert not made.enabled


def test_nests_and_disable_without_enable_does_nothing(peer):
    home, user, _ = peer
    made = patches(home)
    made.disable()
    made.enable()
    with made.patched():
        pass
    assert home.function is user.renamed is new
    made.disable()
    assert home.function is user.renamed is old
    made.disable()
    made.enable()
    assert home.function is new
    made.disable()


def test_comes_back_after_an_error(peer):
    home, *_ = peer
    with pytest.raises(KeyError), patches(home).patched():
        raise KeyError
    assert home.function is old


def test_module_imported_while_enabled_is_put_back_too(peer, monkeypatch):
    home, *_ = peer
    late = ModuleType(f"{NAME}.late")
    with patches(home).patched():
        monkeypatch.setitem(sys.modules, late.__name__, late)
        late.function = home.function
        assert late.function is new
    assert late.function is old


@pytest.mark.parametrize("again", ["enable", "disable"])
def test_refuses_where_somebody_else_replaced_it(peer, again):
    home, user, _ = peer
    made = patches(home)
    made.enable()
    user.renamed = len
    with pytest.raises(RuntimeError, match=rf"{NAME}\.user\.renamed was replaced by somebody else"):
        getattr(made, again)()
    assert made.enabled and home.function is new and user.renamed is len
    user.renamed = new
    made.disable()
    assert home.function is user.renamed is old


def test_missing_attribute_changes_nothing(peer):
    home, *_ = peer
    made = Patches(NAME, ("1.2.3",), lambda: [(home, "function", new), (home, "gone", new)])
    with pytest.raises(AttributeError, match=rf"{NAME}\.home has no 'gone'"):
        made.enable()
    assert home.function is old and not made.enabled


def test_refuses_other_versions_and_names_those_tested(peer, monkeypatch):
    home, *_ = peer
    made = Patches(NAME, ("1.0.0", "2.0.0"), lambda: [(home, "function", new)])
    with pytest.raises(RuntimeError, match=rf"{NAME} is 1\.2\.3, expected .* tested with: 1\.0\.0, 2\.0\.0"):
        made.enable()
    assert home.function is old and not made.enabled


def test_refuses_what_is_not_installed():
    with pytest.raises(ImportError, match=rf"{NAME} is not installed; .* tested with {NAME} 1\.0\.0"):
        check_version(NAME, ("1.0.0",))
