"""Which plugins the tests use; fixtures live beside what they make."""

from pathlib import Path

pytest_plugins = ["tests.emulator"] if Path(__file__).with_name("emulator.py").exists() else []
