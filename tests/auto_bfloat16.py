"""A pytest plugin (`-p tests.auto_bfloat16`): `dtype: auto` means bfloat16, as on processors that multiply it.

Only in the process that loads it: commands that a test starts decide by the machine's own processor.
"""

from pixrl import device


def pytest_configure() -> None:
    device.cpu_has_bfloat16 = lambda: True  # type: ignore[assignment]
