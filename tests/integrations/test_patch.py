"""rlhf_kernels.integrations._patch, on a package made up here."""

import importlib
import inspect
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


def test_replaces_there_alone(peer):
    home, user, _ = peer
    made = Patches(NAME, ("1.2.3",), lambda: [(home, "function", new, False)])
    with made.patched():
        assert home.function is new and user.renamed is old
    assert home.function is user.renamed is old


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


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """A package of which nothing is loaded: user imports a function of home by name."""
    folder = tmp_path / "rk_on_disk"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "home.py").write_text("def function():\n    return 'old'\n\nclass Class:\n    method = function\n")
    (folder / "user.py").write_text("from .home import function\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(_patch, "version", lambda package: "1.2.3")
    importlib.invalidate_caches()
    yield Patches("rk_on_disk", ("1.2.3",), on_import={"rk_on_disk.home": {"function": new, "Class.method": new}})
    for name in [name for name in sys.modules if name.startswith("rk_on_disk")]:
        del sys.modules[name]


def test_imports_nothing_and_replaces_on_import(on_disk):
    before = list(sys.meta_path)
    with on_disk.patched():
        assert not any(name.startswith("rk_on_disk") for name in sys.modules)
        user = importlib.import_module("rk_on_disk.user")
        home = sys.modules["rk_on_disk.home"]
        assert user.function is home.function is home.Class.method is new
        assert "return 'old'" in inspect.getsource(home)
    assert user.function is home.function and home.function() == home.Class.method() == "old"
    assert sys.meta_path == before


def test_replaces_on_import_what_was_loaded_before(on_disk):
    user = importlib.import_module("rk_on_disk.user")
    with on_disk.patched():
        assert user.function is sys.modules["rk_on_disk.home"].function is new
    assert user.function() == "old"


def test_two_wait_for_the_same_module(on_disk, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    seen = []
    with on_disk.patched():
        _patch.call_on_import("rk_on_disk.home", seen.append)
        home = importlib.import_module("rk_on_disk.home")
        assert seen == [home] and home.function is new
    assert type(home.__loader__).__name__ == "SourceFileLoader"


def test_import_after_disable_is_left_alone(on_disk):
    with on_disk.patched():
        pass
    assert importlib.import_module("rk_on_disk.home").function() == "old"


def test_attribute_that_the_imported_module_lacks_is_an_error(on_disk):
    made = Patches("rk_on_disk", ("1.2.3",), on_import={"rk_on_disk.home": {"Gone.method": new}})
    with made.patched(), pytest.raises(AttributeError, match=r"rk_on_disk\.home has no 'Gone'"):
        importlib.import_module("rk_on_disk.home")
