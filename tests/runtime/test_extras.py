"""The remedy for what the light install leaves out."""

import pytest

from tclkit.runtime.extras import install_command


@pytest.mark.parametrize(("upgrade", "start"), [(False, 'pip install ".[build]"'), (True, 'pip install -U ".[build]"')])
def test_what_works_from_a_checkout_stands_first(upgrade: bool, start: str) -> None:
    assert install_command("build", upgrade=upgrade).startswith(f"{start} in a checkout")
