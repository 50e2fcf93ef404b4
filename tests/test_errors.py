"""`lm.errors`: what a user is told."""

import sys

import pytest

from lm.errors import UserError, check, require


def test_check_raises_its_message_only_when_false():
    check(True, "not raised")
    with pytest.raises(UserError, match=r"^raised$"):
        check(0, "raised")


def test_a_missing_package_is_answered_with_the_way_to_install_it(tmp_path, monkeypatch):
    assert require("json", extra="text", need="x").loads("1") == 1
    with pytest.raises(UserError, match=r"^data.x needs the package no_such_package.part; .*'\.\[text\]'`$"):
        require("no_such_package.part", extra="text", need="data.x")
    # A package that is there but broken is not the user's to install.
    (tmp_path / "half_installed.py").write_text("import another_no_such_package")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ModuleNotFoundError, match="another_no_such_package"):
        require("half_installed", extra="text", need="data.x")
